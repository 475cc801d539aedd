"""``python -m pcd_ray VERB``."""

import sys

from pcd_ray.cli import main

sys.exit(main())
