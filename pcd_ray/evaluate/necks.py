"""A distilled student with the MHSA neck it was trained with, which export leaves behind."""

from pcd_ray.checkpoint import Checkpoint
from pcd_ray.distill.build import build_student
from pcd_ray.distill.student import Student


def stored_student(stored: Checkpoint) -> Student:
    """Return a checkpoint's student without its heads: backbone and neck, on the CPU, in eval mode.

    The weights are those that are judged: the moving average where there is one. The neck has no
    layers where the run had none.
    """
    student = build_student(stored.config, [])
    parts = ("backbone.", "neck.")
    weights = {k: v for k, v in stored.student_weights().items() if k.startswith(parts)}
    student.load_state_dict(weights)
    return student.eval()
