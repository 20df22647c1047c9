"""The wrapper: anatomy, plan, stages, and the stream of tokens through them."""
