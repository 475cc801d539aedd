"""Every named student at every stride that it allows: built, trained, exported, loaded by timm."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from loop_parts import loop_settings
from networks import branch_of, small_teacher
from stored_run import store_student
from tiny import images, tiny_config
from torch import Tensor

from pcd_ray.checkpoint import find_checkpoint
from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone, build_backbone, map_shape
from pcd_ray.distill.build import build_student
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.step import DistillSettings, ViewBatch
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError
from pcd_ray.export import export, student_of
from pcd_ray.train.loop import train_step
from pcd_ray.train.optim import build_optimizer, set_learning_rate
from pcd_ray.train.state import TrainState

SIZE_PX, WIDTH = 32, 6
README = (Path(__file__).parents[3] / "README.md").read_text()

# stride: channels of the map, millions of weights that train, stage that is tapped
STUDENTS: dict[str, dict[int, tuple[int, float, int | None]]] = {
    "resnet18": {32: (512, 11.18, None), 16: (512, 11.18, None), 8: (512, 11.18, None)},
    "resnet34": {32: (512, 21.28, None), 16: (512, 21.28, None), 8: (512, 21.28, None)},
    "resnet50": {32: (2048, 23.51, None), 16: (2048, 23.51, None), 8: (2048, 23.51, None)},
    "mobilenetv3_large_100": {32: (960, 2.97, None), 16: (112, 0.79, 3), 8: (40, 0.06, 2)},
    "mobilenetv3_small_100": {32: (576, 0.93, None), 16: (48, 0.19, 3), 8: (24, 0.01, 2)},
    "efficientnet_b0": {32: (1280, 4.01, None), 16: (1280, 4.01, None), 8: (1280, 4.01, None)},
    "ghostnet_100": {32: (960, 2.67, None), 16: (80, 0.05, 3), 8: (40, 0.02, 2)},
    "convnext_nano": {32: (640, 14.95, None), 16: (640, 14.95, None), 8: (640, 14.95, None)},
    "vit_tiny_patch16_224": {16: (192, 5.49, None)},
}
CASES = [(name, stride) for name, strides in STUDENTS.items() for stride in strides]


def config_of(name: str, stride: int, root: Path) -> Config:
    fixed_size = {"img_size": SIZE_PX} if name.startswith("vit") else {}
    return tiny_config(
        run={"root": str(root), "name": "stored"},
        augment={"image_size_px": SIZE_PX},
        student={
            "backbone": name,
            "kwargs": fixed_size,
            "output_stride": stride,
            "mhsa": {"depth": 0},
        },
    )


def map_of_timm(about: dict[str, str], model: torch.nn.Module, views: Tensor) -> Tensor:
    """The exported map, by what the file says of itself and timm's public calls alone."""
    mean, std = (torch.tensor(json.loads(about[key])).view(3, 1, 1) for key in ("mean", "std"))
    x = (views.movedim(3, 1) / 255 - mean) / std
    with torch.no_grad():
        if about["timm_tap"]:
            taps = {"indices": [int(about["timm_tap"])], "intermediates_only": True}
            return model.forward_intermediates(x, **taps)[0]
        found = model.forward_features(x)
    return (
        found if found.ndim == 4 else found[:, 1:].mT.unflatten(2, (SIZE_PX // 16, SIZE_PX // 16))
    )


def train_one_step(student: Student) -> None:
    optimizer = build_optimizer("adamw", student, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-3)
    queue = FeatureQueue(16, WIDTH, seed=0, device=torch.device("cpu"))
    pixels, boxes = images(0, 2, SIZE_PX), torch.tensor([0.0, 0, 1, 1, 0]).repeat(2, 1)
    distill = DistillSettings(0.2, "plain", "same_view", 0.7, grid_rule="interpolate")
    train_step(
        TrainState(
            student.train(),
            optimizer,
            [branch_of(small_teacher(stride=16).float(), queue, distill)],
        ),
        ViewBatch(pixels, pixels, boxes, boxes),
        loop_settings(steps=1),
        watch=False,
    )


@pytest.mark.parametrize(("name", "stride"), CASES)
def test_it_is_built_trained_exported_and_loaded(name: str, stride: int, tmp_path: Path) -> None:
    channels, millions, tap = STUDENTS[name][stride]
    config = config_of(name, stride, tmp_path)
    student = build_student(config, [[MlpShape((WIDTH,))]])
    backbone, side = student.backbone, SIZE_PX // stride
    assert (map_shape(backbone, SIZE_PX), backbone.tap) == ((channels, side, side), tap)
    wanting = {k: p for k, p in student.named_parameters() if p.requires_grad}
    count = sum(p.numel() for k, p in wanting.items() if k.startswith("backbone."))
    assert count / 1e6 == pytest.approx(millions, abs=0.005)

    train_one_step(student)
    assert [k for k, p in wanting.items() if p.grad is None] == []
    assert all(p.grad is None for k, p in student.named_parameters() if k not in wanting)

    result = export(store_student(config, student.eval(), 1).uri)
    kwargs = json.loads(result.metadata["timm_kwargs"])
    model = timm.create_model(result.metadata["timm_name"], num_classes=0, **kwargs).eval()
    model.load_state_dict(safetensors.torch.load_file(result.path), strict=True)
    views = images(1, 2, SIZE_PX)
    with torch.no_grad():
        expected = backbone(views)
    found = map_of_timm(result.metadata, model, views)
    # float32: normalisation is computed in another order, through the whole network
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    shutil.rmtree(tmp_path)  # a gigabyte over all students


def test_the_readmes_table_is_what_is_tested() -> None:
    for name, strides in STUDENTS.items():
        for stride, (channels, millions, tap) in strides.items():
            how = "own" if tap is None and stride == max(strides) else "dilated"
            how = how if tap is None else f"stage {tap}"
            assert f"| `{name}` | {stride} | {how} | {channels} | {millions:.2f} |" in README


def test_a_tapped_student_is_used_without_what_lies_behind_its_stage(tmp_path: Path) -> None:
    config = config_of("mobilenetv3_small_100", 16, tmp_path)
    student = build_student(config, [[MlpShape((WIDTH,))]])
    folder = store_student(config, student, 1)
    model = student_of(find_checkpoint(folder.uri))
    views = images(1, 2, SIZE_PX)
    x = (views.movedim(3, 1).float() - student.backbone.mean) / student.backbone.std
    with torch.no_grad():
        (found,) = model(x)
        torch.testing.assert_close(found, student.eval().backbone(views))
    trained = sum(p.numel() for p in student.backbone.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters()) == trained


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_weights_are_the_same_at_every_stride(stride: int, tmp_path: Path) -> None:
    def weights(name: str, output_stride: int) -> dict[str, Tensor]:
        config = config_of(name, output_stride, tmp_path)
        return build_student(config, [[MlpShape((WIDTH,))]]).backbone.state_dict()

    for name in ("test_resnet", "mobilenetv3_small_050"):
        own, other = weights(name, 0), weights(name, stride)
        assert own.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in own.items())


@pytest.mark.parametrize(
    ("name", "stride", "has"),
    [
        ("vit_tiny_patch16_224", 32, "16"),
        ("vit_tiny_patch16_224", 8, "16"),
        ("levit_128s", 8, "16, 32, 64"),
    ],
)
def test_a_stride_that_a_network_does_not_have_is_refused(name: str, stride: int, has: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"output_stride={stride}, but {name} has maps of stride {has} alone; use .*upsample",
    ):
        build_backbone(name, output_stride=stride)


def test_a_transformers_stride_is_its_patch() -> None:
    kwargs: dict[str, Any] = {"patch_size": 8, "img_size": 64}
    backbone: Backbone = build_backbone("test_vit", kwargs=kwargs, output_stride=8)
    assert map_shape(backbone, 64) == (64, 8, 8)
