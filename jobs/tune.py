"""Search options of a run on the cluster.

Run: python jobs/tune.py configs/sweep_temperature_mhsa_adaptor.yaml data.shards=SHARDS
    teacher.weights=FILE eval.knn_train=LABELLED eval.knn_test=LABELLED
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("tune", sys.argv)
