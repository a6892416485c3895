"""`python -m comfy_executors`: the command line."""

from __future__ import annotations

import sys

from comfy_executors.cli import main

if __name__ == "__main__":
    sys.exit(main())
