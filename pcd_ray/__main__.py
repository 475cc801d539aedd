"""``python -m pcd_ray VERB``."""

import sys

if not sys.flags.safe_path:  # Python puts the working folder first: a random.py there hides random
    sys.path = [*sys.path[1:], ""]

from pcd_ray.cli import main

sys.exit(main())
