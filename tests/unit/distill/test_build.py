from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import images, tiny_config
from torch import Tensor, nn

from pcd_ray.config import Config, HeadFitConfig
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import Method, build_method, build_student
from pcd_ray.distill.build_head import (
    fit_contrastive_head,
    fit_pca_head,
    save_fitted_head,
    stand_in_head,
    stored_head,
)
from pcd_ray.distill.build_teacher import LoadedTeacher, load_teacher
from pcd_ray.distill.fitted_head import contrastive_head
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.spatial_adaptor import layer_names
from pcd_ray.distill.step import ViewBatch, distill_step
from pcd_ray.distill.weights import save_teacher, tensors_sha256
from pcd_ray.errors import ConfigError, WeightsError
from pcd_ray.seeds import derive_seed

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
    return build_method(config, [(load_teacher(config.teacher), fitted)], device=CPU)


def norms(head: nn.Sequential) -> list[int]:
    return [norm.num_features for norm in head if isinstance(norm, nn.BatchNorm2d)]


def convolutions(head: nn.Sequential) -> list[tuple[int, int]]:
    return [(c.in_channels, c.out_channels) for c in head if isinstance(c, nn.Conv2d)]


def test_the_same_seed_gives_the_same_student_and_another_seed_another() -> None:
    shapes = [[MlpShape((20, 8))]]
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
    build_student(tiny_config(), [[MlpShape((8,))]])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("backbone", ["test_convnext", "mobilenetv3_small_050", "ghostnet_100"])
def test_every_weight_that_trains_gets_a_gradient(backbone: str) -> None:
    config = tiny_config(student={"backbone": backbone, "mhsa": {"heads": 1}})
    student = build_student(config, [[MlpShape((20, 8))]])
    student(images(0, 2, 64))[0].square().sum().backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_mocov3s_projector_and_predictor_are_mirrored_behind_the_students_channels(
    mocov3_file: Path,
) -> None:
    teacher = {"arch": "", "weights": str(mocov3_file), "head": "auto"}
    student = {"backbone": "resnet18"}
    method = built(tiny_config(teacher=teacher, student=student, loss={"queue_size": 8}))
    expected = [(512, 4096), (4096, 256), (256, 4096), (4096, 256)]
    assert convolutions(method.student.heads[0]) == expected
    assert method.branches[0].queue.negatives.shape == (8, 256)
    assert method.branches[0].law_error < 1e-12
    assert (method.student_map, method.branches[0].teacher_map) == ((512, 2, 2), (2048, 2, 2))
    assert method.branches[0].settings.implementation == "fused"
    assert len(method.branches[0].identity.sha256) == 64

    alone = built(tiny_config(teacher=teacher, student=student | {"predictor": False}))
    assert convolutions(alone.student.heads[0]) == expected[:2]

    narrow = student | {"head_hidden": 30, "predictor_hidden": 20, "head_norm": "off"}
    other = built(tiny_config(teacher=teacher, student=narrow)).student.heads[0]
    assert convolutions(other) == [(512, 30), (30, 256), (256, 20), (20, 256)]
    # MoCo v3's head ends in a BatchNorm, its predictor does not
    assert norms(method.student.heads[0]) == [4096, 256, 4096]
    assert norms(other) == [30, 20]


def test_a_kind_of_loss_decides_what_is_compared_and_moves_nothing_else(bare_file: str) -> None:
    teacher = {"weights": bare_file, "head": "none"}
    pixel, image, mse = (
        built(tiny_config(teacher=teacher, loss={"kind": kind, "implementation": "fused"}))
        for kind in ("pixel", "image", "mse")
    )
    kinds = [method.branches[0].settings.kind for method in (pixel, image, mse)]
    assert kinds == ["pixel", "image", "mse"]
    assert torch.equal(image.branches[0].negatives, pixel.branches[0].negatives)
    assert mse.branches[0].queue is mse.branches[0].negatives is None
    for method in (image, mse):
        assert tensors_sha256(method.student) == tensors_sha256(pixel.student)
    implementations = [m.branches[0].settings.implementation for m in (pixel, image, mse)]
    assert implementations == ["fused", "fused", "plain"]


def test_a_headless_teacher_gives_bare_features_and_the_student_one_or_two_layers(
    bare_file: str,
) -> None:
    teacher = {"weights": bare_file, "head": "none"}
    method = built(tiny_config(teacher=teacher))
    assert convolutions(method.student.heads[0]) == [(96, 96)]
    assert method.branches[0].queue.negatives.shape == (64, 96)
    hidden = built(tiny_config(teacher=teacher, student={"head_hidden": 200}))
    assert convolutions(hidden.student.heads[0]) == [(96, 200), (200, 96)]
    assert norms(hidden.student.heads[0]) == [200]


def test_heads_that_no_teacher_has_can_be_asked_for(headed_file: str) -> None:
    teacher = {"weights": headed_file, "head": "auto"}  # 96-40-12, without a predictor

    def head(**student: object) -> nn.Sequential:
        return built(tiny_config(teacher=teacher, student=student)).student.heads[0]

    assert convolutions(head()) == [(96, 40), (40, 12)]
    assert norms(head()) == [40]
    predicting = head(predictor_hidden=30, head_norm="on")
    assert convolutions(predicting) == [(96, 40), (40, 12), (12, 30), (30, 12)]
    assert norms(predicting) == [40, 12, 30]


def test_principal_components_are_fitted_on_the_teachers_own_pixels(bare_file: str) -> None:
    config = tiny_config(teacher={"weights": bare_file, "head": "auto", "fit": {"dim": 7}})
    loaded = load_teacher(config.teacher)
    assert loaded.identity.head == "pca"
    batches = [images(i, 4, 64) for i in range(5)]
    fitted = fit_pca_head(loaded, batches, HeadFitConfig(dim=7, whiten=1.0))
    method = build_method(config, [(loaded, fitted)], device=CPU)
    assert method.branches[0].law_error < 1e-12
    assert convolutions(method.student.heads[0]) == [(96, 7)]
    pixels = method.branches[0].teacher(torch.cat(batches)).movedim(1, 3).flatten(0, 2)  # (P, 7)
    covariance = pixels.T.cov()
    # white up to the first component's scale, of which float32 keeps six digits
    white = covariance / covariance[0, 0]
    torch.testing.assert_close(white, torch.eye(7), rtol=0, atol=1e-3)
    torch.testing.assert_close(pixels.mean(0) / pixels.std(0), torch.zeros(7), rtol=0, atol=1e-3)


def test_a_contrastive_head_is_fitted_on_pooled_features_and_mirrored(bare_file: str) -> None:
    fit = {"dim": 12, "hidden": 40, "views": 2, "steps": 5}
    config = tiny_config(teacher={"weights": bare_file, "head": "contrastive", "fit": fit})
    loaded = load_teacher(config.teacher)
    pictures = images(0, 12, 64)
    batches = [  # views 0, 1 and 2 of six images each, in any order; view 2 is left out
        (pictures[rows], torch.tensor(views), torch.tensor(numbers))
        for rows, views, numbers in (
            ([0, 7, 2, 9], [0, 1, 0, 1], [0, 1, 2, 3]),
            ([6, 1, 8, 3], [1, 0, 1, 0], [0, 1, 2, 3]),
            ([4, 5], [2, 2], [0, 1]),
        )
    ]
    fitted = fit_contrastive_head(loaded, batches, config.teacher.fit, num_images=4, seed=0)
    with torch.no_grad():
        pooled = loaded.backbone(pictures).mean((2, 3))
    expected = contrastive_head(
        torch.stack([pooled[[0, 1, 2, 3]], pooled[[6, 7, 8, 9]]]),
        hidden=40, dim=12, temperature=0.2, steps=5, seed=derive_seed(0, "contrastive_head"),
    )  # fmt: skip
    # float32: images go through the network in other batches
    torch.testing.assert_close(fitted.head(pooled), expected.head(pooled), rtol=1e-3, atol=1e-4)
    method = build_method(config, [(loaded, fitted.head)], device=CPU)
    assert method.branches[0].law_error < 1e-12
    assert convolutions(method.student.heads[0]) == [(96, 40), (40, 12)]
    untrained = stand_in_head(loaded, config.teacher.fit)
    assert untrained is not None
    assert layer_names(untrained) == layer_names(fitted.head)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"fit": {"dim": 6}}},
        {"teacher": {"fit": {"dim": 7, "whiten": 0.5}}},
        {"teacher": {"head": "contrastive"}},
        {"teacher": {"mean": (0.1, 0.1, 0.1)}},
        {"teacher": {"kwargs": {"output_stride": 16}}},  # the same weights, another map
        {"run": {"seed": 1}},
    ],
)
def test_a_fitted_head_serves_the_settings_that_it_was_fitted_by_alone(
    changes: dict[str, dict[str, object]], bare_file: str, tmp_path: Path
) -> None:
    teacher = {"weights": bare_file, "head": "pca", "fit": {"dim": 7}}
    config = tiny_config(teacher=teacher)
    loaded = load_teacher(config.teacher)
    uri = str(tmp_path / "head.safetensors")
    assert stored_head(uri, config, loaded) is None
    fitted = fit_pca_head(loaded, [images(i, 4, 64) for i in range(5)], config.teacher.fit)
    save_fitted_head(uri, fitted, config, loaded)
    again = stored_head(uri, config, loaded)
    assert again is not None
    rows = torch.randn(3, 96)
    assert torch.equal(again(rows), fitted(rows))
    other = tiny_config(
        **({"teacher": teacher} | changes | {"teacher": teacher | changes.get("teacher", {})})
    )
    assert stored_head(uri, other, load_teacher(other.teacher)) is None


def test_a_published_head_is_taken_first_and_can_be_left(headed_file: str, bare_file: str) -> None:
    for head, width in (("auto", 12), ("published", 12), ("none", 96)):
        method = built(tiny_config(teacher={"weights": headed_file, "head": head}))
        assert method.branches[0].queue.negatives.shape[1] == width
        assert method.branches[0].identity.licence == "MIT"
    with pytest.raises(WeightsError, match=r"head=published, but .*bare.safetensors holds no head"):
        load_teacher(tiny_config(teacher={"weights": bare_file, "head": "published"}).teacher)


def test_a_student_that_was_trained_in_part_cannot_teach(bare_file: str, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(bare_file)
    path = tmp_path / "tapped.safetensors"
    about = {"made_by": "pcd_ray 0.1", "timm_name": "test_resnet", "mean": "[0.5, 0.5, 0.5]"}
    about |= {"std": "[0.2, 0.2, 0.2]", "timm_kwargs": "{}", "teacher_licence": "MIT"}
    about |= {"timm_tap": "2"}
    safetensors.torch.save_file(tensors, path, metadata=about)
    with pytest.raises(
        WeightsError, match=r"tapped\S* .*up to stage 2 of test_resnet alone .*; give"
    ):
        load_teacher(tiny_config(teacher={"weights": str(path)}).teacher)
    whole = about | {"timm_tap": "", "teacher_2_licence": "CC-BY-NC-4.0"}
    safetensors.torch.save_file(tensors, path, metadata=whole)
    both = load_teacher(tiny_config(teacher={"weights": str(path)}).teacher)
    assert both.identity.licence == "MIT and CC-BY-NC-4.0"
    safetensors.torch.save_file(tensors, path, metadata=about | {"timm_tap": ""})
    assert load_teacher(tiny_config(teacher={"weights": str(path)}).teacher).head is None


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
    assert built(naive, head).branches[0].law_error > 1e-3
    assert built(config, head).branches[0].law_error < 1e-12


@pytest.mark.parametrize("rule", ["pool", "upsample"])
def test_a_teacher_with_the_smaller_map_is_refused(rule: str, bare_file: str) -> None:
    finer = {"output_stride": 16, "grid": rule}
    with pytest.raises(
        ConfigError,
        match=rf"teacher's map is 2 x 2 and the student's 4 x 4, but student.grid={rule} .*; set "
        "student.grid=interpolate",
    ):
        built(tiny_config(teacher={"weights": bare_file}, student=finer))


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "grid"),
    [
        ("pool", 32, 16, (2, 2)),
        ("interpolate", 32, 16, (2, 2)),
        ("interpolate", 8, 32, (8, 8)),
        ("upsample", 32, 8, (8, 8)),
        ("upsample", 16, 16, (4, 4)),
    ],
)
def test_the_loss_has_its_grid_and_the_keys_are_the_teachers_own(
    rule: str, student: int, teacher: int, grid: tuple[int, int], bare_file: str
) -> None:
    config = tiny_config(
        teacher={"weights": bare_file, "kwargs": {"output_stride": teacher}},
        student={"output_stride": student, "grid": rule},
    )
    method = built(config)
    own, other = 64 // student, 64 // teacher
    assert (method.student_map[1:], method.branches[0].teacher_map[1:]) == (
        (own, own),
        (other, other),
    )
    assert (method.branches[0].settings.grid, method.branches[0].settings.grid_rule) == (grid, rule)
    batch = images(2, 3, 64)
    views = ViewBatch(batch, batch, torch.ones(3, 5), torch.ones(3, 5))
    result = distill_step(method.student, method.branches, views)[0]
    assert result.student.shape == (3, grid[0] * grid[1], 96)
    keys = method.branches[0].teacher(batch).mean((2, 3))
    expected: Tensor = keys / keys.norm(dim=1, keepdim=True)
    torch.testing.assert_close(result.keys, expected, rtol=1e-4, atol=1e-5)


def test_a_stated_licence_wins(bare_file: str) -> None:
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
    settings = method.branches[0].settings
    assert (settings.autocast, settings.temperature) == (torch.bfloat16, 0.07)
    assert (settings.implementation, settings.pairing_radius) == ("chunked", 0.5)
    weight = method.student.backbone.body.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_teacher_is_loaded_once_and_used_as_loaded(headed_file: str) -> None:
    config = tiny_config(teacher={"weights": headed_file, "head": "auto"})
    loaded = load_teacher(config.teacher)
    assert isinstance(loaded, LoadedTeacher)
    method = build_method(config, [(loaded, None)], device=CPU)
    assert method.branches[0].teacher.adaptor.head is loaded.head
    assert method.branches[0].identity.sha256 == tensors_sha256(method.branches[0].teacher)
