"""Run the offline demo.

Run: python jobs/demo.py run.root=s3://bucket/runs
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("demo", sys.argv)
