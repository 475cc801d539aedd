"""Small parts for tests of the training loop: networks, views that follow a plan, settings.

Shapes: B images of a rank's batch, S = 16 pixels per side, D = 6 embedding channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from networks import branch_of, queue_of
from tiny import unit_rows
from torch import Tensor, nn

from pcd_ray.data.plan import EpochPlan, rank_span
from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.heads import MlpShape, mirrored_head
from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.step import DistillSettings
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.train.loop import LoopSettings, StepDone, train_steps
from pcd_ray.train.optim import Schedule, build_optimizer
from pcd_ray.train.state import TrainState, moving_average, wrap_student

CPU = torch.device("cpu")
WIDTH, QUEUE, SIZE_PX = 6, 21, 16
DISTILL = DistillSettings(0.2, "plain", "same_view", 0.7)


class SmallBody(nn.Module):
    """Two convolutions; without BatchNorm, images of a batch do not see one another."""

    def __init__(self, *, batchnorm: bool, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(8, 8, 4, stride=4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.norm(self.first(x)).relu()))


def small_backbone(seed: int, *, batchnorm: bool = False, dropout: float = 0.0) -> Backbone:
    torch.manual_seed(seed)
    body = SmallBody(batchnorm=batchnorm, dropout=dropout)
    return Backbone(body, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), name="small")


def small_teacher(
    dtype: torch.dtype = torch.float32, *, number: int = 0, width: int = WIDTH
) -> FrozenTeacher:
    backbone = small_backbone(2 + 10 * number)
    head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, width))
    return FrozenTeacher(backbone, head, rule="gate").to(dtype)


def new_state(
    *,
    batchnorm: bool = False,
    dropout: float = 0.0,
    optimizer: str = "lars",
    dtype: torch.dtype = torch.float32,
    ema: float = 0.0,
    widths: Sequence[int] = (WIDTH,),
    weights: Sequence[float] = (1.0, 1.0),
    kind: str = "pixel",
) -> TrainState:
    """Return a run at its first step, wrapped for as many ranks as there are.

    It has a teacher for each of ``widths``, and weighs their losses by ``weights``.
    """
    backbone = small_backbone(1, batchnorm=batchnorm, dropout=dropout)
    heads = [mirrored_head(8, [MlpShape((width,))]) for width in widths]
    student = Student(backbone, MhsaNeck(8, depth=1, heads=2), heads).to(dtype)
    average = moving_average(student, decay=ema)
    wrapped = wrap_student(student, device=CPU, compiled=False)
    branches = [
        branch_of(
            small_teacher(dtype, number=number, width=width),
            None if kind == "mse" else queue_of(unit_rows(number, QUEUE, width, dtype)),
            replace(DISTILL, kind=kind),
            weight=weights[number],
        )
        for number, width in enumerate(widths)
    ]
    built = (
        torch.optim.SGD(student.parameters(), lr=0.0)
        if optimizer == "sgd"
        else build_optimizer(optimizer, student, weight_decay=1e-5)
    )
    return TrainState(wrapped.train(), built, branches, average=average)


def loop_settings(*, steps: int, **changes: Any) -> LoopSettings:
    """Return settings of ``steps`` steps of 8 images in epochs of 20, logging at each."""
    values: dict[str, Any] = {
        "schedule": Schedule(0.5, 2.0, steps, 0.0),
        "images_per_epoch": 20,
        "global_batch_size": 8,
        "accumulation_steps": 1,
        "clip_grad_norm": 0.0,
        "log_every_steps": 1,
        "seed": 3,
    }
    return LoopSettings(**(values | changes))


def host_batches(
    settings: LoopSettings, start: int, stop: int, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield a rank's noise views of steps [start, stop), each its epoch's and row's own."""
    plan = plan_of(settings)
    for step in range(start, stop):
        first, last = rank_span(step, rank, num_ranks, settings.global_batch_size)
        epochs, rows = plan.rows(first, last)
        views = [
            np.random.default_rng([epoch, row]).integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8)
            for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True)
        ]
        boxes = np.tile(np.array([0, 0, SIZE_PX, SIZE_PX, 0], np.float32), (len(rows), 1))
        yield {
            "student_view": np.stack(views),
            "student_box": boxes,
            "teacher_box": boxes,
            "row": rows,
            "epoch": epochs,
        }


def plan_of(settings: LoopSettings) -> EpochPlan:
    return EpochPlan(((settings.images_per_epoch, 1.0),), settings.seed)


def steps_of(
    state: TrainState,
    settings: LoopSettings,
    *,
    stop: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[StepDone]:
    """Train from the state's step on, up to step ``stop``."""
    batches = host_batches(settings, state.step, stop, rank=rank, num_ranks=num_ranks)
    return train_steps(state, batches, settings)
