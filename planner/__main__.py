"""`python -m planner` is `plan-devices`."""

import sys

from planner.cli.main import main

sys.exit(main())
