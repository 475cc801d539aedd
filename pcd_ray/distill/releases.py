"""How published checkpoints name what they hold: one row of `LAYOUTS` for each.

Facts from the releases' public code: facebookresearch/{moco, moco-v3, swav, barlowtwins, vicreg,
dino}, megvii-research/revisitAIRL, open-mmlab/mmpretrain, vturrisi/solo-learn. Widths, depth,
biases and norms are not here: they are read from each file.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

_ONLINE = "the network in training, of which the one used is a running mean"
_MOMENTUM = "the running mean of the network used"
_QUEUE = "negatives of its own training"
_PROTOTYPES = "classes of its own loss, behind the head's output"
CLASSIFIER = "a classifier, which no teacher needs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one release names what it holds."""

    name: str
    licence: str = ""
    told_by: tuple[str, ...]
    """Prefixes of keys that occur in this layout, and together in none above it."""
    backbone: str
    """Prefix of the backbone's keys."""
    head: tuple[str, ...] = ()
    """Prefixes of the head's keys, one of which occurs; none: this layout has no head."""
    predictor: str = ""
    """Prefix of the predictor's keys; the student mirrors its shape."""
    predictor_behind_head: bool = False
    """Whether the predictor's keys begin with a head of the same shape as the teacher's."""
    activation: str = "relu"
    rename: Callable[[str], str] = str
    """From a head key to ``INDEX.NAME``."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Prefixes that are knowingly left out, and why."""
    mocov3_vit: bool = False
    """Whether a vision transformer here is one of MoCo v3."""
    parallel: bool = False
    """Whether this layout is told by DistributedDataParallel's prefix too."""
    full_file: str = "give the checkpoint of the pre-training, which holds the head"
    """Which file to take when this one has no head."""


def _neck_index(key: str) -> str:
    """Number mmpretrain's necks: ``fc1.weight`` -> ``3.weight``, ``bn1.bias`` -> ``4.bias``."""
    match = re.fullmatch(r"(fc|bn)(\d+)\.(\w+)", key)
    if match:
        return f"{3 * int(match[2]) + int(match[1] == 'bn')}.{match[3]}"
    return re.sub(r"^(mlp|projection_neck|fc)\.", "", key)


_SOLO = Layout(
    name="solo-learn",
    licence="MIT",
    told_by=("backbone.", "projector."),
    backbone="backbone.",
    head=("projector.",),
    predictor="predictor.",
    unused={
        "momentum_backbone.": _MOMENTUM,
        "momentum_encoder.": _MOMENTUM,
        "momentum_projector.": _MOMENTUM,
        "momentum_predictor.": _MOMENTUM,
        "momentum_head.": _MOMENTUM,
        "momentum_classifier.": CLASSIFIER,
        "classifier.": CLASSIFIER,
        "head.last_layer.": _PROTOTYPES,
        "prototypes.": _PROTOTYPES,
        "dino_loss_func.": "the centre of its own loss",
        "queue": _QUEUE,
    },
)
_BARLOW_TWINS = Layout(
    name="Barlow Twins",
    licence="MIT",
    told_by=("backbone.", "projector."),
    parallel=True,
    backbone="backbone.",
    head=("projector.",),
    unused={"bn.": "normalises the head's output within its loss alone"},
)
_MOCO_V2 = Layout(
    name="MoCo v2",
    licence="MIT",
    told_by=("encoder_q.",),
    backbone="encoder_q.",
    head=("encoder_q.fc.",),
    unused={"encoder_k.": _MOMENTUM, "queue": _QUEUE},
    full_file="give the pre-training file (moco_v2_800ep_pretrain.pth.tar)",
)
_MMPRETRAIN = Layout(
    name="mmpretrain",
    licence="Apache-2.0",
    told_by=("backbone.", "neck."),
    backbone="backbone.",
    head=("neck.",),
    predictor="head.predictor.",
    rename=_neck_index,
    unused={
        "neck.mlp2.": "the head for maps that DenseCL trains beside the one used",
        "head.": "its own loss",
        "data_preprocessor.": "input normalisation, which is ImageNet's",
        "target_net.": _MOMENTUM,
        "momentum_encoder.": _MOMENTUM,
        "encoder_k.": _MOMENTUM,
        "queue": _QUEUE,
    },
)

LAYOUTS = (
    replace(
        _MMPRETRAIN,
        name="mmpretrain, masked images",
        told_by=("backbone.", "neck.decoder_"),
        head=(),
        predictor="",
        unused={**_MMPRETRAIN.unused, "neck.": "a decoder of pixels, which is no projection head"},
    ),
    replace(
        _MMPRETRAIN,
        name="mmpretrain, MoCo v3",
        told_by=("backbone.", "neck.", "momentum_encoder."),
        mocov3_vit=True,
    ),
    replace(
        _MMPRETRAIN,
        name="mmpretrain, SwAV",
        told_by=("backbone.", "neck.projection_neck."),
        unused={**_MMPRETRAIN.unused, "neck.norm.": "a second name of the neck's norm"},
    ),
    _MMPRETRAIN,
    replace(_SOLO, told_by=(*_SOLO.told_by, "classifier."), parallel=True),
    replace(_BARLOW_TWINS, name="VICReg", told_by=("backbone.", "projector.0.bias"), unused={}),
    _BARLOW_TWINS,
    _SOLO,
    replace(_SOLO, told_by=("encoder.", "projector."), backbone="encoder."),
    replace(
        _SOLO,
        told_by=("backbone.", "head.mlp.", "momentum_backbone."),
        head=("head.mlp.",),
        activation="gelu",
    ),
    Layout(
        name="DINO",
        licence="Apache-2.0",
        told_by=("backbone.", "head.mlp."),
        backbone="backbone.",
        head=("head.mlp.",),
        activation="gelu",
        unused={"head.last_layer.": _PROTOTYPES},
    ),
    Layout(
        name="MoCo v3",
        licence="CC-BY-NC-4.0",
        told_by=("momentum_encoder.",),
        backbone="momentum_encoder.",
        head=("momentum_encoder.fc.", "momentum_encoder.head."),
        predictor="predictor.",
        mocov3_vit=True,
        unused={"base_encoder.": _ONLINE},
        full_file="give the pre-training file (r-50-1000ep.pth.tar, vit-b-300ep.pth.tar)",
    ),
    replace(_MOCO_V2, name="MoCo v1", told_by=("encoder_q.fc.weight",)),
    _MOCO_V2,
    Layout(
        name="BYOL",
        licence="Apache-2.0",
        told_by=("target_encoder.",),
        backbone="target_encoder.",
        head=("target_encoder.fc.",),
        predictor="online_encoder.fc.",
        predictor_behind_head=True,
        unused={"online_encoder.": _ONLINE},
    ),
    Layout(
        name="SwAV",
        licence="CC-BY-NC-4.0",
        told_by=("layer1.", "projection_head."),
        backbone="",
        head=("projection_head.",),
        unused={"prototypes.": _PROTOTYPES},
    ),
)
"""Read from top to bottom: the first that fits is taken."""


def layout_of(keys: Iterable[str], *, parallel: bool) -> Layout | None:
    """Return the first layout that the keys fit; None: they are a bare backbone's.

    Args:
        keys: names of the tensors, without DistributedDataParallel's prefix.
        parallel: whether they had it.
    """
    names = list(keys)
    for layout in LAYOUTS:
        told = all(any(name.startswith(p) for name in names) for p in layout.told_by)
        if told and (parallel or not layout.parallel):
            return layout
    return None
