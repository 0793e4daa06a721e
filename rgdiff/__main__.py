"""`python -m rgdiff` is the command line."""

import sys

from rgdiff.cli import main

sys.exit(main())
