import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from networks import one_step, small_student, small_teacher
from tiny import images, unit_rows
from torch import Tensor, nn

from pcd_ray.distill.diagnostics import chance_loss
from pcd_ray.distill.loss import IMPLEMENTATIONS
from pcd_ray.distill.loss import KINDS as LOSSES
from pcd_ray.distill.pairing import KINDS
from pcd_ray.distill.step import DistillSettings, ViewBatch, total_pairs
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher


def settings(pairing: str = "same_view", **changes: object) -> DistillSettings:
    values: dict[str, object] = {"temperature": 0.2, "implementation": "plain", "pairing": pairing}
    return DistillSettings(**(values | {"pairing_radius": 0.7} | changes))


def boxes(seed: int, count: int) -> Tensor:
    """Crops of a 100 x 80 image that overlap in part, so that some positions have a pair."""
    share = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed))
    width, height = 30 + 40 * share[:, 2], 30 + 30 * share[:, 3]
    left, top = share[:, 0] * (100 - width), share[:, 1] * (80 - height)
    return torch.stack([left, top, width, height, (share[:, 4] < 0.5).float()], dim=1)


def views(count: int = 4, *, shared: bool = False) -> ViewBatch:
    student = images(10, count, 32)
    teacher = student if shared else images(11, count, 32)
    student_box = boxes(12, count)
    return ViewBatch(student, teacher, student_box, student_box if shared else boxes(13, count))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pairing", KINDS)
def test_a_step_equals_the_reference_from_images_to_loss(pairing: str, implementation: str) -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)  # grids 4 x 4 and 8 x 8
    batch = views(shared=pairing == "same_view")
    negatives = unit_rows(14, 23, 6)
    got = one_step(
        student, teacher, negatives, batch, settings(pairing, implementation=implementation)
    )

    student_map, teacher_map = reference_maps(student, teacher, batch)
    s, (positives, weights) = reference.pixels(student_map), paired(pairing, teacher_map, batch)
    expected = reference.loss(s, positives, list(negatives.numpy()), 0.2, weights)
    assert got.loss.item() == pytest.approx(expected, rel=1e-10)
    keys = reference.pooled(teacher_map)
    np.testing.assert_allclose(got.keys.numpy(), np.stack(keys), rtol=1e-9, atol=1e-12)


def reference_maps(
    student: Student, teacher: FrozenTeacher, batch: ViewBatch
) -> tuple[reference.Array, reference.Array]:
    """Both maps on the student's grid of 4 x 4."""
    student_map = student(batch.student)[0].detach().numpy()
    features = teacher.backbone(batch.teacher).detach().numpy()
    return student_map, reference.shrink(reference.adapt(teacher.adaptor.head, features), (4, 4))


def paired(
    pairing: str, teacher_map: reference.Array, batch: ViewBatch
) -> tuple[list[reference.Array], list[float]]:
    """The positive of each of 64 student pixels, and whether it counts."""
    t = reference.pixels(teacher_map)
    positives, weights = list(t), [1.0] * len(t)
    if pairing == "cross_view_geometric":
        for b in range(4):
            found = reference.pairs(
                batch.student_box[b].tolist(), batch.teacher_box[b].tolist(), (4, 4), 0.7
            )
            for i, position in enumerate(found):
                weights[16 * b + i] = float(position is not None)
                positives[16 * b + i] = t[16 * b + (position or 0)]
        assert 0 < sum(weights) < 64
    return positives, weights


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pairing", ["same_view", "cross_view_index"])
def test_an_image_level_step_equals_the_reference(pairing: str, implementation: str) -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)
    batch = views(shared=pairing == "same_view")
    negatives = unit_rows(14, 23, 6)
    how = settings(pairing, implementation=implementation, kind="image")
    got = one_step(student, teacher, negatives, batch, how)
    s, t = (reference.pooled(maps) for maps in reference_maps(student, teacher, batch))
    expected = reference.loss(s, t, list(negatives.numpy()), 0.2)
    assert got.loss.item() == pytest.approx(expected, rel=1e-10)
    embedding = teacher.adaptor.head(teacher.backbone(batch.teacher).mean((2, 3)))  # as published
    np.testing.assert_allclose(np.stack(t), nn.functional.normalize(embedding.detach(), dim=1))


@pytest.mark.parametrize("pairing", KINDS)
def test_a_regression_step_equals_the_reference(pairing: str) -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)
    batch = views(shared=pairing == "same_view")
    got = one_step(student, teacher, None, batch, settings(pairing, kind="mse"))
    student_map, teacher_map = reference_maps(student, teacher, batch)
    s, (positives, weights) = reference.pixels(student_map), paired(pairing, teacher_map, batch)
    expected = reference.squared_distance(s, positives, weights)
    assert got.loss.item() == pytest.approx(expected, rel=1e-10)


class Axes(nn.Module):
    """Gives one direction everywhere, longer at each position than at the one before."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        direction = torch.eye(20, dtype=torch.float64)[axis]
        self.map = nn.Parameter(direction[:, None, None] * torch.arange(1.0, 10).view(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.map.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize(
    ("kind", "chance"), [("pixel", math.log1p(12)), ("image", math.log1p(12)), ("mse", 2.0)]
)
def test_vectors_at_right_angles_cost_what_chance_costs(kind: str, chance: float) -> None:
    negatives = None if kind == "mse" else torch.eye(20, dtype=torch.float64)[2:14]
    student, teacher = Axes(0), Axes(1)
    how = settings(kind=kind)
    got = one_step(
        lambda x: (student(x),),
        teacher,
        negatives,
        views(),
        how,
    )
    assert got.loss.item() == pytest.approx(chance, rel=1e-12)
    assert got.loss.item() == pytest.approx(chance_loss(kind, 12), rel=1e-12)


class Rolled(nn.Module):
    """A student whose pixels lie elsewhere."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> tuple[Tensor]:
        (maps,) = self.student(x)
        return (maps.roll((1, 2), dims=(2, 3)),)


def test_the_image_level_alone_does_not_see_where_pixels_lie() -> None:
    student, teacher, batch = small_student(), small_teacher(), views(shared=True)
    for kind in LOSSES:
        negatives = None if kind == "mse" else unit_rows(14, 23, 6)
        one, other = (
            one_step(network, teacher, negatives, batch, settings(kind=kind)).loss.item()
            for network in (student, Rolled(student))
        )
        assert (one == pytest.approx(other, rel=1e-12)) == (kind == "image")


def test_keys_are_the_teachers_published_embeddings() -> None:
    student, teacher = small_student(stride=8), small_teacher(stride=4)
    batch = views(shared=True)
    got = one_step(student, teacher, unit_rows(14, 23, 6), batch, settings())
    embedding = teacher.adaptor.head(teacher.backbone(batch.teacher).mean((2, 3)))
    expected = embedding / embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got.keys, expected, rtol=1e-10, atol=1e-12)


class Imitator(nn.Module):
    """A student that gives its teacher's map."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.teacher(x),)


def test_a_student_that_is_its_teacher_has_the_loss_at_the_teacher() -> None:
    teacher, negatives = small_teacher(), unit_rows(14, 23, 6)
    got = one_step(Imitator(teacher), teacher, negatives, views(shared=True), settings())
    t = got.teacher.flatten(0, 1)
    # the positive's cosine is 1: softplus of the queue's log-sum-exp minus 1 / tau
    expected = (1 + (t @ negatives.T / 0.2).exp().sum(1) / np.exp(1 / 0.2)).log().mean()
    torch.testing.assert_close(got.loss, expected)


def test_other_colours_of_the_teachers_view_reach_the_teacher_alone() -> None:
    student, teacher, negatives = small_student(), small_teacher(), unit_rows(14, 23, 6)
    one = views(shared=True)
    other = ViewBatch(one.student, 255 - one.student, one.student_box, one.student_box)
    a, b = (one_step(student, teacher, negatives, batch, settings()) for batch in (one, other))
    assert torch.equal(a.student, b.student)
    assert not torch.allclose(a.keys, b.keys)


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_student_gets_a_gradient(kind: str) -> None:
    student, teacher = small_student(), small_teacher()
    negatives = None if kind == "mse" else unit_rows(14, 23, 6)
    got = one_step(student, teacher, negatives, views(), settings(kind=kind))
    got.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.heads[0].parameters())
    assert all(p.grad is None for p in teacher.parameters())
    kept = [got.keys, got.student, got.teacher, *([got.pooled] if kind == "image" else [])]
    assert not any(rows.requires_grad for rows in kept)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "pairing", "implementation"),
    [
        *(("pixel", pairing, form) for pairing in KINDS for form in IMPLEMENTATIONS),
        ("image", "same_view", "fused"),
        ("image", "cross_view_index", "chunked"),
        ("mse", "same_view", "plain"),
        ("mse", "cross_view_geometric", "plain"),
    ],
)
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(
    kind: str, pairing: str, implementation: str, parts: int
) -> None:
    teacher, negatives = small_teacher(), None if kind == "mse" else unit_rows(14, 23, 6)
    whole, split = small_student(), small_student()
    grid = tuple(whole(views().student)[0].shape[2:])
    how = settings(pairing, implementation=implementation, grid=grid, kind=kind)
    one_step(whole, teacher, negatives, views(), how).loss.backward()
    pairs = total_pairs(views(), how)
    results = []
    for part in views().split(parts):
        share = len(part.student) / 4
        num_pairs = None if pairs is None else pairs * share
        results.append(one_step(split, teacher, negatives, part, how, num_pairs=num_pairs))
        (results[-1].loss * share).backward()
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)
    keys = one_step(whole, teacher, negatives, views(), how).keys
    torch.testing.assert_close(torch.cat([result.keys for result in results]), keys)


def test_split_cuts_every_part_of_a_batch_in_order() -> None:
    batch = views(6)
    parts = batch.split(3)
    assert [len(part.student) for part in parts] == [2, 2, 2]
    for name in ("student", "teacher", "student_box", "teacher_box"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    assert [len(part.student) for part in batch.split(4)] == [2, 2, 1, 1]
    assert batch.split(1) == [batch]
    assert all(part.teacher is part.student for part in views(6, shared=True).split(3))


def test_under_autocast_loss_and_keys_are_float32_and_close_to_it() -> None:
    student, teacher = small_student().float(), small_teacher().float()
    negatives, batch = unit_rows(14, 23, 6, torch.float32), views(shared=True)
    exact = one_step(student, teacher, negatives, batch, settings())
    got = one_step(student, teacher, negatives, batch, settings(autocast=torch.bfloat16))
    for rows in (got.loss, got.keys, got.student, got.teacher):
        assert rows.dtype == torch.float32
    assert not torch.equal(got.student, exact.student)  # it did compute in bfloat16
    # unit vectors to float32's rounding, not to bfloat16's 4e-3
    torch.testing.assert_close(got.keys.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.student.norm(dim=2), torch.ones(4, 16), rtol=0, atol=1e-6)
    assert (got.keys * exact.keys).sum(dim=1).min() > 0.999
    assert got.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    got.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in student.heads[0].parameters())


def test_crops_that_share_nothing_teach_nothing() -> None:
    student, teacher, negatives = small_student(), small_teacher(), unit_rows(14, 23, 6)
    far = torch.tensor([[500.0, 500, 30, 30, 0]]).expand(4, 5)
    one = views()
    batch = ViewBatch(one.student, one.teacher, one.student_box, far)
    got = one_step(student, teacher, negatives, batch, settings("cross_view_geometric"))
    got.loss.backward()
    assert got.loss == 0
    assert not any(p.grad.any() for p in student.parameters())


def _never(*_: object) -> None:
    raise AssertionError("the teacher was run")


@pytest.mark.parametrize(
    ("pairing", "kind"),
    [(pairing, kind) for pairing in KINDS for kind in LOSSES if kind != "image"]
    + [("same_view", "image"), ("cross_view_index", "image")],
)
def test_a_step_on_stored_maps_is_the_step_on_those_of_the_teacher(pairing: str, kind: str) -> None:
    """Exactly, where they are exact; the teacher is not run, and the parts of a batch have theirs.

    A dtype of less than float32 is widened before anything is computed of it.
    """
    student, teacher = small_student(), small_teacher()
    batch = views(shared=pairing == "same_view")
    negatives = None if kind == "mse" else unit_rows(14, 23, 6)
    given = settings(pairing, kind=kind, grid=(4, 4))
    half = teacher(batch.teacher).half()
    on_maps = replace(batch, teacher=batch.student, teacher_maps=(half,))

    class Rounded(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return half

    expected = one_step(student, Rounded(), negatives, batch, given)
    teacher.register_forward_pre_hook(_never)
    got = one_step(student, teacher, negatives, on_maps, given)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.keys, expected.keys)
    assert got.keys.dtype == torch.float32
    parts = on_maps.split(2)
    assert torch.equal(torch.cat([part.teacher_maps[0] for part in parts]), half)
    assert all(part.teacher is part.student for part in parts)
