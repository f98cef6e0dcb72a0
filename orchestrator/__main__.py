"""`python -m longstride.orchestrator ...` is `longstride ...`, for launchers such as torchrun that want a module."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
