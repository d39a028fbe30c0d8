"""python -m comp is the same as comp."""

import sys

from comp.engine.cli import main

sys.exit(main())
