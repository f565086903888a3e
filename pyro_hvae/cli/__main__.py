"""``python -m pyro_hvae.cli``."""

import sys

from pyro_hvae.cli import main

sys.exit(main())
