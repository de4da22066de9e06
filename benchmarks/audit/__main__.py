"""`python -m benchmarks.audit`. Imports nothing itself: worker processes import this module before they are told
whether to interpret kernels, which is settled when those are imported."""

import sys

if __name__ == "__main__":
    from .run import main

    sys.exit(main())
