"""`python -m fremap`: the command, where it is not on the PATH."""

import sys

from fremap.cli import main

sys.exit(main())
