"""Distil a student.

Run: python jobs/train.py configs/debug_cpu.yaml train.num_workers=2
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("train", sys.argv)
