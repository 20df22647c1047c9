"""`python -m tests.parity DIR`: run every fixture in DIR through the public API.

With `--write` the result also goes to results/parity.json, which the catalogue of methods reads;
`python -m zoo.cli.docs` then updates the tables.
"""

import sys
from pathlib import Path

from tests.parity.runner import main
from zoo.report.evidence import RESULTS

if __name__ == "__main__":
    words = sys.argv[1:]
    write = "--write" in words
    folders = [w for w in words if w != "--write"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise SystemExit("usage: python -m tests.parity DIR [--write]")
    raise SystemExit(main(Path(folders[0]), RESULTS / "parity.json" if write else None))
