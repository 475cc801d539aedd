"""What tells, without labels, whether a student is learning: measured at logging steps alone.

Shapes: B images, D embedding channels, N positions, K queued negatives.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray import metric_names as names
from pcd_ray.distill.pairing import pick
from pcd_ray.distill.step import (
    Branch,
    DistillSettings,
    StepResult,
    loss_between,
    weighted_sum,
)

_RANK_ROWS = 2048  # rows that an effective rank is computed from: enough for D = 256


@torch.no_grad()
def diagnose(
    result: StepResult, negatives: Tensor | None, settings: DistillSettings
) -> dict[str, Tensor]:
    """Return scalars that describe a step, before its keys are pushed, by their public names.

    - ``loss_at_teacher``: loss where the student equals the teacher (s = t) on this very step, in
      nats; 0 for ``mse``. With negatives it is not the minimum: a student a little farther from the
      queue than the teacher is has less;
    - ``loss_above_teacher``: the step's loss minus that; it may end below 0;
    - ``positive_cosine``, ``negative_cosine``: mean cosine of what the loss compares, pixels or
      for ``image`` pooled students, to positives, to the queue;
    - ``queue_top1_pct``: share of pooled students nearer to their own key than to the queue;
    - ``pixel_top1_pct``: share of student pixels whose nearest pixel in the teacher's map of the
      same image is their positive (chance is 100 / N);
    - ``effective_rank``: exp of the entropy of the spectrum of student pixels, 1 to D;
    - ``student_spread``, ``teacher_spread``: mean distance from the mean pixel, 0 for constant
      features, near 1 for features in all directions;
    - ``map_spread``: the same within each student map: 0 when all its pixels are alike.

    Without negatives nothing is said of the queue.
    """
    s, t = result.student, pick(result.teacher, result.pairs)  # (B, N, D)
    weights = result.pairs.weights
    counted = torch.ones_like(s[..., 0]) if weights is None else weights  # (B, N)
    total = counted.sum().clamp(min=1)
    compared, positives = s.flatten(0, 1), t.flatten(0, 1)  # (P, D)
    cosine = ((s * t).sum(dim=2) * counted).sum() / total
    if result.pooled is not None:
        compared, positives = result.pooled, result.keys
        cosine = (compared * positives).sum(dim=1).mean()
    at_teacher = loss_between(positives, positives, negatives, settings, result.shares)
    own = torch.arange(s.shape[1], device=s.device).expand(s.shape[:2])
    target = own if result.pairs.positions is None else result.pairs.positions
    nearest = (s @ result.teacher.transpose(1, 2)).argmax(dim=2)  # (B, N)
    found = {
        names.LOSS_AT_TEACHER: at_teacher,
        names.LOSS_ABOVE_TEACHER: result.loss.detach() - at_teacher,
        names.POSITIVE_COSINE: cosine,
        names.PIXEL_TOP1: 100 * ((nearest == target) * counted).sum() / total,
        names.EFFECTIVE_RANK: effective_rank(s.flatten(0, 1)),
        names.STUDENT_SPREAD: spread(s.flatten(0, 1)),
        names.TEACHER_SPREAD: spread(result.teacher.flatten(0, 1)),
        names.MAP_SPREAD: (s - s.mean(dim=1, keepdim=True)).norm(dim=2).mean(),
    }
    if negatives is not None:
        pooled = F.normalize(s.mean(dim=1), dim=1) if result.pooled is None else result.pooled
        found[names.NEGATIVE_COSINE] = (compared @ negatives.mean(dim=0)).mean()
        found[names.QUEUE_TOP1] = 100 * _queue_top1(pooled, result.keys, negatives)
    return found


def diagnose_branches(
    results: Sequence[StepResult], branches: Sequence[Branch]
) -> dict[str, Tensor]:
    """Return what `diagnose` says of each branch, by the names of `metric_names.of_branch`.

    The loss at s = t and the loss's distance from it are of the weighted sum, as the loss is.
    """
    each = [
        diagnose(result, branch.negatives, branch.settings)
        for result, branch in zip(results, branches, strict=True)
    ]
    found = {
        name: weighted_sum([own[name] for own in each], branches)
        for name in (names.LOSS_AT_TEACHER, names.LOSS_ABOVE_TEACHER)
    }
    for number, own in enumerate(each, start=1):
        alone = len(each) == 1
        found |= {
            names.of_branch(k, number): v for k, v in own.items() if not (alone and k in found)
        }
    return found


def effective_rank(rows: Tensor) -> Tensor:
    """Return exp(entropy) of the normalized singular values of centered (P, D) rows.

    Of many rows a random sample counts, the same one each time for the same number of rows.
    """
    if len(rows) > _RANK_ROWS:
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[shuffled[:_RANK_ROWS].to(rows.device)]
    centered = rows.double() - rows.double().mean(
        dim=0
    )  # eigenvalues are squares: float32 is short
    values = torch.linalg.eigvalsh(centered.T @ centered).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-6)  # rounding of constant unit vectors is no rank
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def spread(rows: Tensor) -> Tensor:
    """Return the mean distance of (P, D) unit vectors from their mean."""
    distance: Tensor = (rows - rows.mean(dim=0)).norm(dim=1).mean()
    return distance


def chance_loss(kind: str, queue_size: int) -> float:
    """Return the loss of vectors at right angles to all others: log(1 + K) nats, for ``mse`` 2."""
    return 2.0 if kind == "mse" else math.log1p(queue_size)


def _queue_top1(pooled: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    own = (pooled * keys).sum(dim=1)  # (B,)
    best = (pooled @ negatives.T).amax(dim=1)  # (B,)
    return (own > best).float().mean()
