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

    - ``loss_floor``: loss of a perfect student (s = t) on this very step, in nats; 0 for ``mse``;
    - ``loss_above_floor``: the step's loss minus that;
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
    floor = loss_between(positives, positives, negatives, settings, result.shares)
    own = torch.arange(s.shape[1], device=s.device).expand(s.shape[:2])
    target = own if result.pairs.positions is None else result.pairs.positions
    nearest = (s @ result.teacher.transpose(1, 2)).argmax(dim=2)  # (B, N)
    found = {
        names.LOSS_FLOOR: floor,
        names.LOSS_ABOVE_FLOOR: result.loss.detach() - floor,
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

    The floor of the loss and what lies above it are of the weighted sum, as the loss is.
    """
    each = [
        diagnose(result, branch.negatives, branch.settings)
        for result, branch in zip(results, branches, strict=True)
    ]
    found = {
        name: weighted_sum([own[name] for own in each], branches)
        for name in (names.LOSS_FLOOR, names.LOSS_ABOVE_FLOOR)
    }
    for number, own in enumerate(each, start=1):
        alone = len(each) == 1
        found |= {
            names.of_branch(k, number): v for k, v in own.items() if not (alone and k in found)
        }
    return found


def effective_rank(rows: Tensor) -> Tensor:
    """Return exp(entropy) of the normalised singular values of centred (P, D) rows."""
    rows = rows[:: max(1, len(rows) // _RANK_ROWS)].float()
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
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
