import torch
from networks import small_backbone, small_teacher
from tiny import images
from torch import nn

from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.distill.weights import tensors_sha256


def test_no_train_of_any_parent_thaws_a_parameter_or_a_statistic() -> None:
    head = nn.Sequential(nn.Linear(96, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
    teacher = FrozenTeacher(build_backbone("test_resnet"), head, rule="gate")
    before = tensors_sha256(teacher)
    grandparent = nn.Sequential(nn.ModuleDict({"teacher": teacher}))
    for thaw in (grandparent.train, teacher.train, lambda: teacher.requires_grad_(False).train()):
        thaw()
        assert not any(module.training for module in teacher.modules())
        teacher(images(0, 4, 64))
        assert tensors_sha256(teacher) == before
    assert not any(p.requires_grad for p in teacher.parameters())


def test_its_map_has_no_graph_and_does_not_depend_on_the_batch() -> None:
    teacher = small_teacher()
    batch = images(1, 4, 32)
    whole = teacher(batch)
    assert not whole.requires_grad
    for b in range(4):
        torch.testing.assert_close(teacher(batch[b : b + 1])[0], whole[b])


def test_pooling_its_map_is_the_published_embedding() -> None:
    teacher = small_teacher()
    batch = images(2, 4, 32)
    embedding = teacher.adaptor.head(teacher.backbone(batch).mean((2, 3)))
    torch.testing.assert_close(teacher(batch).mean((2, 3)), embedding, rtol=1e-12, atol=1e-12)


def test_without_a_head_it_gives_the_backbones_map() -> None:
    backbone = small_backbone(3, 10)
    teacher = FrozenTeacher(backbone, None, rule="gate")
    batch = images(3, 2, 32)
    assert torch.equal(teacher(batch), backbone(batch))
    assert teacher.width(10) == 10
    assert small_teacher(width=6).width(10) == 6


def test_it_compiles_whole() -> None:
    teacher = small_teacher()
    batch = images(4, 2, 32)
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), teacher(batch))
