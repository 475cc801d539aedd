"""Which network a state dict belongs to, told by its names and shapes alone.

Known are torchvision's ResNets (timm's have the same names) and plain vision transformers under
timm's names, which MoCo v3, DINO and DINOv2 use too, and timm's DINOv3; other libraries' names are
converted first (see `conversions`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pcd_ray.distill.state_dicts import listed

_RESNETS = {  # bottleneck blocks or not, blocks per stage
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_RESNET_KEY = re.compile(
    r"(conv1|bn1|layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])|fc(\.\d+)?)"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
_STEM_CHANNELS = 64
_STEM_PX = 7
_VIT_SIZES = {  # width, depth
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1536, 40): "giant",
}
_VIT_PATCHES_PX = {  # those that timm has under the plain names
    "tiny": (16,),
    "small": (8, 16, 32),
    "base": (8, 16, 32),
    "large": (14, 16, 32),
    "huge": (14,),
    "giant": (),
}
_DINOV2_PATCH_PX = 14
_DINOV2_REGISTERS = 4
_DINOV3_SIZES = {  # width, depth, gated MLPs or not
    (192, 12, False): "tiny",
    (384, 12, False): "small",
    (384, 12, True): "small_plus",
    (768, 12, False): "base",
    (1024, 24, False): "large",
    (1280, 32, True): "huge_plus",
    (4096, 40, True): "7b",
}
_DINOV3_PATCH_PX = 16
_VIT_KEY = re.compile(
    r"(cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|blocks\.(\d+)\.((norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
    r"|norm\.(weight|bias)|head\.(weight|bias))"
)
_EFFICIENTNETS = {  # blocks, width of the last one, squeeze-and-excitation or not
    (16, 320, True): "b0",
    (23, 320, True): "b1",
    (23, 352, True): "b2",
    (26, 384, True): "b3",
    (32, 448, True): "b4",
    (39, 512, True): "b5",
    (45, 576, True): "b6",
    (55, 640, True): "b7",
    (61, 704, True): "b8",
    (88, 1376, True): "l2",
    (16, 320, False): "lite0",
    (21, 320, False): "lite1",
    (21, 352, False): "lite2",
    (24, 384, False): "lite3",
    (30, 448, False): "lite4",
}
NO_NAMES = "its names"
"""How the reason begins where names tell no network."""
HEADS_UNKNOWN = (
    "a tiny or small vision transformer with fixed positions, of which no shape tells whether it "
    "has 3 (tiny) or 6 (small) attention heads or, as MAE-Lite's and MoCo v3's, 12"
)


@dataclass(frozen=True, slots=True)
class Network:
    """A timm model: its name and what ``timm.create_model`` needs besides."""

    timm_name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name, with the arguments behind it."""
        extra = ", ".join(f"{name}={value}" for name, value in self.kwargs.items())
        return f"{self.timm_name} ({extra})" if extra else self.timm_name


def network_of(state: Mapping[str, Tensor], *, mocov3: bool = False) -> Network | str:
    """Return the network that a backbone's weights belong to, or why that is not known.

    Args:
        state: the backbone's weights under torchvision's or timm's names.
        mocov3: its small vision transformer has twice as many attention heads as others of its
            width, which no shape tells.
    """
    ndims = {key: value.ndim for key, value in state.items()}
    if ndims.get("conv1.weight") == ndims.get("layer1.0.conv2.weight") == 4:
        return _resnet(state)
    if (ndims.get("patch_embed.proj.weight"), ndims.get("pos_embed")) == (4, 3):
        return _vision_transformer(state, mocov3=mocov3)
    if "reg_token" in state and ndims.get("blocks.0.gamma_1") == 1 and "pos_embed" not in state:
        return _dinov3(state)
    groups = listed(sorted({key.partition(".")[0] for key in state}))
    return f"{NO_NAMES} ({groups}) are of no ResNet or vision transformer that tells its size"


def has_classifier(state: Mapping[str, Tensor]) -> bool:
    """Say whether bare weights end in a classifier of a ResNet or vision transformer."""
    names = ("fc.weight", "head.weight", "classifier.weight")
    return any(key in state and state[key].ndim == 2 for key in names)


def efficientnet_of(widths: Sequence[int], *, gated: bool) -> Network | str:
    """Return the EfficientNet with TensorFlow's padding and BatchNorm epsilon.

    Args:
        widths: output channels of its blocks.
        gated: whether blocks have squeeze-and-excitation, which Lite ones have not.
    """
    size = _EFFICIENTNETS.get((len(widths), widths[-1], gated))
    if size is None:
        return (
            f"an EfficientNet of {len(widths)} blocks, the last of {widths[-1]} channels, which is "
            "none of B0 to B8, L2 and Lite0 to Lite4"
        )
    return Network(f"tf_efficientnet_{size}")


def _resnet(state: Mapping[str, Tensor]) -> Network | str:
    strange = [key for key in state if not _RESNET_KEY.fullmatch(key)]
    if strange:
        return f"a ResNet with layers of its own ({strange[0]})"
    stem = tuple(state["conv1.weight"].shape)
    if stem[2:] != (_STEM_PX, _STEM_PX):
        return f"a ResNet whose first convolution is {stem[2]} x {stem[3]} and not 7 x 7"
    bottleneck = "layer1.0.conv3.weight" in state
    block = tuple(state["layer1.0.conv2.weight"].shape)
    if stem[0] != _STEM_CHANNELS or block[:2] != (_STEM_CHANNELS, _STEM_CHANNELS):
        return (
            f"a wide or grouped ResNet (first convolution of {stem[0]} channels, first block of "
            f"{block[0]} channels, {block[1]} per group; both are 64 in plain ones)"
        )
    found = [_RESNET_KEY.fullmatch(key) for key in state]
    blocks = {(match[2], match[3]) for match in found if match and match[2]}
    depths = tuple(sum(stage == wanted for stage, _ in blocks) for wanted in "1234")
    name = _RESNETS.get((bottleneck, depths))
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        return f"a ResNet of {depths} {kind} blocks, which is none of ResNet-18, 34, 50, 101, 152"
    return Network(name)


def _vision_transformer(state: Mapping[str, Tensor], *, mocov3: bool) -> Network | str:
    strange = [key for key in state if not _VIT_KEY.fullmatch(key)]
    if strange or "cls_token" not in state:
        which = strange[0] if strange else "no class token"
        return f"a vision transformer with layers of its own ({which})"
    width, _, patch_px, _ = state["patch_embed.proj.weight"].shape
    found = [_VIT_KEY.fullmatch(key) for key in state]
    depth = len({match[3] for match in found if match and match[3]})
    size = _VIT_SIZES.get((width, depth))
    if size is None:
        return f"a vision transformer of width {width} and depth {depth}, which has no common name"
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = state["pos_embed"].shape[1] - (0 if registers else 1)
    name = _vit_name(size, patch_px, registers, dinov2="blocks.0.ls1.gamma" in state)
    if name is None or math.isqrt(positions) ** 2 != positions:
        return (
            f"a {size} vision transformer of {patch_px} px patches, {registers} registers and "
            f"{positions} positions, which is no common one"
        )
    if size in ("tiny", "small") and not mocov3 and not state["pos_embed"][0, 0].any():
        return HEADS_UNKNOWN
    kwargs: dict[str, Any] = {
        "img_size": math.isqrt(positions) * patch_px,
        "dynamic_img_size": True,
    }
    if mocov3 and size == "small":
        kwargs["num_heads"] = 12
    return Network(name, kwargs)


def _dinov3(state: Mapping[str, Tensor]) -> Network | str:
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.shape[-1] != _DINOV3_PATCH_PX:
        return f"a vision transformer of registers and no positions, not in {_DINOV3_PATCH_PX} px"
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    gated = "blocks.0.mlp.fc1_g.weight" in state
    size = _DINOV3_SIZES.get((len(patches), depth, gated))
    if size is None:
        return f"a vision transformer of width {len(patches)} and depth {depth} that is no DINOv3"
    bias = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
    return Network(f"vit_{size}_patch{_DINOV3_PATCH_PX}_dinov3{bias}")


def _vit_name(size: str, patch_px: int, registers: int, *, dinov2: bool) -> str | None:
    if not dinov2:
        plain = not registers and patch_px in _VIT_PATCHES_PX[size]
        return f"vit_{size}_patch{patch_px}_224" if plain else None
    if patch_px != _DINOV2_PATCH_PX or registers not in (0, _DINOV2_REGISTERS):
        return None
    known = size in ("small", "base", "large", "giant")
    return f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2" if known else None
