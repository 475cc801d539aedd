"""Networks that pool themselves, and heads behind timm's pooling: the law against timm's own sums.

Each network is timm's own, random, small, in float64; what it must give is timm's whole forward.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models.byobnet import ByoBlockCfg
from tiny import images, tiny_config
from torch import Tensor, nn

from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone, build_backbone, build_whole, map_shape
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.step import ViewBatch, distill_step
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.distill.timm_heads import clip_projection, own_head
from pcd_ray.distill.tokens import recentred_map, value_weights
from pcd_ray.distill.weights import save_teacher
from pcd_ray.errors import ConfigError, WeightsError

ROUNDING = 1e-11  # float64, behind a dozen layers
SMALL_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# of one size, timm keeps its rotations in float32, and 5e-9 of them is lost
SMALL_EVA02 = {**SMALL_VIT, "img_size": 56, "dynamic_img_size": True}
# name: kwargs, side of the image, tokens in front of the patches
TOKENS: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": ({**SMALL_VIT, "img_size": 64}, 64, 1),
    "vit_small_patch14_reg4_dinov2": ({**SMALL_VIT, "img_size": 56}, 56, 5),
    "vit_small_patch16_dinov3": ({**SMALL_VIT, "img_size": 64}, 64, 5),
    "eva02_tiny_patch14_224": (SMALL_EVA02, 56, 1),
    "beit_base_patch16_224": ({**SMALL_VIT, "img_size": 64}, 64, 1),
}


def randomised(network: nn.Module) -> nn.Module:
    """Give every weight, scale and statistic a value of its own; new ones are often 0 or 1."""
    for name, value in network.named_parameters():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5) if "weight" in name else nn.init.normal_(value)
        elif "token" in name or "pos_embed" in name:
            nn.init.normal_(value, std=0.5)
        else:
            nn.init.normal_(value, std=value[0].numel() ** -0.5)
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.double().eval().requires_grad_(False)


def normalised(network: Any, batch: Tensor) -> Tensor:
    """Return images as the network wants them, as torchvision would."""
    about = network.pretrained_cfg
    x = batch.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(about[key]).double()[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def stored(path: Path, network: nn.Module) -> str:
    """Write a network under timm's names, in float32 as published."""
    tensors = {key: value.float().contiguous() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(tensors, path)
    return str(path)


def exact(backbone: Backbone) -> Backbone:
    """Put a backbone into float64, its normalisation too, which float32 had rounded."""
    backbone.double()
    about: Any = backbone.body.pretrained_cfg
    for key in ("mean", "std"):
        setattr(backbone, key, 255 * torch.tensor(about[key]).double().view(3, 1, 1))
    return backbone


def twin(network: nn.Module, name: str, kwargs: dict[str, Any]) -> Backbone:
    """Return the backbone of a network, as a teacher has it."""
    backbone = exact(build_whole(name, kwargs=kwargs).backbone)
    own = backbone.body.state_dict()
    backbone.body.load_state_dict({key: network.state_dict()[key] for key in own})
    return backbone


def same(got: Tensor, expected: Tensor, *, rounding: float = ROUNDING) -> bool:
    return bool((got - expected).abs().max() < rounding * expected.abs().max())


@pytest.mark.parametrize("name", TOKENS)
def test_recentred_patches_have_the_class_token_as_mean_and_keep_their_differences(
    name: str,
) -> None:
    kwargs, size, prefix = TOKENS[name]
    torch.manual_seed(0)
    network = randomised(timm.create_model(name, **kwargs))
    backbone = twin(network, name, kwargs)
    batch = images(0, 2, size)
    tokens = network.forward_features(normalised(network, batch))  # (B, prefix + N, C)
    bare = backbone(batch)
    backbone.recentre()
    maps = backbone(batch)
    grid = maps.shape[2]
    assert tokens.shape[1] == prefix + grid**2
    assert same(maps.mean((2, 3)), tokens[:, 0])
    for row in range(grid):
        for column in range(grid):
            token = tokens[:, prefix + row * grid + column]
            assert same(bare[:, :, row, column], token)
            difference = maps[:, :, row, column] - maps[:, :, 0, 0]
            assert same(token - tokens[:, prefix], difference) or row == column == 0


def test_a_head_on_recentred_patches_gives_its_output_on_the_class_token() -> None:
    torch.manual_seed(1)
    kwargs = {**SMALL_VIT, "img_size": 64}
    backbone = build_whole("vit_small_patch16_dinov3", kwargs=kwargs).backbone
    body: Any = randomised(backbone.body)
    exact(backbone).recentre()
    head = nn.Sequential(
        nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(),
        nn.Linear(32, 8),
    )  # fmt: skip
    batch = images(1, 2, 64)
    token = body.forward_features(normalised(body, batch))[:, 0]
    for rule in ("gate", "tangent"):
        teacher = FrozenTeacher(backbone, head.double(), rule=rule)
        assert same(teacher(batch).mean((2, 3)), head(token))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
def test_networks_without_a_vector_of_their_own_are_not_recentred(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokens=recentred, but {name} has neither class token"):
        build_backbone(name).recentre()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_positions_are_interpolated_as_timm_does_once_and_for_all(name: str) -> None:
    kwargs, size, _ = TOKENS[name]
    patch = 14 if "14" in name else 16
    other = size + 2 * patch
    torch.manual_seed(2)
    backbone = exact(build_whole(name, kwargs=kwargs).backbone)
    randomised(backbone.body)
    fixed: Any = timm.create_model(name, **kwargs, num_classes=0, global_pool="").eval().double()
    fixed.load_state_dict(backbone.body.state_dict())
    fixed.set_input_size((other, other))
    batch = images(2, 1, other)
    expected = fixed.forward_features(normalised(fixed, batch))[:, fixed.num_prefix_tokens :]
    assert same(backbone(batch).flatten(2).transpose(1, 2), expected)
    grid = other // patch
    assert map_shape(backbone, other) == (48, grid, grid)


@pytest.mark.parametrize(
    ("size", "near"), [(65, "64 or 80"), (79, "64 or 80"), (9, "16"), (96 + 15, "96 or 112")]
)
def test_an_image_that_patches_do_not_divide_is_refused(size: int, near: str) -> None:
    backbone = build_whole("vit_tiny_patch16_224", kwargs={**SMALL_VIT, "img_size": 64}).backbone
    message = rf"x\.y={size} does not split into the 16 px patches of vit_tiny.*; use {near}$"
    with pytest.raises(ConfigError, match=message):
        map_shape(backbone, size, option="x.y")


# networks whose head acts behind the mean: name: kwargs, layers in front of the classifier
BEHIND_POOLING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "test_convnext": ({}, ["LayerNorm"]),
    "test_mambaout": ({}, ["LayerNorm", "Linear", "GELU"]),
    "convnext_large_mlp": (
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "head_hidden_size": 40},
        ["LayerNorm", "Linear", "GELU"],
    ),
    "mobilenetv3_small_050": ({}, ["Linear", "Hardswish"]),
    "mobilenetv4_conv_small_050": ({}, ["Linear", "BatchNorm1d", "ReLU"]),
    "ghostnet_050": ({}, ["Linear", "ReLU"]),
    "eva02_tiny_patch14_224": (SMALL_EVA02, ["LayerNorm"]),
    "beit_base_patch16_224": ({**SMALL_VIT, "img_size": 64}, ["LayerNorm"]),
}


@pytest.mark.parametrize("rule", ["gate", "tangent"])
@pytest.mark.parametrize("name", BEHIND_POOLING)
def test_layers_behind_timms_pooling_are_a_head_whose_law_is_timms_embedding(
    name: str, rule: str
) -> None:
    kwargs, layers = BEHIND_POOLING[name]
    size = kwargs.get("img_size", 64)
    torch.manual_seed(3)
    network: Any = randomised(timm.create_model(name, **kwargs))
    backbone = twin(network, name, kwargs)
    head = own_head(backbone.body, None, recentred=False)
    assert head is not None
    assert [type(layer).__name__ for layer in head] == layers
    teacher = FrozenTeacher(backbone, head, rule=rule).double()
    batch = images(3, 2, size)
    features = network.forward_features(normalised(network, batch))
    expected = network.forward_head(features, pre_logits=True)
    assert same(teacher(batch).mean((2, 3)), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_networks_that_classify_the_mean_itself_have_no_head(name: str) -> None:
    assert own_head(build_whole(name).backbone.body, None, recentred=False) is None


_STAGES = [
    {"type": "bottle", "d": 1, "c": 256 * 2**i, "s": 2 if i else 1, "br": 0.25} for i in range(4)
]
CLIP: dict[str, dict[str, Any]] = {
    "resnet50_clip": {
        "blocks": tuple(ByoBlockCfg(**stage) for stage in _STAGES), "width_factor": 0.125,
        "num_classes": 24,
    },
    "vit_base_patch16_clip_224.openai": {**SMALL_VIT, "img_size": 64, "num_classes": 24},
    "convnext_base.clip_laion2b": {
        "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 24,
    },
    "convnext_large_mlp.clip_laion2b_augreg": {
        "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "head_hidden_size": 40, "num_classes": 24,
    },
}  # fmt: skip


def clip_teacher(name: str, uri: str, **teacher: Any) -> Config:
    kwargs = {key: value for key, value in CLIP[name].items() if key != "num_classes"}
    return tiny_config(teacher={"arch": name, "weights": uri, "kwargs": kwargs, **teacher})


def built(config: Config) -> Method:
    return build_method(config, [(load_teacher(config.teacher), None)], device=torch.device("cpu"))


@pytest.mark.parametrize("name", CLIP)
def test_clips_pixels_have_its_text_aligned_embedding_as_mean(name: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    network: Any = randomised(timm.create_model(name, **CLIP[name]).float())
    uri = stored(tmp_path / "clip.safetensors", network)
    network.load_state_dict(safetensors.torch.load_file(uri))  # what float32 keeps of it
    method = built(clip_teacher(name, uri, head="auto"))
    assert method.branches[0].identity.head == "published"
    assert method.branches[0].queue.negatives.shape[1] == 24
    assert method.branches[0].law_error < 1e-12
    batch = images(4, 2, 64)
    expected = network(normalised(network, batch))  # timm's whole forward
    exact(method.branches[0].teacher.double().backbone)
    assert same(method.branches[0].teacher(batch).mean((2, 3)), expected)


@pytest.mark.parametrize("head_type", ["attn_abs", "attn_rot"])
def test_positions_of_an_attention_pool_differ_by_their_projected_values(head_type: str) -> None:
    torch.manual_seed(5)
    kwargs = {**CLIP["resnet50_clip"], "head_type": head_type}
    network: Any = randomised(timm.create_model("resnet50_clip", **kwargs))
    backbone = twin(network, "resnet50_clip", kwargs)
    projection = clip_projection("resnet50_clip", network.get_classifier().state_dict())
    batch = images(5, 2, 96)  # 3 x 3 positions
    features = network.forward_features(normalised(network, batch))
    pool = network.head
    dense = torch.einsum(
        "ev,vc,bchw->behw", pool.proj.weight, pool.v.weight, features
    )  # (B, 24, 3, 3)

    bare = own_head(backbone.body, projection, recentred=False)
    maps = FrozenTeacher(backbone, bare, rule="gate").double()(batch)
    offset = pool.proj(pool.v.bias)
    assert same(maps, dense + offset[:, None, None])  # MaskCLIP's

    backbone.recentre()
    head = own_head(backbone.body, projection, recentred=True)
    maps = FrozenTeacher(backbone, head, rule="gate").double()(batch)
    assert same(maps.mean((2, 3)), network(normalised(network, batch)))
    assert same(maps - maps[:, :, :1, :1], dense - dense[:, :, :1, :1])


def test_a_fused_attention_pool_has_its_values_last() -> None:
    torch.manual_seed(6)
    pool: Any = timm.layers.attention_pool2d.AttentionPool2d(16, feat_size=2, head_dim=8)
    assert pool.qkv is not None
    body = nn.Module()
    body.head = randomised(pool)
    x = torch.randn(1, 16, 2, 2, dtype=torch.float64)
    weight, bias = value_weights(pool)
    tokens = x.flatten(2).transpose(1, 2)
    assert bias is not None
    expected = pool.qkv(tokens).reshape(1, 4, 3, 16)[:, :, 2]
    assert same(tokens @ weight.T + bias, expected)
    assert same(recentred_map(x, x, body).mean((2, 3)), pool(x, pre_logits=True))


def test_clip_that_was_tuned_to_classes_has_no_projection(tmp_path: Path) -> None:
    name = "vit_base_patch16_clip_224.openai"
    kwargs = {**CLIP[name], "num_classes": 1000}
    uri = stored(tmp_path / "tuned.safetensors", timm.create_model(name, **kwargs))
    assert load_teacher(clip_teacher(name, uri, head="auto").teacher).identity.head == "pca"
    with pytest.raises(WeightsError, match=r"head=published, but .*tuned.safetensors holds no"):
        load_teacher(clip_teacher(name, uri, head="published").teacher)


def test_the_map_that_a_head_was_trained_on_is_chosen_and_can_be_overruled(
    tmp_path: Path,
) -> None:
    name = "vit_base_patch16_clip_224.openai"
    uri = stored(tmp_path / "clip.safetensors", timm.create_model(name, **CLIP[name]))
    for head, tokens, recentred in (
        ("auto", "auto", True),
        ("auto", "patches", False),
        ("pca", "auto", False),
        ("pca", "recentred", True),
        ("none", "auto", False),
    ):
        config = clip_teacher(name, uri, head=head, tokens=tokens)
        assert load_teacher(config.teacher).backbone.recentred == recentred, (head, tokens)
    # trained on averages of patches: timm's network, and a head that we have trained
    averaging = {"arch": "eva02_tiny_patch14_224", "kwargs": TOKENS["eva02_tiny_patch14_224"][0]}
    uri = stored(
        tmp_path / "eva.safetensors",
        timm.create_model(averaging["arch"], **averaging["kwargs"], num_classes=0),
    )
    config = tiny_config(teacher={**averaging, "weights": uri, "head": "published"})
    assert not load_teacher(config.teacher).backbone.recentred
    ours = str(tmp_path / "ours.safetensors")
    backbone = build_backbone("test_vit")
    save_teacher(ours, backbone, nn.Sequential(nn.Linear(64, 8)), activation="relu", licence="MIT")
    config = tiny_config(teacher={"arch": "test_vit", "weights": ours, "head": "auto"})
    assert not load_teacher(config.teacher).backbone.recentred
    resnet = stored(tmp_path / "resnet.safetensors", build_backbone("test_resnet").body)
    config = tiny_config(teacher={"weights": resnet, "tokens": "recentred"})
    with pytest.raises(ConfigError, match="tokens=recentred, but test_resnet has neither"):
        load_teacher(config.teacher)


def test_the_queue_takes_the_heads_output_on_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(7)
    name = "vit_base_patch16_clip_224.openai"
    network: Any = randomised(timm.create_model(name, **CLIP[name]))
    uri = stored(tmp_path / "clip.safetensors", network)
    config = clip_teacher(name, uri, head="auto")
    student = {"backbone": "test_resnet"}
    method = built(tiny_config(teacher=vars_of(config), student=student))
    batch = images(7, 3, 64)
    views = ViewBatch(batch, batch, torch.ones(3, 5), torch.ones(3, 5))
    result = distill_step(method.student, method.branches, views)[0]
    expected = nn.functional.normalize(network(normalised(network, batch)), dim=1)
    # a whole network in float32
    torch.testing.assert_close(result.keys.double(), expected, rtol=0, atol=1e-4)


def vars_of(config: Config) -> dict[str, Any]:
    teacher = config.teacher
    return {name: getattr(teacher, name) for name in ("arch", "weights", "kwargs", "head")}


def test_a_head_without_linear_layers_leaves_the_student_its_own(tmp_path: Path) -> None:
    name = "test_convnext"
    uri = stored(tmp_path / "convnext.safetensors", timm.create_model(name))
    teacher = {"arch": name, "weights": uri, "head": "published"}
    method = built(tiny_config(teacher=teacher))
    assert [layer.out_channels for layer in method.student.heads[0]] == [64]
    assert method.branches[0].law_error < 1e-12
    assert load_teacher(tiny_config(teacher={**teacher, "head": "auto"}).teacher).identity.head == (
        "pca"
    )


def test_layers_that_cannot_be_adapted_are_named() -> None:
    body: Any = build_whole("test_convnext").backbone.body
    body.head.norm = nn.Tanh()
    story = r"behind its pooling .* has Tanh, .*head=pca, contrastive or none"
    with pytest.raises(WeightsError, match=story):
        own_head(body, None, recentred=False)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "convnext_large_mlp"])
def test_weights_named_with_and_without_pooling_are_both_read(name: str, tmp_path: Path) -> None:
    kwargs = BEHIND_POOLING[name][0]
    size = kwargs.get("img_size", 64)
    published = randomised(timm.create_model(name, **kwargs, num_classes=0).float())
    ours = randomised(build_backbone(name, kwargs=kwargs).body.float())
    shapes = [{k: v.shape for k, v in body.state_dict().items()} for body in (published, ours)]
    assert shapes[0] != shapes[1]
    for body in (published, ours):
        uri = stored(tmp_path / "weights.safetensors", body)
        teacher = {"arch": name, "kwargs": kwargs, "weights": uri, "head": "none"}
        backbone = load_teacher(tiny_config(teacher=teacher).teacher).backbone
        expected = build_backbone(name, kwargs=kwargs)
        expected.body = body.float()
        batch = images(8, 1, size)
        torch.testing.assert_close(backbone(batch), expected(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet50_clip", "vit_base_patch16_clip_224.openai"])
def test_a_recentred_teacher_compiles_whole_and_keeps_its_mean_under_autocast(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    uri = stored(tmp_path / "clip.safetensors", randomised(timm.create_model(name, **CLIP[name])))
    teacher = built(clip_teacher(name, uri, head="auto")).branches[0].teacher
    batch = images(9, 2, 64)
    expected = teacher(batch)
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = teacher.backbone(batch)
        assert maps.dtype == torch.float32
        pooled = teacher.adaptor(maps).float().mean((2, 3))
    # a whole network in 8 bits
    assert (pooled - expected.mean((2, 3))).norm() < 0.05 * pooled.norm()
