"""Weights under other libraries' names are the same networks under timm's."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from published import save, settled
from timm.models.eva import checkpoint_filter_fn as eva_from_hub
from timm.models.vision_transformer import checkpoint_filter_fn as vit_from_hub
from tiny import images
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from pcd_ray.config import Config, TeacherConfig
from pcd_ray.distill.build_teacher import LoadedTeacher, load_teacher
from pcd_ray.distill.networks import Network
from pcd_ray.distill.teacher_parts import TeacherParts, take_apart
from pcd_ray.distill.weights import WeightsFile
from pcd_ray.errors import WeightsError
from pcd_ray.evaluate.students import open_rows

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]


def parts_of(state: State) -> TeacherParts:
    return take_apart(WeightsFile("memory.pth", state, {}, ""))


def load(state: State, folder: Path, **options: Any) -> LoadedTeacher:
    path = save(state, folder / "weights.pth")
    return load_teacher(TeacherConfig(weights=path, head="none", **options))


def network(name: str, **kwargs: Any) -> nn.Module:
    """A timm network of random weights, none of which is 0 or 1 by its first values."""
    torch.manual_seed(0)
    body = timm.create_model(name, num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(torch.randn_like(parameter) / 20)
    return settled(body)


def renamed(state: State, rules: Rules) -> State:
    named: State = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def split_attention(state: State, names: tuple[str, str, str]) -> State:
    """Split ``...qkv.weight`` into three projections."""
    split: State = {}
    for key, value in state.items():
        if "qkv." not in key:
            split[key] = value
            continue
        for name, part in zip(names, value.chunk(3), strict=True):
            split[key.replace("qkv", name)] = part
    return split


def same(parts: TeacherParts, expected: State) -> None:
    assert parts.backbone.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(parts.backbone[key], value, msg=key)


# transformers

_V4: Rules = (
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"^norm\.", "layernorm."),
)
_V4_VIT: Rules = (
    *_V4,
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_V4_DINOV2: Rules = (*_V4, (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"))
_V5: Rules = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_V5_DINOV2: Rules = (_V5[1], _V5[2])
_OLD, _NEW = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")
TRANSFORMERS = {
    "ViT": ("vit_tiny_patch16_224", _V4_VIT, _OLD),
    "ViT, version 5": ("vit_tiny_patch16_224", _V4_VIT + _V5, _NEW),
    "DINOv2": ("vit_small_patch14_dinov2", _V4_DINOV2, _OLD),
    "DINOv2, version 5": ("vit_small_patch14_dinov2", _V4_DINOV2 + _V5_DINOV2, _NEW),
}


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_vision_transformer_of_transformers_is_timms(name: str, prefix: str) -> None:
    arch, rules, projections = TRANSFORMERS[name]
    expected = dict(network(arch).state_dict())
    theirs = split_attention(renamed(expected, rules), projections)
    theirs["embeddings.mask_token"] = torch.ones(1, 1, 192)
    parts = parts_of({f"{prefix}{key}": value for key, value in theirs.items()})
    assert isinstance(parts.network, Network)
    assert parts.network.timm_name == arch
    same(parts, expected)
    assert parts.notes[-1] == "converted from transformers names to timm's"
    assert set(parts.unused) == {f"{prefix}embeddings.mask_token"}


@pytest.mark.parametrize("beside", ["pooler.dense.weight", "classifier.weight"])
def test_a_supervised_one_leaves_its_input_statistics_open(beside: str) -> None:
    state = dict(network("vit_tiny_patch16_224").state_dict())
    theirs = split_attention(renamed(state, _V4_VIT), _OLD)
    if beside.startswith("classifier"):
        theirs = {f"vit.{key}": value for key, value in theirs.items()}
    parts = parts_of({**theirs, beside: torch.ones(192, 192)})
    assert "deit_* ImageNet's" in str(parts.network)
    same(parts, state)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_of_transformers_is_timms(arch: str) -> None:
    expected = dict(network(arch).state_dict())
    theirs: State = {}
    for key, value in expected.items():
        new = re.sub(r"^conv1\.", "embedder.embedder.convolution.", key)
        new = re.sub(r"^bn1\.", "embedder.embedder.normalization.", new)
        new = re.sub(r"\.downsample\.0\.", ".shortcut.convolution.", new)
        new = re.sub(r"\.downsample\.1\.", ".shortcut.normalization.", new)
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", new):
            new = f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.{match[3]}"
        for short, word in (("conv", "convolution"), ("bn", "normalization")):
            if match := re.fullmatch(rf"(encoder.+)\.{short}(\d)\.(\w+)", new):
                new = f"{match[1]}.layer.{int(match[2]) - 1}.{word}.{match[3]}"
        theirs[f"resnet.{new}"] = value
    theirs["classifier.1.weight"] = torch.ones(10, 512)
    parts = parts_of(theirs)
    assert parts.network == Network(arch)
    same(parts, expected)


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone.", "module.encoder.0."])
def test_a_resnet_in_a_sequential_is_timms(prefix: str) -> None:
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    expected = dict(network("resnet18").state_dict())
    theirs: State = {}
    for key, value in expected.items():
        child, _, rest = key.partition(".")
        theirs[f"{prefix}{places[child]}.{rest}"] = value
    parts = parts_of(theirs)
    assert parts.network == Network("resnet18")
    same(parts, expected)


@pytest.mark.parametrize("classifier", ["last_linear.", "fc.1.", "fc.0."])
def test_a_resnet_with_another_classifier_is_a_teacher(classifier: str, tmp_path: Path) -> None:
    state = dict(network("resnet18").state_dict())
    state |= {f"{classifier}weight": torch.ones(10, 512), f"{classifier}bias": torch.ones(10)}
    teacher = TeacherConfig(weights=save(state, tmp_path / "weights.pth"), head="none")
    assert load_teacher(teacher).identity.arch == "resnet18"
    assert "fc." in parts_of(state).unused


# hubs of DINOv2 and DINOv3


def dinov2_hub(state: State, *, registers: bool) -> State:
    """Name a state dict as DINOv2's hub does, where the class token has a position."""
    hub = {**state, "mask_token": torch.ones(1, 384)}
    if registers:
        position = torch.randn(1, 1, 384)
        hub["register_tokens"] = hub.pop("reg_token")
        hub["cls_token"] = state["cls_token"] - position
        hub["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    return hub


@pytest.mark.parametrize("registers", [False, True])
def test_a_file_of_dinov2s_hub_is_read_as_timm_reads_it(registers: bool) -> None:
    arch = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    body = network(arch)
    hub = dinov2_hub(dict(body.state_dict()), registers=registers)
    parts = parts_of(hub)
    same(parts, vit_from_hub(dict(hub), body))
    same(parts, dict(body.state_dict()))
    assert str(parts.network).startswith(f"{arch} (img_size=518")
    assert "mask_token" in parts.unused
    chunked = {re.sub(r"^blocks\.", "blocks.0.", key): value for key, value in hub.items()}
    same(parts_of(chunked), dict(body.state_dict()))  # as in its training


def test_the_gated_mlps_of_dinov2s_largest_are_told() -> None:
    with torch.device("meta"):
        state = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0).state_dict()
    hub = {key: torch.ones(()).expand(value.shape) for key, value in state.items()}
    hub = renamed(hub, ((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")))
    hub["register_tokens"] = hub.pop("reg_token")
    hub["pos_embed"] = torch.ones(()).expand(1, 1370, 1536)
    parts = parts_of(hub)
    assert str(parts.network).startswith("vit_giant_patch14_reg4_dinov2")
    assert {k: v.shape for k, v in parts.backbone.items()} == {k: v.shape for k, v in state.items()}


_DINOV3: Rules = (
    ("^reg_token$", "storage_tokens"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("size", ["small", "small_plus"])
def test_a_file_of_dinov3s_hub_is_read_as_timm_reads_it(size: str, biases: bool) -> None:
    arch = f"vit_{size}_patch16_dinov3{'_qkvb' if biases else ''}"
    body = network(arch)
    expected = dict(body.state_dict())
    rules = (*_DINOV3, (r"\.mlp\.fc2\.", ".mlp.w3.")) if size == "small_plus" else _DINOV3
    hub = renamed(expected, rules)
    for block in range(12):
        name = f"blocks.{block}.attn"
        query = hub.pop(f"{name}.q_bias", torch.zeros(384))
        values = hub.pop(f"{name}.v_bias", torch.zeros(384))
        hub[f"{name}.qkv.bias"] = torch.cat([query, torch.randn(384), values])
        ones = torch.ones(384)
        hub[f"{name}.qkv.bias_mask"] = torch.cat([ones, torch.zeros(384), ones])
    hub |= {"mask_token": torch.ones(1, 384), "rope_embed.periods": torch.ones(16)}
    parts = parts_of(hub)
    assert parts.network == Network(arch)
    same(parts, expected)
    same(parts, eva_from_hub(dict(hub), body))


def test_dinov3_of_transformers_is_timms() -> None:
    for arch in ("vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"):
        expected = dict(network(arch).state_dict())
        gated = "plus" in arch
        rules: Rules = (
            (r"^blocks\.", "layer."),
            (r"^reg_token$", "embeddings.register_tokens"),
            (r"^cls_token$", "embeddings.cls_token"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
            (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
            (r"\.attn\.proj\.", ".attention.o_proj."),
            (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
            (r"\.attn\.qkv\.", ".attention.qkv."),
            (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
            (r"\.mlp\.fc1_x\." if gated else r"\.mlp\.fc1\.", ".mlp.up_proj."),
            (r"\.mlp\.fc2\.", ".mlp.down_proj."),
        )
        parts = parts_of(split_attention(renamed(expected, rules), _NEW))
        assert parts.network == Network(arch)
        same(parts, expected)


# torchvision


def test_torchvisions_vision_transformer_gives_its_own_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=10).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    loaded = load(dict(theirs.state_dict()), tmp_path)
    assert loaded.identity.arch == "vit_tiny_patch16_224"
    batch = images(0, 1, 224)
    with torch.no_grad():
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        tokens = theirs._process_input(((batch / 255 - mean) / std).permute(0, 3, 1, 2))
        tokens = theirs.encoder(torch.cat([theirs.class_token, tokens], 1))[:, 1:]
        expected = tokens.transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(loaded.backbone(batch), expected, rtol=1e-4, atol=1e-4)


# EfficientNet-PyTorch

_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of its stages


def efficientnet(arch: str) -> State:
    """Return the state dict of a timm EfficientNet as efficientnet_pytorch names it."""
    state: State = {}
    numbers: dict[str, int] = {}
    for key, value in network(arch).state_dict().items():
        match = re.fullmatch(r"blocks\.(\d+\.\d+)\.(.+)", key)
        if match is None:
            new = key.replace("bn2.", "_bn1.") if key.startswith("bn2.") else key
            new = new.replace("bn1.", "_bn0.") if new.startswith("bn1.") else new
            state[re.sub(r"^conv_", "_conv_", new)] = value
            continue
        number = numbers.setdefault(match[1], len(numbers))
        norms = (("bn1.", "_bn1."), ("bn2.", "_bn2."), ("conv_pw.", "_project_conv."))
        if not match[1].startswith("0."):
            norms = (("bn3.", "_bn2."), ("bn2.", "_bn1."), ("bn1.", "_bn0."))
            norms += (("conv_pwl.", "_project_conv."), ("conv_pw.", "_expand_conv."))
        new = match[2].replace("conv_dw.", "_depthwise_conv.").replace("se.conv_", "_se_")
        for ours, theirs in norms:
            if new.startswith(ours):
                new = new.replace(ours, theirs)
                break
        state[f"_blocks.{number}.{new}"] = value
    return state


def efficientnet_features(state: State, x: Tensor, *, lite: bool) -> Tensor:
    """The forward pass of efficientnet_pytorch's ``extract_features``, in plain functions."""
    act = F.relu6 if lite else F.silu

    def conv(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        size = weight.shape[2]
        pad = max((-(-x.shape[2] // stride) - 1) * stride + size - x.shape[2], 0)
        x = F.pad(x, [pad // 2, pad - pad // 2] * 2)  # TensorFlow's "same"
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, groups=groups)

    def norm(name: str, x: Tensor) -> Tensor:
        of = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *of, eps=1e-3)

    x = act(norm("_bn0", conv("_conv_stem", x, 2)))
    width, stage, number = 0, -1, 0
    while f"_blocks.{number}._project_conv.weight" in state:
        block = f"_blocks.{number}"
        out = len(state[f"{block}._project_conv.weight"])
        stage += out != width
        stride = _STRIDES[stage] if out != width else 1
        width, before, number = out, x, number + 1
        if f"{block}._expand_conv.weight" in state:
            x = act(norm(f"{block}._bn0", conv(f"{block}._expand_conv", x)))
        x = act(norm(f"{block}._bn1", conv(f"{block}._depthwise_conv", x, stride, x.shape[1])))
        if not lite:
            gate = conv(f"{block}._se_reduce", x.mean((2, 3), keepdim=True))
            x = x * conv(f"{block}._se_expand", F.silu(gate)).sigmoid()
        x = norm(f"{block}._bn2", conv(f"{block}._project_conv", x))
        x = x + before if x.shape == before.shape else x
    return act(norm("_bn1", conv("_conv_head", x)))


@pytest.mark.parametrize("size", ["b0", "lite0"])
def test_an_efficientnet_of_tensorflows_padding_gives_its_own_features(
    size: str, tmp_path: Path
) -> None:
    state = efficientnet(f"tf_efficientnet_{size}")
    state |= {"_fc.weight": torch.ones(10, 1280), "_fc.bias": torch.ones(10)}
    loaded = load({f"module.{key}": value for key, value in state.items()}, tmp_path)
    assert loaded.identity.arch == f"tf_efficientnet_{size}"
    batch = images(0, 1, 64)
    with torch.no_grad():
        x = (batch.permute(0, 3, 1, 2) - loaded.backbone.mean) / loaded.backbone.std
        expected = efficientnet_features(state, x, lite=size == "lite0")
        got = loaded.backbone(batch)
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


SIZES = [*(f"b{n}" for n in range(9)), "l2", *(f"lite{n}" for n in range(5))]


@pytest.mark.parametrize("size", SIZES)
def test_every_efficientnet_is_told_from_its_blocks(size: str) -> None:
    arch = f"tf_efficientnet_{size}"
    with torch.device("meta"):
        state = efficientnet(arch)
        body = timm.create_model(arch, num_classes=0)
    parts = parts_of(state)
    assert (parts.layout, parts.network) == ("efficientnet_pytorch", Network(arch))
    own = body.state_dict()
    assert {k: v.shape for k, v in parts.backbone.items()} == {k: v.shape for k, v in own.items()}


def test_an_efficientnet_of_another_padding_is_not_taken_for_it(tmp_path: Path) -> None:
    state = efficientnet("tf_efficientnet_lite0")
    for arch in ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0"):
        assert load(state, tmp_path, arch=arch).identity.arch == arch
    with pytest.raises(WeightsError, match=r"holds a tf_efficientnet_lite0 .*teacher.arch=tf_effi"):
        load(state, tmp_path, arch="efficientnet_lite0")


# names that are not converted

FOREIGN = {
    "torchvision": ("features.1.block.0.0.weight", "mobilenetv3_large_100", "torchvision's names"),
    "CLIP": ("visual.class_embedding", "vit_base_patch16_clip_224.openai", "CLIP or SigLIP"),
    "Swin": ("encoder.layers.0.blocks.0.layernorm_before.weight", "", "transformers"),
    "Detectron2": ("stem.conv1.norm.weight", "", "Detectron2's names"),
    "ConvNeXt": ("downsample_layers.0.0.weight", "convnext", "ConvNeXt's or DINOv3's authors"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_names_are_said_and_no_network_is_asked_for(name: str, tmp_path: Path) -> None:
    key, instead, whose = FOREIGN[name]
    state = {key: torch.ones(3), "norm.weight": torch.ones(3), "stem.0.weight": torch.ones(3)}
    for arch in ("", "resnet18"):
        with pytest.raises(WeightsError, match=f"{whose}.*{instead}") as refused:
            load(state, tmp_path, arch=arch)
        assert "teacher.arch" not in str(refused.value)
    with pytest.raises(WeightsError, match=f"{whose}.*{instead}") as refused:
        open_rows([str(tmp_path / "weights.pth")], Config())
    assert "TIMM_NAME" not in str(refused.value)
