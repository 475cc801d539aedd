"""Write a run's student as safetensors.

Run: python jobs/export.py runs/pcd
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("export", sys.argv)
