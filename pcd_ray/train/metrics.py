"""The mean of metrics over ranks, and what they mean in plain words."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pcd_ray import metric_names as names

_NEARLY_CONSTANT = 0.05  # mean distance of unit vectors from their mean; 1 in all directions


def mean_over_ranks(values: Mapping[str, Tensor], *, weight: float = 1.0) -> dict[str, float]:
    """Average scalars over ranks; the only host synchronisation of a logging step.

    Args:
        values: this rank's.
        weight: of this rank; the mean over ranks is 1.
    """
    stacked = torch.stack([value.detach().float() for value in values.values()]) * weight
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


@dataclass(slots=True)
class NewestScores:
    """The newest value of each score, and which of them were measured at a step itself."""

    values: dict[str, float] = field(default_factory=dict)
    _step: int = -1
    _measured: list[str] = field(default_factory=list)

    def add(self, step: int, scores: Mapping[str, float]) -> None:
        """Take up what has been measured at a step."""
        self.values |= scores
        self._step, self._measured = step, sorted(scores)

    def of_step(self, step: int) -> list[str]:
        """Return the names of the scores that were measured at this step."""
        return self._measured if step == self._step else []


def warnings_of(metrics: Mapping[str, float]) -> list[str]:
    """Say in plain words what a line of metrics shows that a user should know."""
    found = []
    fill = metrics.get(names.QUEUE_FILL, 100.0)  # a loss without negatives has no queue
    if fill < 100:
        found.append(
            f"the queue is {fill:.0f}% full: until it is, the loss may rise "
            "while the student learns"
        )
    if (spread := metrics[names.STUDENT_SPREAD]) < _NEARLY_CONSTANT:
        found.append(
            f"the student's features are nearly constant (spread {spread:.3f}): "
            "lower optim.base_lr or lengthen optim.warmup_epochs"
        )
    for number, teacher in enumerate(("teacher", "teacher_2"), start=1):
        spread = metrics.get(names.of_branch(names.TEACHER_SPREAD, number), 1.0)
        if spread < _NEARLY_CONSTANT:
            found.append(
                f"the {teacher}'s features are nearly constant (spread {spread:.3f}): check "
                f"{teacher}.weights, {teacher}.mean and {teacher}.std, or use {teacher}.head=pca"
            )
    return found
