"""Distil a student.

Run: python jobs/train.py configs/debug_cpu.yaml data.shards=SHARDS teacher.weights=FILE
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("train", sys.argv)
