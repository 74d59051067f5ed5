"""`python -m prior_hub.cli`."""

import sys

from prior_hub.cli import main

sys.exit(main())
