"""What happens where the student's and the teacher's maps differ in size.

- ``pool``: each of the student's cells takes the mean of the teacher's map over its area;
- ``interpolate``: the teacher's map is sampled at the centres of the student's cells, then moved
  as a whole so that its mean stays;
- ``upsample``: the student's map is enlarged to the teacher's grid, the teacher's is left alone.

The law of all three (ours): on the grid of the loss, the mean of the teacher's map is that of its
own map, and so SpatialAdaptor's law holds there too. Besides, where ``upsample`` enlarges by a
whole factor, it keeps the student's mean; otherwise borders count a little more or less.

Shapes: B images, D embedding channels, H x W positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.errors import ConfigError

RULES = ("pool", "interpolate", "upsample")

Grid = tuple[int, int]


def loss_grid(student: Grid, teacher: Grid, *, rule: str) -> Grid:
    """Return the grid on which the loss compares pixels.

    Raises:
        ConfigError: the teacher's map is the smaller one, and the rule does not make maps larger.
    """
    if rule != "interpolate" and (teacher[0] < student[0] or teacher[1] < student[1]):
        raise ConfigError(
            f"the teacher's map is {teacher[0]} x {teacher[1]} and the student's {student[0]} x "
            f"{student[1]}, but student.grid={rule} takes a teacher's map that is at least as large"
            "; set student.grid=interpolate, a larger student.output_stride, or a finer teacher "
            "(teacher.kwargs)"
        )
    return teacher if rule == "upsample" else student


def match_grids(student: Tensor, teacher: Tensor, *, rule: str) -> tuple[Tensor, Tensor]:
    """Return both maps, (B, D, H, W) each, on the grid of the loss.

    Args:
        student: (B, D, H, W); gradients flow through it.
        teacher: (B, D, H', W').
        rule: one of `RULES`.
    """
    own, other = _grid(student), _grid(teacher)
    grid = loss_grid(own, other, rule=rule)
    if own == other:
        return student, teacher
    if rule == "upsample":
        return F.interpolate(student, size=grid, mode="bilinear"), teacher
    if rule == "interpolate":
        return student, _interpolate(teacher, grid)
    return student, area_mean(teacher, grid)


def area_mean(maps: Tensor, grid: Grid) -> Tensor:
    """Average (B, D, H, W) maps over the cells of a coarser grid, by area; the mean is kept."""
    own = _grid(maps)
    if own[0] % grid[0] == 0 and own[1] % grid[1] == 0:
        return F.adaptive_avg_pool2d(maps, grid)
    # torch's pooling lets cells overlap where grids do not divide, which moves the mean
    down, across = (_shared(fine, coarse, maps) for fine, coarse in zip(own, grid, strict=True))
    return torch.einsum("yh,bdhw,xw->bdyx", down, maps, across)


def _interpolate(maps: Tensor, grid: Grid) -> Tensor:
    sampled = F.interpolate(maps, size=grid, mode="bilinear", antialias=True)
    moved: Tensor = sampled + (maps.mean((2, 3), keepdim=True) - sampled.mean((2, 3), keepdim=True))
    return moved


def _shared(fine: int, coarse: int, like: Tensor) -> Tensor:
    """Return (coarse, fine): the share of each fine cell in each coarse cell's length."""
    ends = (
        torch.arange(fine + 1, device=like.device) * coarse
    )  # whole numbers: fine * coarse in all
    marks = torch.arange(coarse + 1, device=like.device) * fine
    until = torch.minimum(marks[1:, None], ends[None, 1:])
    since = torch.maximum(marks[:-1, None], ends[None, :-1])
    return (until - since).clamp(min=0).to(like.dtype) / fine


def _grid(maps: Tensor) -> Grid:
    return maps.shape[2], maps.shape[3]
