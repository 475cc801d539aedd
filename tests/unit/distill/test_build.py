from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import images, tiny_config
from torch import Tensor, nn

from pcd_ray.config import Config
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import (
    LoadedTeacher,
    Method,
    build_method,
    build_student,
    fit_head,
    load_teacher,
)
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.step import ViewBatch, distill_step
from pcd_ray.distill.weights import save_teacher, tensors_sha256
from pcd_ray.errors import ConfigError, WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bare_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of timm's test_resnet (96 channels, 2 x 2 at 64 px)."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "bare.safetensors"
    safetensors.torch.save_file(build_backbone("test_resnet").body.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def headed_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same network with a head 96-40-12, in our own layout."""
    torch.manual_seed(6)
    head = nn.Sequential(nn.Linear(96, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 12))
    uri = str(tmp_path_factory.mktemp("teacher") / "headed.safetensors")
    save_teacher(uri, build_backbone("test_resnet"), head.eval(), activation="relu", licence="MIT")
    return uri


def built(config: Config, fitted: nn.Sequential | None = None) -> Method:
    return build_method(config, load_teacher(config.teacher), fitted, device=CPU)


def convolutions(head: nn.Sequential) -> list[tuple[int, int]]:
    return [(c.in_channels, c.out_channels) for c in head if isinstance(c, nn.Conv2d)]


def test_the_same_seed_gives_the_same_student_and_another_seed_another() -> None:
    shapes = [MlpShape((20, 8))]
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(1000 + len(hashes))  # what others drew does not matter
        student = build_student(tiny_config(run={"seed": seed}), shapes)
        hashes.append(tensors_sha256(student))
    assert hashes[0] == hashes[1] != hashes[2]


def test_building_a_student_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build_student(tiny_config(), [MlpShape((8,))])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("backbone", ["test_convnext", "mobilenetv3_small_050", "ghostnet_100"])
def test_every_weight_that_trains_gets_a_gradient(backbone: str) -> None:
    config = tiny_config(student={"backbone": backbone, "mhsa": {"heads": 1}})
    student = build_student(config, [MlpShape((20, 8))])
    student(images(0, 2, 64)).square().sum().backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_mocov3s_projector_and_predictor_are_mirrored_behind_the_students_channels(
    mocov3_file: Path,
) -> None:
    teacher = {"arch": "mocov3_resnet50", "weights": str(mocov3_file), "head": "auto"}
    student = {"backbone": "resnet18"}
    method = built(tiny_config(teacher=teacher, student=student, loss={"queue_size": 8}))
    expected = [(512, 4096), (4096, 256), (256, 4096), (4096, 256)]
    assert convolutions(method.student.head) == expected
    assert method.queue.negatives.shape == (8, 256)
    assert method.law_error < 1e-12
    assert (method.student_map, method.teacher_map) == ((512, 2, 2), (2048, 2, 2))
    assert method.settings.implementation == "fused"
    assert len(method.identity.sha256) == 64

    alone = built(tiny_config(teacher=teacher, student=student | {"predictor": False}))
    assert convolutions(alone.student.head) == expected[:2]


def test_a_headless_teacher_gives_bare_features_and_the_student_one_or_two_layers(
    bare_file: str,
) -> None:
    teacher = {"weights": bare_file, "head": "none"}
    method = built(tiny_config(teacher=teacher))
    assert convolutions(method.student.head) == [(96, 96)]
    assert method.queue.negatives.shape == (64, 96)
    hidden = built(tiny_config(teacher=teacher, student={"head_hidden": 200}))
    assert convolutions(hidden.student.head) == [(96, 200), (200, 96)]


def test_principal_components_are_fitted_on_the_teachers_own_pixels(bare_file: str) -> None:
    config = tiny_config(teacher={"weights": bare_file, "head": "auto", "pca_dim": 7})
    loaded = load_teacher(config.teacher)
    assert loaded.identity.head == "pca"
    batches = [images(i, 4, 64) for i in range(5)]
    fitted = fit_head(loaded, batches, dim=7, whiten=1.0)
    method = build_method(config, loaded, fitted, device=CPU)
    assert method.law_error < 1e-12
    assert convolutions(method.student.head) == [(96, 7)]
    pixels = method.teacher(torch.cat(batches)).movedim(1, 3).flatten(0, 2)  # (P, 7)
    covariance = pixels.T.cov()
    # white up to the first component's scale, of which float32 keeps six digits
    white = covariance / covariance[0, 0]
    torch.testing.assert_close(white, torch.eye(7), rtol=0, atol=1e-3)
    torch.testing.assert_close(pixels.mean(0) / pixels.std(0), torch.zeros(7), rtol=0, atol=1e-3)


def test_a_published_head_is_taken_first_and_can_be_left(headed_file: str, bare_file: str) -> None:
    for head, width in (("auto", 12), ("published", 12), ("none", 96)):
        method = built(tiny_config(teacher={"weights": headed_file, "head": head}))
        assert method.queue.negatives.shape[1] == width
        assert method.identity.licence == "MIT"
    with pytest.raises(WeightsError, match=r"head=published, but .*bare.safetensors holds no head"):
        load_teacher(tiny_config(teacher={"weights": bare_file, "head": "published"}).teacher)


def test_a_head_of_another_backbone_is_refused(bare_file: str) -> None:
    config = tiny_config(teacher={"weights": bare_file, "head": "pca"})
    with pytest.raises(WeightsError, match=r"takes 95 channels but the backbone test_resnet gives"):
        built(config, nn.Sequential(nn.Linear(95, 4)))


def test_a_head_that_breaks_the_law_is_refused_unless_it_is_the_ablation(bare_file: str) -> None:
    broken = nn.Sequential(nn.Linear(96, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.constant_(broken[0].weight, float("nan"))
    config = tiny_config(teacher={"weights": bare_file, "head": "pca"})
    with pytest.raises(WeightsError, match="breaks SpatialAdaptor's law"):
        built(config, broken)
    naive = tiny_config(teacher={"weights": bare_file, "head": "pca", "adaptor": {"rule": "naive"}})
    torch.manual_seed(8)
    head = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    assert built(naive, head).law_error > 1e-3
    assert built(config, head).law_error < 1e-12


def test_maps_whose_grids_do_not_divide_are_refused(bare_file: str) -> None:
    finer = {"backbone": "resnet10t", "kwargs": {"output_stride": 16}}
    with pytest.raises(ConfigError, match="teacher's map is 2 x 2 and the student's 4 x 4"):
        built(tiny_config(teacher={"weights": bare_file}, student=finer))


def test_a_finer_teacher_is_averaged_onto_the_students_grid(bare_file: str) -> None:
    config = tiny_config(teacher={"weights": bare_file, "kwargs": {"output_stride": 16}})
    method = built(config)
    assert (method.student_map[1:], method.teacher_map[1:]) == ((2, 2), (4, 4))
    batch = images(2, 3, 64)
    views = ViewBatch(batch, batch, torch.ones(3, 5), torch.ones(3, 5))
    result = distill_step(
        method.student, method.teacher, method.queue.negatives, views, method.settings
    )
    keys = method.teacher(batch).mean((2, 3))
    expected: Tensor = keys / keys.norm(dim=1, keepdim=True)
    torch.testing.assert_close(result.keys, expected, rtol=1e-4, atol=1e-5)


def test_published_files_must_be_given_and_a_stated_licence_wins(bare_file: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher.weights is empty, but .*mocov3_resnet50"):
        load_teacher(tiny_config(teacher={"arch": "mocov3_resnet50"}).teacher)
    stated = tiny_config(teacher={"weights": bare_file, "licence": "CC0-1.0"})
    assert load_teacher(stated.teacher).identity.licence == "CC0-1.0"


def test_timm_says_the_licence_of_its_own_weights() -> None:
    assert build_backbone("resnet18").timm_licence == "apache-2.0"


def test_precision_and_layout_reach_the_step(bare_file: str) -> None:
    config = tiny_config(
        teacher={"weights": bare_file},
        train={"precision": "bf16", "channels_last": True},
        loss={"temperature": 0.07, "implementation": "chunked"},
        pairing={"kind": "cross_view_geometric", "radius": 0.5},
    )
    method = built(config)
    settings = method.settings
    assert (settings.autocast, settings.temperature) == (torch.bfloat16, 0.07)
    assert (settings.implementation, settings.pairing_radius) == ("chunked", 0.5)
    weight = method.student.backbone.body.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_teacher_is_loaded_once_and_used_as_loaded(headed_file: str) -> None:
    config = tiny_config(teacher={"weights": headed_file, "head": "auto"})
    loaded = load_teacher(config.teacher)
    assert isinstance(loaded, LoadedTeacher)
    method = build_method(config, loaded, None, device=CPU)
    assert method.teacher.adaptor.head is loaded.head
    assert method.identity.sha256 == tensors_sha256(method.teacher)
