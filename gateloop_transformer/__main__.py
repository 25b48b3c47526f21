"""`python -m gateloop_transformer` is the `gateloop` command."""

import sys

from gateloop_transformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
