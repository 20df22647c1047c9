"""One paper, one file. Modules here are found and imported by `reduction.registry`."""
