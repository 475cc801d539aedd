"""Public names of metrics, ``area/name_unit``, in logs, checkpoints and figures alike."""

LOSS = "train/loss"
LOSS_AT_TEACHER = "train/loss_at_teacher"
LOSS_ABOVE_TEACHER = "train/loss_above_teacher"
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
SEGMENTATION_MIOU = "eval/segmentation_miou_pct"

SCORES = {"knn_top1": KNN_TOP1, "segmentation_miou": SEGMENTATION_MIOU}
"""What a configuration calls the scores that a run may take while it trains."""
_OF_THE_SUM = (LOSS, LOSS_AT_TEACHER, LOSS_ABOVE_TEACHER)  # weighted, over all teachers


def of_branch(name: str, number: int) -> str:
    """Return the name of what describes one of several teachers, counted from 1.

    The first teacher's keep their names, but where these are the sum's: ``train/pixel_top1_pct``
    and ``train/pixel_top1_pct_2``, ``train/loss_1`` and ``train/loss_2``.
    """
    return name if number == 1 and name not in _OF_THE_SUM else f"{name}_{number}"
