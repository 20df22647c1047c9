"""`python -m tests.parity DIR`: run every fixture in DIR through the public API."""

import sys
from pathlib import Path

from tests.parity.runner import main

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit("usage: python -m tests.parity DIR")
    raise SystemExit(main(Path(sys.argv[1])))
