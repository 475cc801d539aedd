"""One step of the method: views -> losses and the keys that the queues take next.

With several teachers (ours) the loss is the weighted sum of what each of them, a branch, gives:

    loss = sum_b w_b * loss_b

Weights are taken as they are given, not normalised to a sum of 1.

What is compared is the kind of the loss: ``pixel`` (PCD) each student pixel with its positive and
the queue, ``image`` the pooled student with the pooled teacher and the queue, ``mse`` each student
pixel with its positive alone.

Shapes: B images, D embedding channels, H x W positions, N = H * W, K queued negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.grids import match_grids
from pcd_ray.distill.loss import contrastive_loss, regression_loss
from pcd_ray.distill.pairing import Pairs, pair_positions, pick
from pcd_ray.distill.teacher import FrozenTeacher, TeacherIdentity


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """Views on the training device, as shipped by the data path."""

    student: Tensor
    """(B, S, S, 3) uint8."""
    teacher: Tensor
    """(B, S, S, 3) uint8; the same tensor where one view serves both, or where no teacher looks."""
    student_box: Tensor
    """(B, 5) left, top, width, height in pixels of the original image, and flip."""
    teacher_box: Tensor
    """(B, 5), likewise."""
    teacher_maps: tuple[Tensor, ...] = ()
    """(B, D, H, W) of each branch, where they are stored; empty: the teachers make them."""

    def split(self, parts: int) -> list["ViewBatch"]:
        """Cut the batch into parts that differ by one image at most, for gradient accumulation."""
        if parts == 1:
            return [self]
        shared = self.teacher is self.student
        maps = [branch.tensor_split(parts) for branch in self.teacher_maps]
        return [
            ViewBatch(s, s if shared else t, sb, tb, tuple(branch[part] for branch in maps))
            for part, (s, t, sb, tb) in enumerate(
                zip(
                    self.student.tensor_split(parts),
                    self.teacher.tensor_split(parts),
                    self.student_box.tensor_split(parts),
                    self.teacher_box.tensor_split(parts),
                    strict=True,
                )
            )
        ]


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What the step needs to know."""

    temperature: float
    """Of the losses with negatives."""
    implementation: str
    """Of the losses with negatives: one of `pcd_ray.distill.loss.IMPLEMENTATIONS`."""
    pairing: str
    pairing_radius: float
    autocast: torch.dtype | None = None
    """Data type of the networks' matrix products; None: as the weights are."""
    grid: tuple[int, int] | None = None
    """H, W on which the loss compares maps; needed where not every position has a positive."""
    grid_rule: str = "pool"
    """How maps of different sizes come to that grid."""
    kind: str = "pixel"
    """One of `pcd_ray.distill.loss.KINDS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One teacher, what it is compared with, and what its comparison counts."""

    name: str = "teacher"
    """Its section of the configuration."""
    teacher: FrozenTeacher
    queue: FeatureQueue | None
    """Its last vectors: all that changes in a branch. None: the loss takes no negatives."""
    settings: DistillSettings
    weight: float = 1.0
    """Weight of its loss in the sum."""
    identity: TeacherIdentity
    law_error: float
    """Relative deviation from SpatialAdaptor's law, in float64."""
    teacher_map: tuple[int, int, int]
    """C, H, W of the teacher's backbone map."""

    @property
    def negatives(self) -> Tensor | None:
        """The queue's (K, D) unit vectors; None: the loss takes none."""
        return None if self.queue is None else self.queue.negatives


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a branch gives: the loss with its graph, and what metrics and queue need, without."""

    loss: Tensor
    """Scalar, in nats, or for ``mse`` a squared distance."""
    keys: Tensor
    """(B, D) unit vectors: the teacher's own maps, pooled before anything resamples them."""
    student: Tensor
    """(B, N, D) unit vectors, detached."""
    teacher: Tensor
    """(B, N, D) unit vectors."""
    pairs: Pairs
    shares: Tensor | None = None
    """(B * N,) share of each position in the loss; None: all have the same."""
    pooled: Tensor | None = None
    """(B, D) unit vectors, detached: the pooled student, where the loss compares it with the keys;
    None: it compares pixels."""


def distill_step(
    student: nn.Module,
    branches: Sequence[Branch],
    batch: ViewBatch,
    *,
    num_pairs: Sequence[Tensor | None] | None = None,
) -> list[StepResult]:
    """Compare the student's pixels with each teacher's; update nothing.

    Args:
        student: maps views to a (B, D, H, W) for each branch, wrapped or not.
        branches: the teachers, in the order of the student's heads.
        batch: views and where they were cut; with stored maps no teacher is run.
        num_pairs: for each branch what its loss's sum is divided by where the batch is a part of a
            larger one, its part of `total_pairs`; None: the batch's own number of pairs.

    Returns:
        The result of each branch, not weighted; `weighted_sum` makes one loss of them.
    """
    device, dtype = batch.student.device.type, branches[0].settings.autocast
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        student_maps = student(batch.student)  # (B, D, H, W) each
        teacher_maps = batch.teacher_maps or [  # (B, D, H', W') each
            branch.teacher(batch.teacher) for branch in branches
        ]
    return [
        _compare(ours, theirs, branch.negatives, batch, branch.settings, count)
        for ours, theirs, branch, count in zip(
            student_maps,
            teacher_maps,
            branches,
            num_pairs or [None] * len(branches),
            strict=True,
        )
    ]


def weighted_sum(values: Sequence[Tensor], branches: Sequence[Branch]) -> Tensor:
    """Return the sum over branches of weight times value, for scalars such as their losses."""
    weighted = [branch.weight * value for value, branch in zip(values, branches, strict=True)]
    return torch.stack(weighted).sum()


def loss_between(
    student: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    settings: DistillSettings,
    shares: Tensor | None,
) -> Tensor:
    """Return the loss of (P, D) unit vectors and their positives, of the settings' kind."""
    if settings.kind == "mse":
        return regression_loss(student, positive, weights=shares)
    assert negatives is not None
    return contrastive_loss(
        student,
        positive,
        negatives,
        temperature=settings.temperature,
        implementation=settings.implementation,
        weights=shares,
    )


def _compare(
    student_map: Tensor,
    teacher_map: Tensor,
    negatives: Tensor | None,
    batch: ViewBatch,
    settings: DistillSettings,
    num_pairs: Tensor | None,
) -> StepResult:
    """Return one branch's result from its (B, D, H, W) and (B, D, H', W') maps."""
    student_map, teacher_map = _at_least_float32(student_map), _at_least_float32(teacher_map)
    keys = _unit_mean(teacher_map)  # (B, D)
    ours, theirs = match_grids(student_map, teacher_map, rule=settings.grid_rule)
    s, t = _unit_pixels(ours), _unit_pixels(theirs)  # (B, N, D)
    pairs = pair_positions(
        settings.pairing,
        batch.student_box,
        batch.teacher_box,
        grid=(ours.shape[2], ours.shape[3]),
        radius=settings.pairing_radius,
    )
    if settings.kind == "image":
        pooled = _unit_mean(student_map)  # (B, D): where pixels lie does not matter
        loss = loss_between(pooled, keys, negatives, settings, None)
        return StepResult(loss, keys, s.detach(), t, pairs, pooled=pooled.detach())
    shares = _shares(pairs, num_pairs, dtype=s.dtype)
    positives = pick(t, pairs).flatten(0, 1)  # (B * N, D)
    loss = loss_between(s.flatten(0, 1), positives, negatives, settings, shares)
    return StepResult(loss, keys, s.detach(), t, pairs, shares)


def _shares(pairs: Pairs, num_pairs: Tensor | None, *, dtype: torch.dtype) -> Tensor | None:
    """Return each position's share (B * N,) in the loss; all are 0 where nothing has a positive."""
    if pairs.weights is None:
        return None
    total = pairs.weights.sum() if num_pairs is None else num_pairs
    total = torch.where(total > 0, total, torch.ones_like(total)).to(dtype)
    return pairs.weights.flatten().to(dtype) / total


def total_pairs(batch: ViewBatch, settings: DistillSettings) -> Tensor | None:
    """Return the number of pairs in the batches of all ranks together; a collective.

    A part of m of all G images is given m / G of it as its number of pairs: the parts' losses,
    weighted by their images, then have the whole global batch's loss as their mean, however it was
    cut. None: every position has a positive, so that images weigh alike anyway.
    """
    if settings.pairing != "cross_view_geometric":
        return None
    assert settings.grid is not None
    pairs = pair_positions(
        settings.pairing,
        batch.student_box,
        batch.teacher_box,
        grid=settings.grid,
        radius=settings.pairing_radius,
    )
    assert pairs.weights is not None
    count = pairs.weights.sum(dtype=torch.float64)  # exact, also after it is shared out
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
    return count


def _unit_pixels(maps: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, N, D) unit vectors."""
    return F.normalize(maps.flatten(2).transpose(1, 2), dim=2)


def _unit_mean(maps: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D) unit vectors of the pooled maps."""
    return F.normalize(maps.mean((2, 3)), dim=1)


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()
