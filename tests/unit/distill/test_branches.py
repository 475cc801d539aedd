"""Two teachers: each a branch with a head, a queue and a weight, on one backbone."""

from pathlib import Path

import pytest
import torch
from networks import branch_of, queue_of, small_student, small_teacher
from tiny import images, tiny_config, unit_rows
from torch import Tensor

from pcd_ray import metric_names as names
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import build_method
from pcd_ray.distill.build_teacher import load_teachers
from pcd_ray.distill.diagnostics import diagnose, diagnose_branches
from pcd_ray.distill.step import Branch, DistillSettings, ViewBatch, distill_step, weighted_sum
from pcd_ray.distill.student import Student
from pcd_ray.distill.weights import save_teacher
from pcd_ray.errors import PcdError

CPU = torch.device("cpu")
WIDTHS, WEIGHTS = (6, 9), (0.7, 2.5)
SETTINGS = DistillSettings(0.2, "plain", "same_view", 0.7)


def branches(*weights: float) -> list[Branch]:
    """Teachers of other widths, strides and input statistics."""
    found = []
    for number, weight in enumerate(weights):
        teacher = small_teacher(number, stride=8 // (number + 1), width=WIDTHS[number])
        teacher.backbone.mean += 20.0 * number
        teacher.backbone.std *= 1 + number
        queue = queue_of(unit_rows(20 + number, 23, WIDTHS[number]))
        found.append(branch_of(teacher, queue, SETTINGS, weight=weight))
    return found


def views() -> ViewBatch:
    pixels, boxes = images(10, 4, 32), torch.tensor([0.0, 0, 32, 32, 0]).repeat(4, 1)
    return ViewBatch(pixels, pixels, boxes, boxes)


def with_head(student: Student, number: int) -> Student:
    """The same student with one of its heads alone."""
    return Student(student.backbone, student.neck, [student.heads[number]])


def gradients(student: Student, loss: Tensor) -> list[Tensor]:
    shared = [*student.backbone.parameters(), *student.neck.parameters()]
    return list(torch.autograd.grad(loss, shared))


def test_the_loss_and_its_gradient_are_the_weighted_sums_of_each_teachers_alone() -> None:
    student, both = small_student(widths=WIDTHS), branches(*WEIGHTS)
    loss = weighted_sum([r.loss for r in distill_step(student, both, views())], both)
    alone = []
    for number in (0, 1):
        (result,) = distill_step(with_head(student, number), [both[number]], views())
        alone.append((result.loss, gradients(student, result.loss)))
    expected = WEIGHTS[0] * alone[0][0] + WEIGHTS[1] * alone[1][0]
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for found, one, other in zip(gradients(student, loss), alone[0][1], alone[1][1], strict=True):
        torch.testing.assert_close(found, WEIGHTS[0] * one + WEIGHTS[1] * other)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_a_weight_scales_the_gradient_of_a_teacher_alone(weight: float) -> None:
    student = small_student(widths=WIDTHS[:1])
    found = []
    for each in (1.0, weight):
        alone = branches(each)
        loss = weighted_sum([r.loss for r in distill_step(student, alone, views())], alone)
        found.append(gradients(student, loss))
    for one, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, weight * one, rtol=1e-12, atol=1e-15)


def test_backbone_and_neck_run_once_for_all_heads() -> None:
    student, calls = small_student(widths=WIDTHS), []
    for part in (student.backbone, student.neck, *student.heads):
        part.register_forward_hook(lambda module, _i, _o: calls.append(module))
    distill_step(student, branches(*WEIGHTS), views())
    assert calls == [student.backbone, student.neck, *student.heads]


def test_numbers_of_the_sum_and_of_each_teacher_have_names_of_their_own() -> None:
    student, both = small_student(widths=WIDTHS), branches(*WEIGHTS)
    results = distill_step(student, both, views())
    found = diagnose_branches(results, both)
    each = [
        diagnose(result, branch.queue.negatives, SETTINGS)
        for result, branch in zip(results, both, strict=True)
    ]
    assert len(found) == 2 * len(each[0]) + 2
    at_teachers = [own[names.LOSS_AT_TEACHER] for own in each]
    assert (
        found["train/loss_at_teacher"] == WEIGHTS[0] * at_teachers[0] + WEIGHTS[1] * at_teachers[1]
    )
    assert [found[f"train/loss_at_teacher_{number}"] for number in (1, 2)] == at_teachers
    for number, suffix in enumerate(("", "_2")):
        name = "train/positive_cosine"
        assert found[f"{name}{suffix}"] == each[number][name]
    alone = branches(1.0)
    (result,) = distill_step(with_head(student, 0), alone, views())
    assert diagnose_branches([result], alone) == diagnose(
        result, alone[0].queue.negatives, SETTINGS
    )


def write_mlp_teacher(path: Path) -> str:
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet")
    width = int(backbone.body.num_features)
    head = torch.nn.Sequential(torch.nn.Linear(width, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))
    save_teacher(str(path), backbone, head.eval(), activation="relu", licence="MIT")
    return str(path)


def test_teachers_of_other_widths_grids_and_heads_are_built_side_by_side(tmp_path: Path) -> None:
    first = {"weights": write_mlp_teacher(tmp_path / "mlp.safetensors"), "head": "auto", "arch": ""}
    second = {
        "weights": first["weights"],
        "head": "none",
        "mean": [0.1, 0.2, 0.3],
        "kwargs": {"output_stride": 8},
        "weight": 0.5,
    }
    config = tiny_config(teacher=first, teacher_2=second)
    both = build_method(config, [(each, None) for each in load_teachers(config)], device=CPU)
    alone = tiny_config(teacher=first)
    one = build_method(alone, [(each, None) for each in load_teachers(alone)], device=CPU)
    assert [branch.name for branch in both.branches] == ["teacher", "teacher_2"]
    assert [branch.weight for branch in both.branches] == [1.0, 0.5]
    assert [branch.queue.negatives.shape[1] for branch in both.branches] == [10, 96]
    assert [branch.teacher_map[1] for branch in both.branches] == [2, 8]
    assert [branch.identity.head for branch in both.branches] == ["published", "none"]
    assert all(branch.law_error < 1e-12 for branch in both.branches)
    assert both.branches[0].identity.sha256 != both.branches[1].identity.sha256
    statistics = [(b.teacher.backbone.mean.flatten() / 255).tolist() for b in both.branches]
    assert statistics[1] == pytest.approx([0.1, 0.2, 0.3])
    assert statistics[0] != statistics[1]
    assert [len([m for m in head if hasattr(m, "weight")]) for head in both.student.heads] == [3, 1]
    for name, value in one.student.state_dict().items():  # a second teacher moves no first weight
        assert torch.equal(both.student.state_dict()[name], value)
    assert torch.equal(both.branches[0].queue.negatives, one.branches[0].queue.negatives)


def test_what_is_wrong_with_the_second_teacher_says_so(tmp_path: Path) -> None:
    second = {"weights": str(tmp_path / "none.safetensors"), "head": "none"}
    weights = write_mlp_teacher(tmp_path / "mlp.safetensors")
    config = tiny_config(teacher={"weights": weights}, teacher_2=second)
    with pytest.raises(PcdError, match=r"^teacher_2 \(for teacher\.\* read teacher_2\.\*\): "):
        load_teachers(config)
