"""`python -m probgen`: the command line."""

import sys

from probgen.cli import main

sys.exit(main())
