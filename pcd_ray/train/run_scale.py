"""Config and networks -> what the run asks of a cluster, with what can be measured here."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from pcd_ray.config import Config
from pcd_ray.data.augment import views_of_bytes
from pcd_ray.data.image_index import column
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import Shards
from pcd_ray.distill.build import Method
from pcd_ray.distill.step import Branch
from pcd_ray.train.scale import Machines, Workload

OPTIMIZER_COPIES = {"lars": 1, "adamw": 2}
"""What each optimiser keeps, in copies of the weights that it trains."""


def workload_of(config: Config, shards: Shards, method: Method) -> Workload:
    """Count what a run trains and moves."""
    recipe = recipe_from(config.augment, config.pairing.kind)
    stored = bool(config.teacher.cache.views)
    train, data = config.train, config.data
    queued = [branch for branch in method.branches if branch.negatives is not None]
    return Workload(
        images=shards.num_images,
        images_per_epoch=EpochPlan(shards.plan_sources, config.run.seed).images_per_epoch,
        epochs=train.epochs,
        image_bytes=float(column(shards.index, "size").mean()),
        index_bytes=shards.index.nbytes / shards.num_images,
        image_size_px=config.augment.image_size_px,
        views=2 if recipe.two_colours and not stored else 1,
        map_bytes=2 * sum(map(map_numbers, method.branches)) if stored else 0,
        images_per_task=data.images_per_task,
        blocks_ahead=-(
            -data.prefetch_batches * train.batch_size_per_worker // data.images_per_task
        ),
        global_batch_size=train.global_batch_size,
        num_workers=train.max_workers,
        trained_weights=trained_weights(method.student),
        student_bytes=sum(tensor.nbytes for tensor in method.student.state_dict().values()),
        optimizer_copies=OPTIMIZER_COPIES[config.optim.name],
        average=bool(config.student.ema),
        key_width=sum(branch.teacher.width(branch.teacher_map[0]) for branch in queued),
        queue_bytes=sum(b.negatives.nbytes for b in queued if b.negatives is not None),
    )


def machines_of(config: Config, sample: Sequence[bytes]) -> Machines:
    """Return the machines of section ``scale``; what it leaves open is measured on a sample."""
    scale = config.scale
    return Machines(
        cpu_ms_per_image=scale.cpu_ms_per_image or measured_cpu_ms(config, sample),
        images_per_s_per_worker=scale.images_per_s_per_worker,
        network_gbit_per_s=scale.network_gbit_per_s,
        workers_per_node=scale.workers_per_node,
        data_node_cores=scale.data_node_cores,
    )


def measured_cpu_ms(config: Config, sample: Sequence[bytes]) -> float:
    """Return the CPU time, in ms, of turning an encoded image into its views on this machine."""
    recipe = replace(
        recipe_from(config.augment, config.pairing.kind),
        teacher_rendered=not config.teacher.cache.views,
    )

    def made(number: int, content: bytes) -> None:
        views_of_bytes(content, recipe, number, max_pixels=config.data.max_pixels)

    made(0, sample[0])  # tables are built and libraries loaded with the first
    started = time.thread_time()
    for number, content in enumerate(sample):
        made(number, content)
    return 1000 * (time.thread_time() - started) / len(sample)


def trained_weights(module: nn.Module) -> int:
    """Return the number of weights that are trained."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def map_numbers(branch: Branch) -> int:
    """Return D * H * W of a teacher's adapted map."""
    channels, height, width = branch.teacher_map
    return branch.teacher.width(channels) * height * width
