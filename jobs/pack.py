"""Pack images into shards.

Run: python jobs/pack.py data.sources=s3://bucket/photos data.shards=s3://bucket/shards
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("pack", sys.argv)
