import math

import pytest
import torch
import torch.nn.functional as F
from tiny import unit_rows
from torch import Tensor

from pcd_ray.distill.diagnostics import chance_loss, diagnose, effective_rank, spread
from pcd_ray.distill.loss import KINDS, contrastive_loss
from pcd_ray.distill.pairing import Pairs
from pcd_ray.distill.step import DistillSettings, StepResult, loss_between

SETTINGS = DistillSettings(0.2, "plain", "same_view", 0.7)
NEGATIVES = unit_rows(9, 50, 16)


def result_of(student: Tensor, teacher: Tensor, pairs: Pairs | None = None) -> StepResult:
    """The step of (B, N, D) unit vectors that are paired by index."""
    loss = contrastive_loss(
        student.flatten(0, 1), teacher.flatten(0, 1), NEGATIVES,
        temperature=0.2, implementation="plain",
    )  # fmt: skip
    keys = F.normalize(teacher.mean(dim=1), dim=1)
    return StepResult(loss, keys, student, teacher, pairs or Pairs(None, None))


def diagnosed(student: Tensor, teacher: Tensor, pairs: Pairs | None = None) -> dict[str, float]:
    values = diagnose(result_of(student, teacher, pairs), NEGATIVES, SETTINGS)
    return {name.removeprefix("train/"): value.item() for name, value in values.items()}


def teacher_pixels() -> Tensor:
    return unit_rows(1, 4 * 9, 16).view(4, 9, 16)


def test_a_perfect_student() -> None:
    t = teacher_pixels()
    found = diagnosed(t, t)
    assert found["loss_above_teacher"] == pytest.approx(0, abs=1e-12)
    assert found["positive_cosine"] == pytest.approx(1)
    assert found["pixel_top1_pct"] == found["queue_top1_pct"] == 100
    assert found["student_spread"] == found["teacher_spread"]
    expected = (t.flatten(0, 1) @ NEGATIVES.T).mean().item()
    assert found["negative_cosine"] == pytest.approx(expected)


def of_kind(kind: str, student: Tensor, teacher: Tensor) -> dict[str, float]:
    """What is said of (B, N, D) unit vectors by a loss of this kind."""
    settings = DistillSettings(0.2, "plain", "same_view", 0.7, kind=kind)
    negatives = None if kind == "mse" else NEGATIVES
    pooled, keys = (F.normalize(rows.mean(dim=1), dim=1) for rows in (student, teacher))
    image = kind == "image"
    pair = (pooled, keys) if image else (student.flatten(0, 1), teacher.flatten(0, 1))
    loss = loss_between(*pair, negatives, settings, None)
    unpaired = Pairs(None, None)
    result = StepResult(loss, keys, student, teacher, unpaired, pooled=pooled if image else None)
    values = diagnose(result, negatives, settings)
    return {name.removeprefix("train/"): value.item() for name, value in values.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_equals_its_teacher_has_the_loss_at_the_teacher_of_its_kind(
    kind: str,
) -> None:
    t, other = teacher_pixels(), unit_rows(5, 4 * 9, 16).view(4, 9, 16)
    found = of_kind(kind, t, t)
    assert found["loss_above_teacher"] == pytest.approx(0, abs=1e-12)
    assert found["positive_cosine"] == pytest.approx(1)
    assert (found["loss_at_teacher"] == 0) == (kind == "mse")
    assert of_kind(kind, other, t)["loss_at_teacher"] == found["loss_at_teacher"]
    assert of_kind(kind, other, t)["loss_above_teacher"] > 0.1


def test_the_image_level_compares_pooled_vectors_and_regression_says_nothing_of_a_queue() -> None:
    t = teacher_pixels()
    shuffled = t.roll(1, dims=1)
    pixel, image, mse = (of_kind(kind, shuffled, t) for kind in KINDS)
    assert image["positive_cosine"] == pytest.approx(1)
    assert image["pixel_top1_pct"] == pixel["pixel_top1_pct"] == 0
    assert pixel["positive_cosine"] < 0.5
    keys = F.normalize(t.mean(dim=1), dim=1)
    assert image["negative_cosine"] == pytest.approx((keys @ NEGATIVES.T).mean().item())
    assert pixel.keys() == image.keys()
    assert pixel.keys() - mse.keys() == {"queue_top1_pct", "negative_cosine"}
    assert mse["loss_above_teacher"] == pytest.approx(2 - 2 * mse["positive_cosine"])


def test_the_loss_at_the_teacher_and_the_distance_from_it_are_the_loss() -> None:
    student, t = unit_rows(5, 4 * 9, 16).view(4, 9, 16), teacher_pixels()
    found = diagnosed(student, t)
    loss = result_of(student, t).loss.item()
    assert found["loss_at_teacher"] + found["loss_above_teacher"] == pytest.approx(loss, rel=1e-12)
    assert (
        found["loss_at_teacher"]
        == diagnosed(t, t)["loss_at_teacher"]
        == result_of(t, t).loss.item()
    )


def test_constant_features_have_rank_one_and_no_spread() -> None:
    constant = unit_rows(2, 1, 16).expand(36, 16).view(4, 9, 16)
    found = diagnosed(constant, teacher_pixels())
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["student_spread"] == pytest.approx(0, abs=1e-6)
    assert found["map_spread"] == pytest.approx(0, abs=1e-6)
    assert found["loss_above_teacher"] > 1
    assert found["teacher_spread"] > 0.9


def test_maps_that_are_constant_within_each_image_show_in_map_spread_alone() -> None:
    flat = unit_rows(3, 4, 16)[:, None].expand(4, 9, 16).contiguous()
    found = diagnosed(flat, teacher_pixels())
    assert found["map_spread"] == pytest.approx(0, abs=1e-6)
    assert found["student_spread"] > 0.5


def test_shuffled_pixels_find_the_wrong_partner_though_the_image_is_right() -> None:
    t = teacher_pixels()
    shuffled = t.roll(1, dims=1)
    found = diagnosed(shuffled, t)
    assert found["pixel_top1_pct"] == 0
    assert found["queue_top1_pct"] == 100  # pooling does not see the order
    # told where each pixel went, it is perfect
    positions = torch.arange(9).roll(1).expand(4, 9)
    assert diagnosed(shuffled, t, Pairs(positions, None))["pixel_top1_pct"] == 100
    assert diagnosed(shuffled, t, Pairs(positions, None))["positive_cosine"] == pytest.approx(1)


def test_positions_without_a_pair_do_not_count() -> None:
    t = teacher_pixels()
    half = torch.cat([t[:, :5], -t[:, 5:]], dim=1)  # right on the first five positions
    weights = (torch.arange(9) < 5).double().expand(4, 9)
    found = diagnosed(half, t, Pairs(torch.arange(9).expand(4, 9), weights))
    assert found["positive_cosine"] == pytest.approx(1)
    assert found["pixel_top1_pct"] == 100
    assert diagnosed(half, t)["positive_cosine"] == pytest.approx((5 - 4) / 9)


def test_a_student_nearer_to_the_queue_than_to_its_key() -> None:
    t = teacher_pixels()
    lost = NEGATIVES[:4, None].expand(4, 9, 16).contiguous()
    assert diagnosed(lost, t)["queue_top1_pct"] == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank: int) -> None:
    axes = torch.eye(16, dtype=torch.float64)[:rank]
    rows = torch.cat([axes, -axes]).repeat(50, 1)
    assert effective_rank(rows).item() == pytest.approx(rank, rel=1e-3)


def test_the_teacher_is_not_the_minimum_of_a_loss_with_negatives() -> None:
    t = teacher_pixels()
    beyond = t.clone().requires_grad_()
    result_of(beyond, t).loss.backward()
    assert beyond.grad is not None
    moved = F.normalize(t - 0.1 * beyond.grad, dim=2)
    assert diagnosed(moved, t)["loss_above_teacher"] < 0


def test_effective_rank_of_many_rows_is_that_of_a_part() -> None:
    rows = unit_rows(4, 20_000, 16)
    assert effective_rank(rows).item() == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(("batch", "positions"), [(512, 16), (1024, 64)])
def test_effective_rank_looks_at_all_positions_alike(batch: int, positions: int) -> None:
    axes = torch.eye(positions, dtype=torch.float64)
    maps = torch.cat([axes, -axes]).view(2, positions, -1).repeat(batch // 2, 1, 1)  # (B, N, N)
    assert effective_rank(maps.flatten(0, 1)).item() == pytest.approx(positions, rel=0.02)


def test_effective_rank_is_that_of_the_singular_values() -> None:
    rows = unit_rows(4, 300, 16) * torch.arange(1, 17)
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    expected = torch.special.entr(values / values.sum()).sum().exp().item()
    assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-10)
    assert effective_rank(rows.float()).item() == pytest.approx(expected, rel=1e-6)


def test_spread_of_two_opposite_vectors_is_one() -> None:
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 1
    assert spread(torch.tensor([[0.6, 0.8], [0.6, 0.8]])) == 0


def test_chance_is_what_vectors_at_right_angles_cost() -> None:
    axes = torch.eye(12, dtype=torch.float64)
    for kind in KINDS:
        settings = DistillSettings(0.2, "plain", "same_view", 0.7, kind=kind)
        loss = loss_between(axes[:2], axes[2:4], axes[4:], settings, None)
        assert chance_loss(kind, 8) == pytest.approx(loss.item(), rel=1e-12)
    assert chance_loss("pixel", 65_536) == pytest.approx(math.log(65_537))
