"""Views per second: Ray Data's path against a torch DataLoader with two processes.

Run: python tests/benchmarks/bench_views.py SHARDS [--sizes 128 224 --batches 40]

Both read the same packed images in the same order, with the same functions, one after the other.
The first batches of each are not counted: processes start and buffers fill.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator
from functools import partial

import ray
import torch
from measuring import in_turn, median_ratio, print_circumstances, print_table, spread
from planned_views import PlannedViews, loader_batches

from pcd_ray.config import AugmentConfig, DataConfig
from pcd_ray.data.augment import ViewRecipe
from pcd_ray.data.plan import EpochPlan, RankPlan
from pcd_ray.data.ray_views import view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import Shards, open_shards
from pcd_ray.train.loop import HostBatch

SEED = 0
DATA = DataConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="folder that `pcd-ray pack` wrote")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224], help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--skip", type=int, default=24, help="batches before the clock starts")
    parser.add_argument("--batches", type=int, default=40, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="CPUs of Ray and of the loader")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a private cluster of this process
    shards = open_shards(options.shards)
    ray.init(
        address="local",
        num_cpus=options.processes,
        include_dashboard=False,
        object_store_memory=1_000_000_000,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    rows = [row for size in options.sizes for row in compare(shards, size, options)]
    ray.shutdown()
    print(f"batches of {options.batch_size} from {shards.num_images:,} images")
    print_table(("pixels", "path", "views/s", "times DataLoader"), rows)
    print_circumstances(threads=torch.get_num_threads())


def compare(shards: Shards, size: int, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return a row for each path at one size of views."""
    recipe = recipe_from(AugmentConfig(image_size_px=size), "same_view")
    rates = in_turn(
        {
            "DataLoader": partial(timed, with_loader, shards, recipe, options),
            "Ray Data": partial(timed, with_ray, shards, recipe, options),
        },
        repeats=options.repeats,
    )
    return [
        (str(size), name, spread(values), f"{median_ratio(values, rates['DataLoader']):.2f}")
        for name, values in rates.items()
    ]


def timed(path, shards: Shards, recipe: ViewRecipe, options: argparse.Namespace) -> float:
    """Return the views per second of one path after its first batches."""
    batches = path(shards, recipe, options)
    for _ in range(options.skip):
        next(batches)
    started = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    elapsed = time.perf_counter() - started
    batches.close()
    return options.batches * options.batch_size / elapsed


def with_ray(
    shards: Shards, recipe: ViewRecipe, options: argparse.Namespace
) -> Iterator[HostBatch]:
    """Return the training worker's batches."""
    plan = EpochPlan(shards.plan_sources, SEED)
    mine = RankPlan(plan=plan, global_batch_size=options.batch_size, stop_step=_steps(options))
    return view_batches(
        shards.index,
        mine,
        recipe,
        seed=SEED,
        data=DATA,
    )


def with_loader(
    shards: Shards, recipe: ViewRecipe, options: argparse.Namespace
) -> Iterator[HostBatch]:
    """Return a DataLoader's batches."""
    length = _steps(options) * options.batch_size
    dataset = PlannedViews(shards, recipe, seed=SEED, length=length, max_pixels=DATA.max_pixels)
    return loader_batches(dataset, batch_size=options.batch_size, processes=options.processes)


def _steps(options: argparse.Namespace) -> int:
    """More than are timed: neither path may run dry, which would show its buffers, not its rate."""
    return 2 * (options.skip + options.batches)


if __name__ == "__main__":
    main()
