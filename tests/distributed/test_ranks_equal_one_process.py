"""Two ranks of B / 2 images train as one process of B images, and so does accumulation."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from networks import small_student, small_teacher
from ranks import run_on_ranks
from tiny import images, tiny_config, unit_rows

from pcd_ray.distill.build import build_student
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.step import DistillSettings, ViewBatch
from pcd_ray.train.loop import LoopSettings, TrainState, train_step, unwrapped, wrap_student
from pcd_ray.train.optim import Schedule, build_optimizer, set_learning_rate

CPU = torch.device("cpu")
GLOBAL_BATCH, STEPS, WIDTH = 8, 6, 6


def new_state(optimizer: str) -> TrainState:
    student = small_student(width=WIDTH)
    wrapped = wrap_student(student, device=CPU, compiled=False)
    queue = FeatureQueue(21, WIDTH, seed=0, device=CPU)
    queue.negatives = unit_rows(0, 21, WIDTH)
    built = (
        torch.optim.SGD(student.parameters(), lr=0, momentum=0.9)
        if optimizer == "sgd"
        else build_optimizer("lars", student, weight_decay=1e-5)
    )
    set_learning_rate(built, 0.5)
    return TrainState(wrapped, built, queue)


def own_views(step: int) -> ViewBatch:
    """This process's part of the global batch of a step."""
    whole = [images(100 + 2 * step + i, GLOBAL_BATCH, 32) for i in range(2)]
    boxes = torch.ones(GLOBAL_BATCH, 5)
    rank, count = 0, 1
    if torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = [rows.chunk(count)[rank] for rows in (*whole, boxes, boxes)]
    return ViewBatch(*parts)


def trained(optimizer: str, implementation: str, accumulation_steps: int) -> dict[str, Any]:
    state, teacher = new_state(optimizer), small_teacher(width=WIDTH)
    start = unwrapped(state.student).head[0].weight.detach().clone()
    loop = LoopSettings(
        schedule=Schedule(0.5, 0, STEPS, 0.0), images_per_epoch=100, log_every_steps=1, seed=0,
        global_batch_size=GLOBAL_BATCH, accumulation_steps=accumulation_steps, clip_grad_norm=0.0,
    )  # fmt: skip
    distill = DistillSettings(0.2, implementation, "cross_view_index", 0.7)
    losses = []
    for step in range(STEPS):
        views = own_views(step)
        losses.append(train_step(state, teacher, views, distill, loop, watch=False)["loss"].item())
    student = unwrapped(state.student)
    return {
        "weights": {name: p.detach() for name, p in student.named_parameters()},
        "negatives": state.queue.negatives,
        "cursor": state.queue.cursor,
        "losses": np.array(losses),
        "moved": (student.head[0].weight.detach() - start).norm().item(),
    }


@pytest.mark.parametrize(
    ("optimizer", "implementation", "accumulation"),
    [("sgd", "fused", 1), ("lars", "chunked", 2)],
)
def test_two_ranks_of_half_the_batch_train_as_one_process(
    optimizer: str, implementation: str, accumulation: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = trained(optimizer, "plain", 1)
    torch.set_num_threads(threads)
    ranks = run_on_ranks(2, trained, optimizer, implementation, accumulation)
    assert alone["moved"] > 1e-3  # it did train, and the queue wrapped twice
    assert alone["cursor"] == STEPS * GLOBAL_BATCH % 21
    for one, other in pairwise(ranks):  # to the bit: nobody broadcasts weights or queue
        assert torch.equal(one["negatives"], other["negatives"])
        assert all(torch.equal(p, other["weights"][name]) for name, p in one["weights"].items())
    for name, expected in alone["weights"].items():
        # float64: sums in another order, six steps
        torch.testing.assert_close(ranks[0]["weights"][name], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ranks[0]["negatives"], alone["negatives"], rtol=1e-12, atol=1e-14)
    mean = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    np.testing.assert_allclose(mean, alone["losses"], rtol=1e-10)


def steps_of_a_timm_student(backbone: str) -> float:
    config = tiny_config(student={"backbone": backbone, "mhsa": {"heads": 1}})
    student = build_student(config, [MlpShape((WIDTH,))]).train()
    wrapped = wrap_student(student, device=CPU, compiled=False)
    for step in range(3):  # DistributedDataParallel complains of the step before
        wrapped(images(step, 2, 64)).square().mean().backward()
    return float(sum(p.grad.abs().sum() for p in student.head.parameters()))


def test_a_student_with_weights_behind_its_map_trains_on_two_ranks() -> None:
    one, other = run_on_ranks(2, steps_of_a_timm_student, "test_convnext")
    assert one == other > 0
