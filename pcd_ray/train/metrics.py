"""Names of metrics, their mean over ranks, and what they mean in plain words."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

LOSS = "train/loss"
LOSS_ABOVE_FLOOR = "train/loss_above_floor"
POSITIVE_COSINE = "train/positive_cosine"
NEGATIVE_COSINE = "train/negative_cosine"
QUEUE_TOP1 = "train/queue_top1_pct"
PIXEL_TOP1 = "train/pixel_top1_pct"
EFFECTIVE_RANK = "train/effective_rank"
STUDENT_SPREAD = "train/student_spread"
TEACHER_SPREAD = "train/teacher_spread"
MAP_SPREAD = "train/map_spread"
QUEUE_FILL = "train/queue_fill_pct"
LEARNING_RATE = "optim/lr"
GRAD_NORM = "optim/grad_norm"
STEP_S = "time/step_s"
DATA_WAIT_S = "time/data_wait_s"
DATA_WAIT = "time/data_wait_pct"
IMAGES_PER_S = "throughput/images_per_s_global"
PEAK_GIB = "memory/peak_gib"
KNN_TOP1 = "eval/knn_top1_pct"
KNN1_TOP1 = "eval/knn_k1_top1_pct"

_NEARLY_CONSTANT = 0.05  # mean distance of unit vectors from their mean; 1 in all directions


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average scalars over ranks; the only host synchronisation of a logging step."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def warnings_of(metrics: Mapping[str, float]) -> list[str]:
    """Say in plain words what a line of metrics shows that a user should know."""
    found = []
    if metrics[QUEUE_FILL] < 100:
        found.append(
            f"the queue is {metrics[QUEUE_FILL]:.0f}% full: until it is, the loss may rise while "
            "the student learns"
        )
    if metrics[STUDENT_SPREAD] < _NEARLY_CONSTANT:
        found.append(
            f"the student's features are nearly constant (spread {metrics[STUDENT_SPREAD]:.3f}): "
            "lower optim.base_lr or lengthen optim.warmup_epochs"
        )
    if metrics[TEACHER_SPREAD] < _NEARLY_CONSTANT:
        found.append(
            f"the teacher's features are nearly constant (spread {metrics[TEACHER_SPREAD]:.3f}): "
            "check teacher.weights, teacher.mean and teacher.std, or use teacher.head=pca"
        )
    return found
