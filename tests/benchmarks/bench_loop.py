"""Images per second of training: through Ray against the same loop in plain torch.

Run: python tests/benchmarks/bench_loop.py IMAGES [IMAGES ...] --teacher FILE [--steps 60]

Both take the same packed images in the same order, the same views, networks, loop and number of
torch threads. Through Ray means `pcd-ray train` with one worker as it stands; plain torch means one
process that calls `train_steps` on a DataLoader with two processes. They run one after the other,
each in processes of its own. The rate is that of the steady part: the metric
throughput/images_per_s_global over all logging windows but the first; these are alike in steps, so
that their harmonic mean is all images over all seconds, stalls included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import in_turn, median_ratio, print_circumstances, print_table, spread
from planned_views import PlannedViews, loader_batches

from pcd_ray import metric_names as names
from pcd_ray.config import Config, SourceConfig, config_from_file, to_yaml
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import open_shards
from pcd_ray.data.sources import list_sources
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_head import fit_pca_head
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.train.loop import LoopSettings, train_steps
from pcd_ray.train.optim import Schedule, build_optimizer, peak_learning_rate
from pcd_ray.train.state import TrainState, wrap_student

CONFIG = Path(__file__).parents[2] / "configs" / "photos_mobilenetv2.yaml"
LOG_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="folders of images")
    parser.add_argument("--teacher", required=True, help="weights of timm's mobilenetv2_100")
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="processes of the DataLoader")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--plain", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain_windows(config_from_file(options.plain), options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Pack the images, run both variants in turn, print the table."""
    with tempfile.TemporaryDirectory(prefix="bench_loop_") as folder:
        config = prepared(options, Path(folder))
        rates = in_turn(
            {
                "plain torch": partial(plain_rate, config),
                "pcd-ray train": partial(ray_rate, config, Path(folder)),
            },
            repeats=options.repeats,
        )
    print(f"training, {options.steps} steps, {Path(options.config).name}, 1 worker")
    print_table(
        ("loop", "images/s", "times plain torch"),
        [
            (name, spread(values), f"{median_ratio(values, rates['plain torch']):.2f}")
            for name, values in rates.items()
        ],
    )
    print_circumstances(threads=options.threads)


def prepared(options: argparse.Namespace, folder: Path) -> Path:
    """Pack the images so that one epoch lasts ``--steps`` steps; write the configuration."""
    overrides = [
        f"run.root={folder}",
        f"data.shards={folder}/shards",
        f"teacher.weights={Path(options.teacher).absolute()}",
        "teacher.fit.images=64",  # not timed; the head is as wide as ever
        f"train.threads_per_worker={options.threads}",
        f"train.log_every_steps={LOG_EVERY}",
        "train.epochs=1",
        "train.num_workers=1",
        "optim.warmup_epochs=0.1",
    ]
    config = config_from_file(options.config, overrides)
    folders = [str(Path(path).absolute()) for path in options.images]
    found = len(list_sources(folders))
    weight = options.steps * config.train.global_batch_size / found
    sources = tuple(SourceConfig(uri=path, weight=weight) for path in folders)
    config = replace(config, data=replace(config.data, sources=sources))
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    pcd_ray("pack", str(path))
    return path


def ray_rate(config: Path, folder: Path) -> float:
    """Train through Ray in a run of its own; return its images per second."""
    name = f"ray_{len(list(folder.iterdir()))}"
    pcd_ray("train", str(config), f"run.name={name}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return steady([json.loads(line) for line in lines])


def pcd_ray(*words: str) -> None:
    """Run the command; its errors stop the benchmark."""
    subprocess.run([sys.executable, "-m", "pcd_ray", *words], check=True, stdout=subprocess.DEVNULL)


def plain_rate(config: Path) -> float:
    """Train in plain torch in a process of its own; return its images per second."""
    result = subprocess.run(
        [sys.executable, *sys.argv, "--plain", str(config)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return steady(json.loads(result.stdout))


def steady(windows: list[dict[str, float]]) -> float:
    """Return the images per second over all logging windows but the first."""
    rates = [window[names.IMAGES_PER_S] for window in windows if names.IMAGES_PER_S in window]
    return statistics.harmonic_mean(rates[1:])


def plain_windows(config: Config, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train in this process, fed by a DataLoader; return the metrics of each logging window."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = open_shards(config.data.shards)
    batch_size = config.train.global_batch_size
    total_steps = EpochPlan(shards.plan_sources, config.run.seed).total_steps(1, batch_size)
    views = PlannedViews(
        shards,
        recipe_from(config.augment, config.pairing.kind),
        seed=config.run.seed,
        length=total_steps * batch_size,
        max_pixels=config.data.max_pixels,
    )
    method = plain_method(config, views, device)
    optimizer = build_optimizer(
        config.optim.name, method.student, weight_decay=config.optim.weight_decay
    )
    student = wrap_student(method.student, device=device, compiled=config.train.compile).train()
    state = TrainState(student, optimizer, method.branches)
    batches = loader_batches(views, batch_size=batch_size, processes=options.processes)
    settings = loop_settings(config, images=views.plan.images_per_epoch, steps=total_steps)
    steps = train_steps(state, batches, settings)
    return [done.metrics for done in steps if done.metrics is not None]


def loop_settings(config: Config, *, images: int, steps: int) -> LoopSettings:
    """Return what the Ray worker gives the loop for one epoch of ``images``."""
    batch_size = config.train.global_batch_size
    schedule = Schedule(
        peak_lr=peak_learning_rate(config.optim.base_lr, batch_size),
        warmup_steps=config.optim.warmup_epochs * images / batch_size,
        total_steps=steps,
        final_fraction=config.optim.final_lr_fraction,
    )
    return LoopSettings(
        schedule=schedule,
        images_per_epoch=images,
        global_batch_size=batch_size,
        accumulation_steps=config.train.accumulation_steps,
        clip_grad_norm=config.optim.clip_grad_norm,
        log_every_steps=config.train.log_every_steps,
        seed=config.run.seed,
    )


def plain_method(config: Config, views: PlannedViews, device: torch.device) -> Method:
    """Return teacher, student and queue; the teacher's head is fitted on the first views."""
    loaded = load_teacher(config.teacher)
    items = [views[position]["student_view"] for position in range(config.teacher.fit.images)]
    head = fit_pca_head(
        loaded,
        [torch.from_numpy(np.stack(items))],
        config.teacher.fit,
    )
    return build_method(config, [(loaded, head)], device=device)


if __name__ == "__main__":
    main()
