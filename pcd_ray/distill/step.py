"""One step of the method: views -> loss and the keys that the queue takes next.

Shapes: B images, D embedding channels, H x W positions, N = H * W, K queued negatives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.distill.loss import contrastive_loss
from pcd_ray.distill.pairing import Pairs, pair_positions, pick
from pcd_ray.distill.teacher import FrozenTeacher, resize_map


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """Views on the training device, as shipped by the data path."""

    student: Tensor
    """(B, S, S, 3) uint8."""
    teacher: Tensor
    """(B, S, S, 3) uint8; the same tensor where one view serves both."""
    student_box: Tensor
    """(B, 5) left, top, width, height in pixels of the original image, and flip."""
    teacher_box: Tensor
    """(B, 5), likewise."""

    def split(self, parts: int) -> list["ViewBatch"]:
        """Cut the batch into equal parts, for gradient accumulation."""
        if parts == 1:
            return [self]
        size = len(self.student) // parts
        shared = self.teacher is self.student
        return [
            ViewBatch(s, s if shared else t, sb, tb)
            for s, t, sb, tb in zip(
                self.student.split(size),
                self.teacher.split(size),
                self.student_box.split(size),
                self.teacher_box.split(size),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What the step needs to know."""

    temperature: float
    implementation: str
    pairing: str
    pairing_radius: float
    autocast: torch.dtype | None = None
    """Data type of the networks' matrix products; None: as the weights are."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives: the loss with its graph, and what metrics and queue need, without."""

    loss: Tensor
    """Scalar, in nats."""
    keys: Tensor
    """(B, D) unit vectors: the teacher's pooled maps."""
    student: Tensor
    """(B, N, D) unit vectors, detached."""
    teacher: Tensor
    """(B, N, D) unit vectors."""
    pairs: Pairs


def distill_step(
    student: nn.Module,
    teacher: FrozenTeacher,
    negatives: Tensor,
    batch: ViewBatch,
    settings: DistillSettings,
) -> StepResult:
    """Compare the student's pixels with the teacher's; update nothing.

    Args:
        student: maps views to (B, D, H, W), wrapped or not.
        teacher: maps views to a map of the same width, on a grid that the student's divides.
        negatives: (K, D) unit vectors of the queue.
        batch: views and where they were cut.
        settings: temperature, pairing and so on.
    """
    device = batch.student.device.type
    with torch.autocast(device, dtype=settings.autocast, enabled=settings.autocast is not None):
        student_map = student(batch.student)  # (B, D, H, W)
        teacher_map = teacher(batch.teacher)  # (B, D, H', W')
    student_map = _at_least_float32(student_map)
    grid = (student_map.shape[2], student_map.shape[3])
    teacher_map = resize_map(_at_least_float32(teacher_map), grid)
    s, t = _unit_pixels(student_map), _unit_pixels(teacher_map)  # (B, N, D)
    pairs = pair_positions(
        settings.pairing,
        batch.student_box,
        batch.teacher_box,
        grid=grid,
        radius=settings.pairing_radius,
    )
    loss = contrastive_loss(
        s.flatten(0, 1),
        pick(t, pairs).flatten(0, 1),
        negatives,
        temperature=settings.temperature,
        implementation=settings.implementation,
        weights=None if pairs.weights is None else pairs.weights.flatten(),
    )
    keys = F.normalize(teacher_map.mean((2, 3)), dim=1)  # (B, D)
    return StepResult(loss, keys, s.detach(), t, pairs)


def _unit_pixels(maps: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, N, D) unit vectors."""
    return F.normalize(maps.flatten(2).transpose(1, 2), dim=2)


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()
