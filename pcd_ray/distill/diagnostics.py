"""What tells, without labels, whether a student is learning: measured at logging steps alone.

Shapes: B images, D embedding channels, N positions, K queued negatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.distill.loss import contrastive_loss
from pcd_ray.distill.pairing import pick
from pcd_ray.distill.step import DistillSettings, StepResult

_RANK_ROWS = 2048  # rows that an effective rank is computed from: enough for D = 256


@torch.no_grad()
def diagnose(result: StepResult, negatives: Tensor, settings: DistillSettings) -> dict[str, Tensor]:
    """Return scalars that describe a step, before its keys are pushed.

    - ``loss_above_floor``: loss minus that of a perfect student (s = t), in nats;
    - ``positive_cosine``, ``negative_cosine``: mean cosine to positives, to the queue;
    - ``queue_top1_pct``: share of pooled students nearer to their own key than to the queue;
    - ``pixel_top1_pct``: share of student pixels whose nearest pixel in the teacher's map of the
      same image is their positive (chance is 100 / N);
    - ``effective_rank``: exp of the entropy of the spectrum of student pixels, 1 to D;
    - ``student_spread``, ``teacher_spread``: mean distance from the mean pixel, 0 for constant
      features, near 1 for features in all directions;
    - ``map_spread``: the same within each student map: 0 when all its pixels are alike.
    """
    s, t = result.student, pick(result.teacher, result.pairs)  # (B, N, D)
    weights = result.pairs.weights
    counted = torch.ones_like(s[..., 0]) if weights is None else weights  # (B, N)
    total = counted.sum().clamp(min=1)
    floor = contrastive_loss(
        t.flatten(0, 1),
        t.flatten(0, 1),
        negatives,
        temperature=settings.temperature,
        implementation=settings.implementation,
        weights=counted.flatten(),
    )
    cosine = (s * t).sum(dim=2)  # (B, N)
    own = torch.arange(s.shape[1], device=s.device).expand(s.shape[:2])
    target = own if result.pairs.positions is None else result.pairs.positions
    nearest = (s @ result.teacher.transpose(1, 2)).argmax(dim=2)  # (B, N)
    return {
        "loss_above_floor": result.loss.detach() - floor,
        "positive_cosine": (cosine * counted).sum() / total,
        "negative_cosine": (s.flatten(0, 1) @ negatives.mean(dim=0)).mean(),
        "queue_top1_pct": 100 * _queue_top1(s, result.keys, negatives),
        "pixel_top1_pct": 100 * ((nearest == target) * counted).sum() / total,
        "effective_rank": effective_rank(s.flatten(0, 1)),
        "student_spread": spread(s.flatten(0, 1)),
        "teacher_spread": spread(result.teacher.flatten(0, 1)),
        "map_spread": (s - s.mean(dim=1, keepdim=True)).norm(dim=2).mean(),
    }


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


def chance_loss(queue_size: int) -> float:
    """Return the loss of a student that knows nothing: log(1 + K), in nats."""
    return math.log1p(queue_size)


def _queue_top1(student: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    pooled = F.normalize(student.mean(dim=1), dim=1)  # (B, D)
    own = (pooled * keys).sum(dim=1)  # (B,)
    best = (pooled @ negatives.T).amax(dim=1)  # (B,)
    return (own > best).float().mean()
