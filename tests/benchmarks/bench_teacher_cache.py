"""Seconds per training step: the teacher in every step against its stored maps.

Run: python tests/benchmarks/bench_teacher_cache.py IMAGES [IMAGES ...] --teacher FILE [--steps 60]

Both are `pcd-ray train` with one worker as it stands, in turn, on the same packed images, in the
same order, with the same views for the student. The maps are made once, by the first run that needs
them, before its steps. The rate is that of the steady part, as in bench_loop.py: all logging
windows but the first.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench_loop import CONFIG, prepared, steady
from measuring import in_turn, median_ratio, print_circumstances, print_table, spread

from pcd_ray import metric_names as names
from pcd_ray.config import config_from_file
from pcd_ray.data.shards import open_shards

NAMES = ("teacher in every step", "stored maps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="folders of images")
    parser.add_argument("--teacher", required=True, help="weights of timm's mobilenetv2_100")
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    options = parser.parse_args()
    told: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench_teacher_cache_") as folder:
        path = prepared(options, Path(folder))
        config = config_from_file(str(path))
        images = open_shards(config.data.shards).num_images
        runs = {name: partial(step_s, path, views, told) for views, name in enumerate(NAMES)}
        seconds = in_turn(runs, repeats=options.repeats)
    print(f"training, {options.steps} steps of {config.train.global_batch_size}, {images:,} images")
    print_table(
        ("teacher", "s/step", "times the teacher's"),
        [
            (name, spread(values), f"{median_ratio(values, seconds[NAMES[0]]):.2f}")
            for name, values in seconds.items()
        ],
    )
    print("\n".join(told))
    print_circumstances(threads=options.threads)


def step_s(path: Path, views: int, told: list[str]) -> float:
    """Train in a run of its own; return its seconds per step, note what a cache costs."""
    folder = path.parent
    name = f"run_{len(list(folder.iterdir()))}"
    words = ["train", str(path), f"run.name={name}", f"teacher.cache.views={views}"]
    result = subprocess.run(
        [sys.executable, "-m", "pcd_ray", *words], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    if "maps computed" in result.stderr:
        told += re.findall(r"^teacher cache: .*", result.stderr, re.MULTILINE)
    lines = [
        json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    batch = config_from_file(str(path)).train.global_batch_size
    waits = [line[names.DATA_WAIT] for line in lines if names.DATA_WAIT in line]
    print(f"  waited for data: {statistics.mean(waits[1:]):.0f}%", file=sys.stderr)
    return batch / steady(lines)


if __name__ == "__main__":
    main()
