"""python -m gateloop_transformer.cli."""

import sys

from gateloop_transformer.cli import main

sys.exit(main())
