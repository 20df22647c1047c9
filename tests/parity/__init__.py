"""Parity with official implementations, from fixtures: `python -m tests.parity DIR`."""
