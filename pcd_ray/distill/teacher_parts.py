"""A weights file taken apart into backbone and head, every key used or named with its reason."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pcd_ray.distill.conversions import (
    EFFICIENTNET_NAMES,
    POOLER,
    Converted,
    convert,
    foreign_names,
    naming_of,
)
from pcd_ray.distill.heads import MlpShape, head_from_state, shape_of
from pcd_ray.distill.networks import (
    HEADS_UNKNOWN,
    NO_NAMES,
    Network,
    has_classifier,
    network_of,
)
from pcd_ray.distill.releases import CLASSIFIER, Layout, layout_of
from pcd_ray.distill.state_dicts import Unwrapped, listed, unwrapped
from pcd_ray.distill.weights import METADATA_KEY, WeightsFile, check_finite
from pcd_ray.errors import WeightsError, naming

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Input normalisation of every published layout."""
_MASKING = {
    "mask_token": "stands for hidden patches in its own training",
    "decoder_": "a decoder of pixels, which is no projection head",
}
"""Prefixes of keys that masked pre-training leaves beside a bare backbone, and what they are."""
_NORMALISED_TWO_WAYS = re.compile(r"vit_(tiny|small|base)_patch16_224( \(.*\))?")
OTHER_HEADS = "use teacher.head=pca, contrastive or none"
"""What to do about a file whose like has no head anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherParts:
    """A weights file taken apart."""

    layout: str
    """A name of `LAYOUTS`, ``pcd_ray`` (our own) or ``timm`` (a bare backbone)."""
    network: Network | str
    """The network, or why it is not known and ``teacher.arch`` has to say it."""
    backbone: dict[str, Tensor]
    """Weights under timm's names."""
    head: nn.Sequential | None = None
    """The projection head for vectors; None: the file holds none."""
    predictor: MlpShape | None = None
    """Shape of the predictor behind it, which the student mirrors."""
    unused: dict[str, str] = field(default_factory=dict)
    """Groups of keys that are knowingly left out, and why."""
    licence: str = ""
    """Licence of the weights; empty: nothing says."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Input normalisation in [0, 1]; None: what timm says of the network."""
    tap: str = ""
    """Last stage that a student was trained up to; empty: it has all its stages."""
    notes: tuple[str, ...] = ()
    """What was opened, stripped and renamed before the weights could be read."""
    foreign: str = ""
    """Whose names the weights have, where they are not converted, and what to take instead."""
    root: str = ""
    """The last prefix that was removed because all keys had it."""


def take_apart(file: WeightsFile) -> TeacherParts:
    """Recognise a file's layout by its keys and split it into backbone and head.

    Raises:
        WeightsError: keys that belong to no part, a head that should be there and is not.
    """
    if METADATA_KEY in file.metadata:
        return _take_own_apart(file)
    plain = unwrapped(file.tensors, known=_is_known, uri=file.uri)
    layout = layout_of(plain.tensors, parallel=plain.parallel)
    beside = plain.unused | dict.fromkeys(file.beside, "stands beside the weights")
    if layout is None:
        return _bare(file, plain, beside)
    groups = _grouped(layout, plain.tensors, uri=file.uri)
    head = _head(layout, groups, uri=file.uri)
    backbone = convert(groups[layout.backbone], mocov3=layout.mocov3_vit)
    unused = dict(layout.unused)
    if layout.predictor:
        unused[layout.predictor] = "only its shape is used: the student mirrors it"
    dropped = {f"{plain.prefix}{layout.backbone}{k}": why for k, why in backbone.dropped.items()}
    return TeacherParts(
        layout=layout.name,
        network=backbone.network,
        backbone=backbone.tensors,
        head=head,
        predictor=_predictor(layout, groups, head, uri=file.uri),
        unused={f"{plain.prefix}{g}": unused[g] for g in groups if g in unused} | dropped | beside,
        licence=layout.licence,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        notes=_notes(file, plain, backbone),
    )


def _is_known(state: Mapping[str, Tensor]) -> bool:
    """Whether keys are, as they stand, those of a network that can be named."""
    network = network_of(state)
    return not isinstance(network, str) or network == HEADS_UNKNOWN or naming_of(state) is not None


def _notes(file: WeightsFile, plain: Unwrapped, backbone: Converted) -> tuple[str, ...]:
    """Say what was opened, stripped and renamed before the weights could be read."""
    return (
        *([f"opened its entry {file.entry}"] if file.entry else []),
        *(f"removed {prefix} from its keys" for prefix in plain.removed),
        *([f"converted from {backbone.naming} names to timm's"] if backbone.naming else []),
    )


def arch_advice(reason: str) -> str:
    """Return what to do about a network that is not known, by the reason."""
    timms = ", where these are the names of a timm network" if reason.startswith(NO_NAMES) else ""
    return f"set teacher.arch to the timm name{timms}"


def all_licences(licences: Iterable[str]) -> str:
    """Return the licences of all that weights come from, each once."""
    return " and ".join(dict.fromkeys(each for each in licences if each))


def headless_words(parts: TeacherParts) -> str:
    """Say which file holds the head that this one lacks."""
    if parts.layout == "pcd_ray":
        return OTHER_HEADS
    if has_classifier(parts.backbone):
        return (
            "it ends in a classifier, as supervised networks and linear evaluations do; give the "
            "file of the pre-training itself (MoCo: not the linear-* file), or teacher.head=pca"
        )
    if "layer4.0.conv1.weight" in parts.backbone:
        return (
            "it is the backbone alone, as Barlow Twins, VICReg and DINO publish it beside their "
            "full checkpoint; give that one (Barlow Twins: checkpoint.pth, VICReg: "
            "resnet50_fullckpt.pth, DINO: dino_resnet50_pretrain_full_checkpoint.pth), or "
            "teacher.head=pca"
        )
    if "blocks.0.norm1.weight" in parts.backbone:
        return (
            "it is the backbone alone; of DINO give the *_full_checkpoint.pth; DINOv2, DINOv3, MAE "
            "and CLIP have no published head: use teacher.head=pca, contrastive or none"
        )
    return OTHER_HEADS


def _grouped(
    layout: Layout, tensors: Mapping[str, Tensor], *, uri: str
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by the longest prefix of the layout that each key has."""
    named = {*layout.head, *layout.unused, layout.predictor} - {""}
    prefixes = [*sorted(named, key=len, reverse=True), layout.backbone]
    groups: dict[str, dict[str, Tensor]] = {layout.backbone: {}}
    strange = []
    for key, value in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            strange.append(key)
        else:
            groups.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    if strange:
        raise WeightsError(
            f"{uri}: {len(strange)} keys belong to no part of {layout.name}: {listed(strange)}; "
            "give the file as published"
        )
    return groups


def _head(
    layout: Layout, groups: Mapping[str, dict[str, Tensor]], *, uri: str
) -> nn.Sequential | None:
    if not layout.head:
        return None
    state = next((groups[prefix] for prefix in layout.head if prefix in groups), None)
    if state is None:
        raise WeightsError(
            f"{uri} holds {layout.name}'s backbone but no head ({'* or '.join(layout.head)}*); "
            f"{layout.full_file}"
        )
    return _mlp(layout, state, uri=uri)


def _predictor(
    layout: Layout,
    groups: Mapping[str, dict[str, Tensor]],
    head: nn.Sequential | None,
    *,
    uri: str,
) -> MlpShape | None:
    if layout.predictor not in groups or not layout.predictor:
        return None
    built = _mlp(layout, groups[layout.predictor], uri=uri)
    if layout.predictor_behind_head:
        built = built[len(head or ()) :]
    return shape_of(built) if len(built) else None


def _mlp(layout: Layout, state: Mapping[str, Tensor], *, uri: str) -> nn.Sequential:
    named = {layout.rename(key): value for key, value in state.items()}
    lone = {"weight", "bias"} >= named.keys()  # a single layer, which has no index
    check_finite(named, uri=uri)
    with naming(f"{uri} ({layout.name})"):
        return head_from_state(
            {f"0.{key}" if lone else key: value for key, value in named.items()},
            activation=layout.activation,
        )


def _bare(file: WeightsFile, plain: Unwrapped, beside: dict[str, str]) -> TeacherParts:
    """Return a backbone alone, under timm's or another library's names, or an exported student."""
    if str(file.metadata.get("made_by", "")).startswith("pcd_ray"):  # others have entries alike
        return _exported(file)
    masking = {p: why for p, why in _MASKING.items() if any(k.startswith(p) for k in plain.tensors)}
    kept = {key: value for key, value in plain.tensors.items() if not key.startswith((*masking,))}
    found = convert(kept)
    network, tensors = found.network, found.tensors
    unused = beside | masking | {f"{plain.prefix}{k}": why for k, why in found.dropped.items()}
    if isinstance(network, Network):  # of others it may be a projection
        names = ("fc", "head", "classifier")
        unused |= {f"{name}.": CLASSIFIER for name in names if f"{name}.weight" in tensors}
        if any(key.startswith("fc.") for key in tensors) and "fc." not in unused:
            unused["fc."] = "layers behind the pooling; nothing says what they were trained for"
    supervised = has_classifier(tensors) or bool({CLASSIFIER, POOLER} & {*unused.values()})
    imagenet = found.naming == "torchvision"
    if supervised and not imagenet and _NORMALISED_TWO_WAYS.fullmatch(str(network)):
        network = (
            "a vision transformer with a classifier, whose input statistics its names and shapes "
            "do not tell: vit_* (AugReg's) takes mean and std 0.5, deit_* ImageNet's"
        )
    # self-supervised vision transformers take ImageNet's statistics, timm's supervised ones others
    vit = isinstance(network, Network) and network.timm_name.startswith("vit")
    imagenet = imagenet or (vit and not supervised)
    own = found.naming == EFFICIENTNET_NAMES
    return TeacherParts(
        layout=found.naming if own else "timm",
        network=network,
        backbone=tensors,
        unused=unused,
        mean=IMAGENET_MEAN if imagenet else None,
        std=IMAGENET_STD if imagenet else None,
        notes=_notes(file, plain, found),
        foreign="" if found.naming or isinstance(network, Network) else foreign_names(tensors),
        root=plain.root,
    )


def _exported(file: WeightsFile) -> TeacherParts:
    said = file.metadata
    try:
        kwargs = json.loads(said["timm_kwargs"])
        kwargs.pop("global_pool", None)  # it concerns the pooled output alone
        return TeacherParts(
            layout="pcd_ray",
            network=Network(said["timm_name"], kwargs),
            backbone=dict(file.tensors),
            licence=all_licences([said["teacher_licence"], said.get("teacher_2_licence", "")]),
            mean=tuple(json.loads(said["mean"])),
            std=tuple(json.loads(said["std"])),
            tap=said.get("timm_tap", ""),
        )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{file.uri}: the metadata of its export is not whole ({type(error).__name__}: "
            f"{error}); export it again"
        ) from error


def _take_own_apart(file: WeightsFile) -> TeacherParts:
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for key, value in file.tensors.items():
        group, _, rest = key.partition(".")
        if group not in parts:
            raise WeightsError(f"{file.uri}: key {key!r} is neither backbone.* nor head.*")
        parts[group][rest] = value
    about: dict[str, Any] = file.metadata[METADATA_KEY]
    activation = str(about.get("activation", "relu"))
    return TeacherParts(
        layout="pcd_ray",
        network=Network(str(about["arch"])) if "arch" in about else network_of(parts["backbone"]),
        backbone=parts["backbone"],
        head=head_from_state(parts["head"], activation=activation) if parts["head"] else None,
        licence=str(about.get("licence") or ""),
        mean=tuple(about["mean"]) if "mean" in about else None,
        std=tuple(about["std"]) if "std" in about else None,
    )
