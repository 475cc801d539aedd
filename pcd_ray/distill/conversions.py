"""Weights under the names of other libraries and hubs -> timm's names.

Facts from the public code of facebookresearch/{dinov2, dinov3}, huggingface/transformers,
pytorch/vision, open-mmlab/mmpretrain and lukemelas/EfficientNet-PyTorch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pcd_ray.distill.networks import Network, efficientnet_of, network_of

_State = dict[str, Tensor]
_MASK = "the mask token of its own training"
_ROPE = "computed from the width"
_LOCAL_NORM = "the norm of local crops in its own training"
EFFICIENTNET_NAMES = "efficientnet_pytorch"
"""Names that say more than timm's do: the padding, which timm's networks differ in."""
POOLER = "a layer behind the class token, which the map does not depend on"


@dataclass(frozen=True, slots=True)
class Converted:
    """A state dict under timm's names."""

    tensors: _State
    naming: str = ""
    """Whose names they were; empty: timm's own."""
    network: Network | str = ""
    """The network, or why it is not known."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys, in the file's own naming, that were left out, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How a library or hub names a network that timm has too."""

    name: str
    marks: tuple[str, ...]
    """Keys that occur together in this naming alone."""
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    """Patterns and replacements, all applied in this order."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Patterns of keys that timm's network has not, and why it can do without."""
    finish: Callable[[_State], _State] = dict
    """What remains to do on renamed tensors: join, split, add."""


def convert(state: Mapping[str, Tensor], *, mocov3: bool = False) -> Converted:
    """Return a backbone's weights under timm's names, and the network they are of.

    Args:
        state: the weights, without prefixes of tools.
        mocov3: as of `network_of`.
    """
    naming = naming_of(state)
    if naming is None:
        return Converted(dict(state), network=network_of(state, mocov3=mocov3))
    renamed: _State = {}
    dropped: dict[str, str] = {}
    for key, value in state.items():
        why = next((why for p, why in naming.dropped.items() if re.search(p, key)), None)
        if why is not None:
            dropped[key] = why
            continue
        new = key
        for pattern, replacement in naming.rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    if naming is _EFFICIENTNET:
        return _efficientnet(renamed)
    tensors = naming.finish(renamed)
    return Converted(tensors, naming.name, network_of(tensors, mocov3=mocov3), dropped)


def naming_of(state: Mapping[str, Tensor]) -> Naming | None:
    """Return the naming of a state dict; None: timm's, or one that is not converted."""
    return next((each for each in NAMINGS if all(mark in state for mark in each.marks)), None)


def foreign_names(state: Mapping[str, Tensor]) -> str:
    """Say whose names a state dict has that is not converted, and what to take instead; or ''."""
    for pattern, whose, instead in _FOREIGN:
        if any(re.match(pattern, key) for key in state):
            return f"has {whose}, which are not converted; {instead}"
    return ""


def _joined_attention(state: _State) -> _State:
    """Join the projections to queries, keys and values; one that lacks its bias has 0."""
    joined: _State = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(\w+)", key)
        if match is None:
            joined[key] = value
        elif match[2] == "q":
            names = [f"{match[1]}{each}_proj.{match[3]}" for each in "qkv"]
            parts = [state.get(name, torch.zeros_like(value)) for name in names]
            joined[f"{match[1]}qkv.{match[3]}"] = torch.cat(parts)
    return joined


def _with_registers(state: _State) -> _State:
    """Move the class token's position into the token: there timm has it beside registers."""
    if "reg_token" not in state:
        return state
    positions = state["pos_embed"]
    token = state["cls_token"] + positions[:, :1]
    return {**state, "cls_token": token, "pos_embed": positions[:, 1:]}


def _dinov3_biases(state: _State) -> _State:
    """Split the biases of attention: that of keys is masked, all are 0 in some networks."""
    biases = {k: v for k, v in state.items() if k.endswith("attn.qkv.bias")}
    kept = {k: v for k, v in state.items() if k not in biases}
    split: _State = {}
    for key, value in biases.items():
        query, _, values = value.chunk(3)
        stem = key.removesuffix("qkv.bias")
        split |= {f"{stem}q_bias": query.contiguous(), f"{stem}v_bias": values.contiguous()}
    return kept | split if any(bool(value.any()) for value in split.values()) else kept


def _transformers_vit(state: _State) -> _State:
    return _with_registers(_joined_attention(state))


def _transformers_dinov3(state: _State) -> _State:
    return _dinov3_biases(_joined_attention(state))


_BLOCK = (r"^(?:model\.)?(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1.")
_PATCHES = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings")
_TRANSFORMERS_VIT = Naming(
    name="transformers",
    marks=(*_PATCHES, "encoder.layer.0.attention.attention.query.weight"),
    rules=(
        _BLOCK,
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.", ""),
        (r"\.attention\.attention\.query\.", ".attn.q_proj."),
        (r"\.attention\.attention\.key\.", ".attn.k_proj."),
        (r"\.attention\.attention\.value\.", ".attn.v_proj."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.", ".attn."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
        (r"\.(?:output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ),
    dropped={r"^embeddings\.mask_token$": _MASK, r"^pooler\.": POOLER},
    finish=_transformers_vit,
)
_TRANSFORMERS_DINOV3 = Naming(
    name="transformers",
    marks=("embeddings.patch_embeddings.weight", "embeddings.register_tokens"),
    rules=(
        _BLOCK,
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.", ""),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.attention\.", ".attn."),
        (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    ),
    dropped={r"^embeddings\.mask_token$": _MASK, r"rope_embeddings\.": _ROPE},
    finish=lambda state: _transformers_dinov3(_with_up_projection(state)),
)


def _with_up_projection(state: _State) -> _State:
    """Name the first layer of MLPs, which is one of two where they are gated."""
    gated = any(key.endswith(".mlp.fc1_g.weight") for key in state)
    name = ".mlp.fc1_x." if gated else ".mlp.fc1."
    return {key.replace(".mlp.up_proj.", name): value for key, value in state.items()}


_DINOV2 = Naming(
    name="DINOv2's hub",
    marks=("register_tokens", "patch_embed.proj.weight"),
    rules=(
        (r"^register_tokens$", "reg_token"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # of training, in chunks
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    dropped={r"^mask_token$": _MASK},
    finish=_with_registers,
)
_TRANSFORMERS_RESNET = Naming(
    name="transformers",
    marks=(
        "embedder.embedder.convolution.weight",
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
    ),
    rules=(
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"\.layer\.(\d+)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
        (r"\.layer\.(\d+)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
    ),
)
_SEQUENTIAL_RESNET = Naming(
    name="nn.Sequential",
    marks=("0.weight", "1.running_mean", "4.0.conv1.weight", "7.0.conv1.weight"),
    rules=(
        (r"^0\.", "conv1."),
        (r"^1\.", "bn1."),
        (r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}."),
    ),
)
"""A ResNet's children in a row, as lightly and many scripts cut off its classifier."""
_PRETRAINEDMODELS_RESNET = Naming(
    name="pretrainedmodels",
    marks=("last_linear.weight", "conv1.weight", "layer1.0.conv2.weight"),
    rules=((r"^last_linear\.", "fc."),),
)
_DINOV3 = Naming(
    name="DINOv3's hub",
    marks=("storage_tokens", "blocks.0.attn.qkv.weight"),
    rules=(
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    dropped={
        r"^mask_token$": _MASK,
        r"^local_cls_norm\.": _LOCAL_NORM,
        r"^rope_embed\.": _ROPE,
        r"\.bias_mask$": "the mask that zeroes the key bias",
    },
    finish=_dinov3_biases,
)
_TORCHVISION_VIT = Naming(
    name="torchvision",
    marks=("conv_proj.weight", "class_token", "encoder.pos_embedding"),
    rules=(
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
        (r"^heads\.head\.", "head."),
    ),
)
_MMPRETRAIN_VIT = Naming(
    name="mmpretrain",
    marks=("patch_embed.projection.weight",),
    rules=(
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^ln1\.", "norm."),
        (r"^layers\.(\d+)\.", r"blocks.\1."),
        (r"\.ln([12])\.", r".norm\1."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ),
)
_EFFICIENTNET = Naming(
    name=EFFICIENTNET_NAMES,
    marks=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight"),
    rules=(
        (r"^_conv_stem\.", "conv_stem."),
        (r"^_conv_head\.", "conv_head."),
        (r"^_bn0\.", "bn1."),
        (r"^_bn1\.", "bn2."),
        (r"^_fc\.", "classifier."),
        (r"^_blocks\.", "blocks."),
        (r"\._depthwise_conv\.", ".conv_dw."),
        (r"\._se_(reduce|expand)\.", r".se.conv_\1."),
    ),
)
NAMINGS = (
    _MMPRETRAIN_VIT,
    _TORCHVISION_VIT,
    _TRANSFORMERS_VIT,
    replace(_TRANSFORMERS_VIT, marks=(*_PATCHES, "layers.0.attention.q_proj.weight")),
    replace(_TRANSFORMERS_VIT, marks=(*_PATCHES, "encoder.layer.0.attention.q_proj.weight")),
    _TRANSFORMERS_DINOV3,
    _TRANSFORMERS_RESNET,
    _SEQUENTIAL_RESNET,
    _PRETRAINEDMODELS_RESNET,
    _DINOV2,
    replace(_DINOV2, marks=("blocks.0.mlp.w12.weight", "pos_embed", "cls_token")),
    replace(_DINOV2, marks=("blocks.0.0.norm1.weight", "pos_embed", "cls_token")),
    _DINOV3,
    _EFFICIENTNET,
)

_FOREIGN = (
    (
        r"(visual\.(class_embedding|conv1|trunk|layer1|attnpool)|vision_model\.|text_model\.)",
        "the names of CLIP or SigLIP in other libraries",
        "take timm's file of the network, such as vit_base_patch16_clip_224.openai",
    ),
    (
        r"(features\.\d+\.\d+\.|features\.\d+\.(block|conv)\.|trunk_output\.)",
        "torchvision's names",
        "take timm's file of the network, such as mobilenetv3_large_100 or convnext_tiny",
    ),
    (
        r"(embeddings\.patch_embeddings\.|encoder\.(layer|layers|stages)\.\d+\.)",
        "the names of Hugging Face transformers",
        "take timm's file of the network, such as swin_tiny_patch4_window7_224",
    ),
    (
        r"(stem\.conv1\.norm\.|res2\.0\.)",
        "Detectron2's names",
        "take the file that Detectron2's was converted from",
    ),
    (
        r"(downsample_layers\.\d+\.|stages\.\d+\.\d+\.pwconv1\.)",
        "the names of ConvNeXt's or DINOv3's authors",
        "take timm's file of the network, such as convnext_tiny.dinov3_lvd1689m",
    ),
    (
        r"(to_patch_embedding\.|transformer\.layers\.\d+\.\d+\.)",
        "the names of vit_pytorch",
        "save it under the names of timm's vision transformers",
    ),
)
"""Patterns of keys, whose names they are, and what to take instead."""


def _efficientnet(state: _State) -> Converted:
    """Number blocks by stage, whose blocks are all of one width, and name their layers as timm."""
    widths: list[int] = []
    while (last := state.get(f"blocks.{len(widths)}._project_conv.weight")) is not None:
        widths.append(len(last))
    places, stage, block = [], 0, -1
    for number, width in enumerate(widths):
        new = number > 0 and width != widths[number - 1]
        stage, block = (stage + 1, 0) if new else (stage, block + 1)
        places.append(f"{stage}.{block}")
    named: _State = {}
    for key, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", key)
        if match is None or int(match[1]) >= len(places):  # a block that lacks its last layer
            named[key] = value
            continue
        expanded = f"blocks.{match[1]}._expand_conv.weight" in state
        layer = (_INVERTED if expanded else _SEPARABLE).get(match[2], match[2])
        named[f"blocks.{places[int(match[1])]}.{layer}.{match[3]}"] = value
    network = efficientnet_of(widths or [0], gated="blocks.0.se.conv_reduce.weight" in state)
    return Converted(named, _EFFICIENTNET.name, network)


_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE = {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
