"""R ranks of about B / R images train as one process of B images, and so does accumulation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from networks import branch_of, queue_of, small_student, small_teacher
from ranks import run_on_ranks
from tiny import images, tiny_config, unit_rows

from pcd_ray import metric_names as names
from pcd_ray.data.plan import rank_sizes, rank_span
from pcd_ray.distill.build import build_student
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.step import DistillSettings, ViewBatch
from pcd_ray.train.loop import LoopSettings, train_step
from pcd_ray.train.optim import Schedule, build_optimizer, set_learning_rate
from pcd_ray.train.state import TrainState, unwrapped, wrap_student

CPU = torch.device("cpu")
STEPS, WIDTH = 6, 6


def new_state(
    kind: str, optimizer: str, implementation: str, pairing: str, weights: Sequence[float]
) -> TrainState:
    """A run with a teacher for each weight, each of another width and grid."""
    widths = [WIDTH + number for number in range(len(weights))]
    student = small_student(widths=widths)
    grid = tuple(student(images(0, 1, 32))[0].shape[2:])
    distill = DistillSettings(0.2, implementation, pairing, 0.7, grid=grid, kind=kind)
    wrapped = wrap_student(student, device=CPU, compiled=False)
    branches = [
        branch_of(
            small_teacher(number, stride=8 // (number + 1), width=width),
            None if kind == "mse" else queue_of(unit_rows(number, 21, width)),
            distill,
            weight=weight,
        )
        for number, (width, weight) in enumerate(zip(widths, weights, strict=True))
    ]
    built = (
        torch.optim.SGD(student.parameters(), lr=0, momentum=0.9)
        if optimizer == "sgd"
        else build_optimizer("lars", student, weight_decay=1e-5)
    )
    set_learning_rate(built, 0.5)
    return TrainState(wrapped, built, branches)


def own_views(step: int, batch: int) -> ViewBatch:
    """This process's part of the global batch of a step."""
    whole = [images(100 + 2 * step + i, batch, 32) for i in range(2)]
    # crops that overlap less from image to image: parts of a batch have unlike numbers of pairs
    boxes = torch.tensor([[0.0, 0, 32, 32, 0]]).repeat(batch, 1)
    others = boxes + torch.arange(batch)[:, None] * torch.tensor([4.0, 2, 0, 0, 0])
    rank, count = 0, 1
    if torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = slice(*rank_span(0, rank, count, batch))
    return ViewBatch(*(rows[mine] for rows in (*whole, boxes, others)))


def trained(
    kind: str,
    optimizer: str,
    implementation: str,
    pairing: str,
    accumulation_steps: int,
    weights: Sequence[float],
    batch: int,
) -> dict[str, Any]:
    state = new_state(kind, optimizer, implementation, pairing, weights)
    start = unwrapped(state.student).heads[0][0].weight.detach().clone()
    loop = LoopSettings(
        schedule=Schedule(0.5, 0, STEPS, 0.0), images_per_epoch=100, log_every_steps=1, seed=0,
        global_batch_size=batch, accumulation_steps=accumulation_steps, clip_grad_norm=0.0,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        views = own_views(step, batch)
        losses.append(train_step(state, views, loop, watch=False)[names.LOSS].item())
    student = unwrapped(state.student)
    return {
        "weights": {name: p.detach() for name, p in student.named_parameters()},
        "negatives": [branch.queue.negatives for branch in state.branches if branch.queue],
        "cursors": [branch.queue.cursor for branch in state.branches if branch.queue],
        "losses": np.array(losses),
        "moved": (student.heads[0][0].weight.detach() - start).norm().item(),
    }


@pytest.mark.parametrize(
    ("ranks", "batch", "kind", "optimizer", "implementation", "pairing", "accumulation", "weights"),
    [
        (2, 8, "pixel", "sgd", "fused", "cross_view_index", 1, [1.0]),
        (2, 8, "pixel", "lars", "chunked", "same_view", 2, [1.0]),
        (2, 8, "pixel", "sgd", "plain", "cross_view_geometric", 2, [1.0]),
        (2, 8, "pixel", "sgd", "fused", "cross_view_geometric", 2, [0.7, 1.5]),
        (2, 8, "image", "sgd", "fused", "cross_view_index", 2, [0.7, 1.5]),
        (2, 8, "mse", "lars", "plain", "cross_view_geometric", 2, [0.7, 1.5]),
        # 2, 2 and 3 images, in passes of 1 and 1, 1 and 1, 2 and 1; and 1, 1 and 2 images
        (3, 7, "pixel", "sgd", "fused", "cross_view_geometric", 2, [0.7, 1.5]),
        (3, 4, "image", "lars", "plain", "cross_view_index", 1, [1.0]),
    ],
)
def test_ranks_of_parts_of_the_batch_train_as_one_process(
    ranks: int,
    batch: int,
    kind: str,
    optimizer: str,
    implementation: str,
    pairing: str,
    accumulation: int,
    weights: list[float],
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = trained(kind, optimizer, "plain", pairing, 1, weights, batch)
    torch.set_num_threads(threads)
    found = run_on_ranks(
        ranks, trained, kind, optimizer, implementation, pairing, accumulation, weights, batch
    )
    assert alone["moved"] > 1e-3  # it did train, and the queue wrapped
    queues = 0 if kind == "mse" else len(weights)
    assert alone["cursors"] == [STEPS * batch % 21] * queues
    for one, other in pairwise(found):  # to the bit: nobody broadcasts weights or queue
        for queue, same in zip(one["negatives"], other["negatives"], strict=True):
            assert torch.equal(queue, same)
        assert all(torch.equal(p, other["weights"][name]) for name, p in one["weights"].items())
    for name, expected in alone["weights"].items():
        # float64: sums in another order, six steps
        torch.testing.assert_close(found[0]["weights"][name], expected, rtol=1e-10, atol=1e-12)
    for queue, expected in zip(found[0]["negatives"], alone["negatives"], strict=True):
        torch.testing.assert_close(queue, expected, rtol=1e-12, atol=1e-14)
    shares = np.array(rank_sizes(ranks, batch)) / batch
    mean = shares @ np.stack([rank["losses"] for rank in found])
    np.testing.assert_allclose(mean, alone["losses"], rtol=1e-10)


def steps_of_a_timm_student(backbone: str) -> float:
    config = tiny_config(student={"backbone": backbone, "mhsa": {"heads": 1}})
    student = build_student(config, [[MlpShape((WIDTH,))]]).train()
    wrapped = wrap_student(student, device=CPU, compiled=False)
    for step in range(3):  # DistributedDataParallel complains of the step before
        wrapped(images(step, 2, 64))[0].square().mean().backward()
    return float(sum(p.grad.abs().sum() for p in student.heads[0].parameters()))


def test_a_student_with_weights_behind_its_map_trains_on_two_ranks() -> None:
    one, other = run_on_ranks(2, steps_of_a_timm_student, "test_convnext")
    assert one == other > 0
