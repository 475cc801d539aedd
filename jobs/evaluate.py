"""Judge students side by side.

Run: python jobs/evaluate.py knn RUN untrained teacher eval.knn_train=FOLDER eval.knn_test=FOLDER
"""

import sys

from pcd_ray.cli import run_job

if __name__ == "__main__":
    run_job("eval", sys.argv)
