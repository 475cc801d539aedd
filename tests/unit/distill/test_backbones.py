import pytest
import timm
import torch
from tiny import images
from torch import Tensor
from torchvision.transforms import v2

from pcd_ray.distill.backbones import Backbone, build_backbone, freeze_unused, map_shape
from pcd_ray.errors import ConfigError

# name: side of the image, (C, H, W) of the map, tokens in front of the patches
MODELS = {
    "resnet10t": (64, (512, 2, 2)),
    "resnet18": (96, (512, 3, 3)),
    "mobilenetv2_100": (64, (1280, 2, 2)),
    "mobilenetv3_small_050": (64, (288, 2, 2)),
    "convnext_atto": (64, (320, 2, 2)),
    "test_vit": (160, (64, 10, 10)),
    "test_vit2": (160, (64, 10, 10)),
    "vit_tiny_patch16_224": (224, (192, 14, 14)),
    "swin_tiny_patch4_window7_224": (224, (768, 7, 7)),
}


def features_of_timm(backbone: Backbone, batch: Tensor, grid: tuple[int, int]) -> Tensor:
    """timm's own features of torchvision's normalised images, put into NCHW by hand."""
    about = backbone.body.pretrained_cfg
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(about["mean"], about["std"])]
    )
    features = backbone.body.forward_features(transform(batch.permute(0, 3, 1, 2)))
    if features.ndim == 3:  # (B, prefix + H * W, C)
        patches = features[:, -grid[0] * grid[1] :]
        return patches.reshape(len(batch), *grid, -1).permute(0, 3, 1, 2)
    return features if features.shape[2:] == grid else features.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_map_is_timms_features_of_normalised_images_in_nchw(name: str) -> None:
    size, shape = MODELS[name]
    torch.manual_seed(0)
    backbone = build_backbone(name)
    batch = images(0, 2, size)
    with torch.no_grad():
        got = backbone(batch)
        expected = features_of_timm(backbone, batch, shape[1:])
    assert tuple(got.shape) == (2, *shape)
    assert map_shape(backbone, size) == shape
    # (x - 255 mean) / (255 std) against (x / 255 - mean) / std, through the whole network
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_images_are_normalised_as_told() -> None:
    backbone = build_backbone("test_resnet", mean=(0.5, 0.25, 0), std=(0.5, 1, 0.1))
    plain = build_backbone("test_resnet", mean=(0, 0, 0), std=(1, 1, 1))
    plain.load_state_dict(backbone.state_dict())
    batch = images(1, 2, 64)
    own = (batch / 255 - torch.tensor([0.5, 0.25, 0])) / torch.tensor([0.5, 1, 0.1])
    with torch.no_grad():
        expected = plain.body.forward_features(own.permute(0, 3, 1, 2))
        torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)


def test_normalisation_is_no_weight_and_names_are_timms() -> None:
    backbone = build_backbone("resnet18")
    names = {f"body.{key}" for key in timm.create_model("resnet18").state_dict()}
    assert set(backbone.state_dict()) == names - {"body.fc.weight", "body.fc.bias"}


def test_channels_last_gives_the_same_map_in_its_own_layout() -> None:
    backbone = build_backbone("test_resnet")
    batch = images(2, 2, 64)
    with torch.no_grad():
        expected = backbone(batch)
        backbone.use_channels_last()
        got = backbone(batch)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("resnet18", []),
        ("mobilenetv3_small_050", ["body.conv_head.weight", "body.conv_head.bias"]),
        ("convnext_atto", ["body.head.norm.weight", "body.head.norm.bias"]),
    ],
)
def test_weights_behind_the_map_are_frozen_and_no_others(name: str, unused: list[str]) -> None:
    backbone = build_backbone(name)
    assert freeze_unused(backbone, 64) == unused
    backbone(images(3, 1, 64)).sum().backward()
    for key, weight in backbone.named_parameters():
        assert weight.requires_grad == (weight.grad is not None) == (key not in unused), key


def test_measuring_a_map_changes_no_statistics_and_no_mode() -> None:
    backbone = build_backbone("test_resnet").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert map_shape(backbone, 64) == (96, 2, 2)
    assert freeze_unused(backbone, 64) == []
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(weight.grad is None for weight in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("mobilenet_v2_100", "mobilenetv2_100"),
        ("vit_tiny", "vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is no timm model; did you mean {near}"):
        build_backbone(name)


def test_arguments_that_timm_refuses_are_shown() -> None:
    with pytest.raises(ConfigError, match=r"refuses kwargs=\{'pad_typo': 'same'\}"):
        build_backbone("test_resnet", kwargs={"pad_typo": "same"})


def test_a_size_that_a_network_cannot_take_is_refused() -> None:
    name = "vit_tiny_patch16_224"
    with pytest.raises(
        ConfigError, match=rf"{name} cannot take images of 64 x 96 .*\(x\.y\): .*; use"
    ):
        map_shape(build_backbone(name), 64, 96, option="x.y")
    flexible = build_backbone(name, kwargs={"dynamic_img_size": True})
    assert map_shape(flexible, 64) == (192, 4, 4)
    assert map_shape(flexible, 64, 96) == (192, 4, 6)


@pytest.mark.parametrize("name", ["mixer_s32_224", "crossvit_tiny_240"])
def test_networks_of_timm_without_a_map_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"map.*; choose a backbone with a spatial output"):
        map_shape(build_backbone(name), 224)


def test_features_that_are_no_map_are_refused() -> None:
    backbone = build_backbone("test_resnet")
    backbone.body.forward_features = lambda x: x.mean((2, 3))
    with pytest.raises(ConfigError, match="no map; choose a backbone with a spatial output"):
        backbone(images(0, 1, 64))
