"""``python -m mupjax``."""

import sys

from mupjax.cli import main

sys.exit(main())
