"""python -m comp is the same as comp."""

import sys

from comp.cli import main

sys.exit(main())
