"""Which teacher position is the positive of which student position.

``same_view`` (ours) and ``cross_view_index`` (the released code) pair position i with position i;
they differ in the views that the networks are fed: one crop, or two. ``cross_view_geometric``
(ours) feeds two crops and pairs positions by where they lie in the original image.

Shapes: B images, N = H * W positions. Boxes are (B, 5): left, top, width, height in pixels of the
original image, and 1 for a horizontal flip.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("same_view", "cross_view_index", "cross_view_geometric")


@dataclass(frozen=True, slots=True)
class Pairs:
    """The positive of each student position."""

    positions: Tensor | None
    """(B, N) teacher position of each student position; None pairs i with i."""
    weights: Tensor | None
    """(B, N) 1 where a student position has a positive, else 0; None: all have."""


def pair_positions(
    kind: str,
    student_box: Tensor,
    teacher_box: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
) -> Pairs:
    """Return the pairs of two (H, W) maps.

    Args:
        kind: one of `KINDS`.
        student_box: (B, 5) crop and flip of the student's views.
        teacher_box: (B, 5) crop and flip of the teacher's views.
        grid: height and width of both maps, in positions.
        radius: ``cross_view_geometric``: a student position is paired with the nearest teacher
            position when their centres lie closer than this many diagonals of the larger cell.
    """
    if kind != "cross_view_geometric":
        return Pairs(None, None)
    student_centres, student_diagonal = _centres(student_box, grid)  # (B, N, 2), (B,)
    teacher_centres, teacher_diagonal = _centres(teacher_box, grid)
    distances = torch.cdist(
        student_centres, teacher_centres, compute_mode="donot_use_mm_for_euclid_dist"
    )  # (B, N, N)
    nearest, positions = distances.min(dim=2)  # (B, N)
    limit = radius * torch.maximum(student_diagonal, teacher_diagonal)
    return Pairs(positions, (nearest < limit[:, None]).to(nearest.dtype))


def pick(teacher: Tensor, pairs: Pairs) -> Tensor:
    """Return the positives (B, N, D) of each student position from (B, N, D) teacher pixels."""
    if pairs.positions is None:
        return teacher
    return teacher.gather(1, pairs.positions.unsqueeze(2).expand(-1, -1, teacher.shape[2]))


def _centres(box: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return cell centres (B, N, 2) in the original image and the cell diagonals (B,)."""
    left, top, width, height, flip = box.unbind(1)
    rows, columns = grid
    x = (torch.arange(columns, device=box.device) + 0.5) / columns  # (W,)
    y = (torch.arange(rows, device=box.device) + 0.5) / rows  # (H,)
    x = torch.where(flip[:, None] > 0.5, 1 - x, x)  # (B, W): a flipped view runs right to left
    x = left[:, None] + x * width[:, None]
    y = top[:, None] + y * height[:, None]  # (B, H)
    centres = torch.stack(
        [x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], dim=3
    )
    return centres.flatten(1, 2), torch.hypot(width / columns, height / rows)
