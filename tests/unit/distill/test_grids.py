import itertools

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from networks import one_step, small_student, small_teacher
from tiny import images, unit_rows
from torch import Tensor

from pcd_ray.distill.grids import RULES, area_mean, loss_grid, match_grids
from pcd_ray.distill.step import DistillSettings, ViewBatch, total_pairs
from pcd_ray.errors import ConfigError

SIZES = [(8, 8), (6, 9), (7, 5), (16, 16), (3, 4)]


def maps(seed: int, height: int, width: int) -> Tensor:
    """Return (2, 5, height, width) in float64: the laws are exact up to rounding."""
    return unit_rows(seed, 10, height * width).view(2, 5, height, width)


def larger(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] >= other[0] and one[1] >= other[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("own", "other"), itertools.product(SIZES, SIZES))
def test_the_teachers_mean_is_kept(rule: str, own: tuple[int, int], other: tuple[int, int]) -> None:
    student, teacher = maps(0, *own), maps(1, *other)
    if rule != "interpolate" and not larger(other, own):
        with pytest.raises(ConfigError, match=rf"{other[0]} x {other[1]} and .* {own[0]} x"):
            match_grids(student, teacher, rule=rule)
        return
    s, t = match_grids(student, teacher, rule=rule)
    assert s.shape == t.shape == (2, 5, *loss_grid(own, other, rule=rule))
    assert tuple(s.shape[2:]) == (other if rule == "upsample" else own)
    torch.testing.assert_close(t.mean((2, 3)), teacher.mean((2, 3)), rtol=1e-13, atol=1e-15)
    assert (t is teacher) == (rule == "upsample" or own == other)
    assert (s is student) == (rule != "upsample" or own == other)


@pytest.mark.parametrize("rule", RULES)
def test_maps_of_one_size_are_themselves(rule: str) -> None:
    student, teacher = maps(0, 3, 4), maps(1, 3, 4)
    s, t = match_grids(student, teacher, rule=rule)
    assert s is student
    assert t is teacher


def test_averages_over_whole_blocks_are_the_references() -> None:
    for fine, coarse in (((8, 8), (4, 4)), ((6, 9), (2, 3)), ((4, 6), (1, 1))):
        found, expected = (
            area_mean(maps(0, *fine), coarse),
            reference.shrink(maps(0, *fine).numpy(), coarse),
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("fine", "coarse"), [((16, 16), (7, 7)), ((5, 4), (3, 4)), ((9, 7), (2, 5))]
)
def test_averages_by_area_are_blocks_of_a_common_finer_grid(
    fine: tuple[int, int], coarse: tuple[int, int]
) -> None:
    teacher = maps(0, *fine)
    # each cell cut into as many pieces as the coarse grid has cells: then whole blocks fit
    pieces = teacher.repeat_interleave(coarse[0], 2).repeat_interleave(coarse[1], 3)
    expected = F.avg_pool2d(pieces, fine)
    torch.testing.assert_close(area_mean(teacher, coarse), expected, rtol=1e-13, atol=1e-15)
    overlapping = F.adaptive_avg_pool2d(teacher, coarse)
    assert (overlapping.mean((2, 3)) - teacher.mean((2, 3))).abs().max() > 1e-4


def test_interpolation_samples_a_slope_where_the_cells_are() -> None:
    def slope(height: int, width: int) -> Tensor:
        y, x = (((torch.arange(n) + 0.5) / n).double() for n in (height, width))
        return (y[:, None] + 3 * x).expand(2, 5, -1, -1)

    _, t = match_grids(slope(3, 4), slope(6, 8), rule="interpolate")
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # borders are clamped
    torch.testing.assert_close(t[inner], slope(3, 4)[inner], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [2, 3])
def test_enlarging_by_a_whole_factor_keeps_the_students_mean_and_its_slopes(factor: int) -> None:
    student = maps(0, 4, 5).requires_grad_()
    s, _ = match_grids(student, maps(1, 4 * factor, 5 * factor), rule="upsample")
    torch.testing.assert_close(s.mean((2, 3)), student.mean((2, 3)), rtol=1e-13, atol=1e-15)
    (gradient,) = torch.autograd.grad(s.sum(), student)
    torch.testing.assert_close(gradient, torch.full_like(gradient, factor**2))


def views(count: int = 4) -> ViewBatch:
    box = torch.tensor([[0.0, 0, 32, 32, 0]]).expand(count, 5)
    other = box + torch.arange(count)[:, None] * torch.tensor([6.0, 3, 0, 0, 0])
    return ViewBatch(images(10, count, 32), images(11, count, 32), box, other)


def settings(rule: str, grid: tuple[int, int], pairing: str = "same_view") -> DistillSettings:
    return DistillSettings(0.2, "plain", pairing, 0.7, grid=grid, grid_rule=rule)


@pytest.mark.parametrize(("rule", "teacher_stride"), [
    ("pool", 4), ("interpolate", 4), ("upsample", 4), ("interpolate", 16),
])  # fmt: skip
def test_keys_are_the_teachers_embeddings_whatever_the_grid(rule: str, teacher_stride: int) -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=teacher_stride)
    own, other = (4, 4), (32 // teacher_stride,) * 2
    grid = loss_grid(own, other, rule=rule)
    batch, negatives = views(), unit_rows(14, 23, 6)
    got = one_step(student, teacher, negatives, batch, settings(rule, grid))
    embedding = teacher.adaptor.head(teacher.backbone(batch.teacher).mean((2, 3)))
    torch.testing.assert_close(got.keys, F.normalize(embedding, dim=1), rtol=1e-10, atol=1e-12)
    assert got.student.shape == got.teacher.shape == (4, grid[0] * grid[1], 6)
    got.loss.backward()
    assert all(p.grad.any() for p in student.heads[0].parameters())


def test_on_the_teachers_grid_the_loss_is_the_references_over_more_pixels() -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)
    batch, negatives = views(), unit_rows(14, 23, 6)
    got = one_step(student, teacher, negatives, batch, settings("upsample", (8, 8)))
    enlarged = F.interpolate(student(batch.student)[0], scale_factor=2, mode="bilinear")
    s = reference.pixels(enlarged.detach().numpy())
    t = reference.pixels(teacher(batch.teacher).numpy())
    expected = reference.loss(s, t, list(negatives.numpy()), 0.2)
    assert len(s) == 4 * 64
    assert got.loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("rule", "grid"), [("pool", (4, 4)), ("upsample", (8, 8))])
def test_pairs_by_place_are_counted_on_the_grid_of_the_loss(
    rule: str, grid: tuple[int, int]
) -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)
    how = settings(rule, grid, "cross_view_geometric")
    got = one_step(student, teacher, unit_rows(14, 23, 6), views(), how)
    expected = [
        reference.pairs(views().student_box[b].tolist(), views().teacher_box[b].tolist(), grid, 0.7)
        for b in range(4)
    ]
    found = [
        [p if w else None for p, w in zip(positions, weights, strict=True)]
        for positions, weights in zip(
            got.pairs.positions.tolist(), got.pairs.weights.tolist(), strict=True
        )
    ]
    assert found == expected
    count = total_pairs(views(), how)
    assert count == sum(p is not None for image in expected for p in image)
