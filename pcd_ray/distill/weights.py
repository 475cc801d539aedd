"""Published weights files -> backbone and head weights, nothing left over.

Three layouts are read: MoCo v3 ResNet-50 as published, our own (``backbone.``, ``head.`` and
metadata), and timm's own names. More releases are further rows of `RELEASES`.

No file is unpickled freely: ``.safetensors``, or torch files with ``weights_only``.
"""

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.heads import MlpShape, head_from_state, shape_of
from pcd_ray.errors import WeightsError

METADATA_KEY = "pcd_ray"
"""Name under which our own safetensors files carry their JSON metadata."""
_LISTED_KEYS = 6  # of a long list of keys, the first few say enough


@dataclass(frozen=True, slots=True)
class Release:
    """A published teacher: which timm model it is and under what terms."""

    timm_name: str
    method: str
    licence: str


RELEASES = {"mocov3_resnet50": Release("resnet50", "MoCo v3", "CC-BY-NC-4.0")}


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A weights file as read: tensors by name, what it says of itself, and its hash."""

    uri: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str


@dataclass(frozen=True, slots=True)
class TeacherParts:
    """A weights file taken apart."""

    layout: str
    """``mocov3``, ``pcd_ray`` or ``timm``."""
    backbone: dict[str, Tensor]
    """Weights under timm's names."""
    head: nn.Sequential | None
    """The projection head for vectors; None: the file holds none."""
    predictor: MlpShape | None
    """Shape of the predictor behind it, which the student mirrors."""
    unused: dict[str, str] = field(default_factory=dict)
    """Groups of keys that are knowingly left out, and why."""


def read_weights(uri: str) -> WeightsFile:
    """Read a .safetensors or torch file; a ``state_dict`` container is opened.

    Raises:
        StorageError: the file cannot be read.
        WeightsError: it is empty, truncated, needs unpickling, or holds no tensors.
    """
    data = storage.read_bytes(uri)
    if not data:
        raise WeightsError(f"{uri} is empty (0 bytes); fetch the file again")
    tensors, metadata = _parse(uri, data)
    if not tensors:
        raise WeightsError(f"{uri} holds no tensors; give a weights file")
    return WeightsFile(uri, tensors, metadata, hashlib.sha256(data).hexdigest())


def take_apart(file: WeightsFile) -> TeacherParts:
    """Recognise a file's layout by its keys and split it into backbone and head.

    Raises:
        WeightsError: keys that belong to no part.
    """
    keys = file.tensors.keys()
    if any(key.startswith("module.momentum_encoder.") for key in keys):
        return _take_mocov3_apart(file)
    if any(key.startswith("backbone.") for key in keys) and METADATA_KEY in file.metadata:
        return _take_own_apart(file)
    return TeacherParts("timm", dict(file.tensors), None, None)


def load_backbone(backbone: Backbone, state: Mapping[str, Tensor], *, uri: str) -> None:
    """Load weights into a backbone, every key used but those of the classifier that was cut.

    Raises:
        WeightsError: keys are missing, left over, or of another shape.
    """
    own = backbone.body.state_dict()
    classifier = _classifier_names(backbone.body)
    left = [key for key in state if key not in own and key.rpartition(".")[0] not in classifier]
    missing = [key for key in own if key not in state]
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for names, what in ((missing, "keys missing"), (left, "keys left over"), (wrong, "shapes"))
        if names
    ]
    if problems:
        raise WeightsError(
            f"{uri} is no {backbone.name} file ({'; '.join(problems)}); give the matching file, "
            "or change teacher.arch and teacher.kwargs"
        )
    backbone.body.load_state_dict({key: state[key] for key in own}, strict=True)


def tensors_sha256(module: nn.Module) -> str:
    """Return a hash of every parameter and buffer by name: the identity of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        flat = value.detach().cpu().flatten()  # a count has no dimension to view
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def save_teacher(
    uri: str, backbone: Backbone, head: nn.Sequential, *, activation: str, licence: str
) -> None:
    """Write a teacher with an MLP head in our own layout, readable by `read_weights`."""
    tensors = {f"backbone.{k}": v for k, v in backbone.body.state_dict().items()}
    tensors |= {f"head.{k}": v for k, v in head.state_dict().items()}
    about = {
        "arch": backbone.name,
        "activation": activation,
        "licence": licence,
        "mean": (backbone.mean.flatten() / 255).tolist(),
        "std": (backbone.std.flatten() / 255).tolist(),
    }
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    storage.write_bytes(
        uri, safetensors.torch.save(contiguous, metadata={METADATA_KEY: json.dumps(about)})
    )


def _parse(uri: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if _looks_like_safetensors(data):
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{uri} is a damaged safetensors file ({error}); fetch the file again"
            ) from error
        return tensors, _safetensors_metadata(uri, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{uri} is no torch file of plain tensors and is not unpickled freely "
            f"({str(error).splitlines()[0]}); save its state dict alone, or as .safetensors"
        ) from error
    except Exception as error:  # bytes that are no torch file fail in any way
        cause = [type(error).__name__, *str(error).splitlines()][:2]
        raise WeightsError(
            f"{uri} is truncated or no weights file ({': '.join(cause)}); "
            "give a .safetensors or .pth file"
        ) from error
    return _tensors_of(uri, content), {}


def _looks_like_safetensors(data: bytes) -> bool:
    return len(data) > 9 and data[8:9] == b"{" and struct.unpack("<Q", data[:8])[0] < 100_000_000


def _safetensors_metadata(uri: str, data: bytes) -> dict[str, Any]:
    length = struct.unpack("<Q", data[:8])[0]
    found = dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})
    if METADATA_KEY in found:
        try:
            found[METADATA_KEY] = dict(json.loads(found[METADATA_KEY]))
        except (ValueError, TypeError) as error:
            raise WeightsError(
                f"{uri}: its metadata {METADATA_KEY!r} is no JSON mapping ({error}); export again"
            ) from error
    return found


def _tensors_of(uri: str, content: object) -> dict[str, Tensor]:
    if isinstance(content, dict):
        inner = content.get("state_dict", content)
        if isinstance(inner, dict) and inner:
            tensors = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
            if len(tensors) == len(inner):
                return tensors
            strange = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
            raise WeightsError(
                f"{uri} holds entries that are no tensors: {_listed(strange)}; "
                "give the file that holds the state dict"
            )
    raise WeightsError(f"{uri} holds a {type(content).__name__}, not a state dict of tensors")


def _take_mocov3_apart(file: WeightsFile) -> TeacherParts:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in file.tensors.items():
        group = next((g for g in _MOCOV3_GROUPS if key.startswith(g)), "")
        groups.setdefault(group, {})[key.removeprefix(group)] = value
    if "" in groups:
        raise WeightsError(
            f"{file.uri}: {len(groups[''])} keys belong to no part of MoCo v3: "
            f"{_listed(list(groups['']))}; give the file as published"
        )
    encoder = groups["module.momentum_encoder."]
    head = {k.removeprefix("fc."): v for k, v in encoder.items() if k.startswith("fc.")}
    if not head:
        raise WeightsError(
            f"{file.uri}: the momentum encoder has no head (fc.*); MoCo v3 vision transformers "
            "keep theirs elsewhere and are not read as mocov3_resnet50; give the ResNet-50 file"
        )
    predictor = groups.get("module.predictor.")
    return TeacherParts(
        layout="mocov3",
        backbone={k: v for k, v in encoder.items() if not k.startswith("fc.")},
        head=head_from_state(head),
        predictor=shape_of(head_from_state(predictor)) if predictor else None,
        unused={
            name: why
            for name, why in (
                ("module.base_encoder.", "the online network, of which the momentum one is a mean"),
                ("module.predictor.", "only its shape is used: the student mirrors it"),
            )
            if name in groups
        },
    )


_MOCOV3_GROUPS = ("module.momentum_encoder.", "module.base_encoder.", "module.predictor.")


def _take_own_apart(file: WeightsFile) -> TeacherParts:
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for key, value in file.tensors.items():
        group, _, rest = key.partition(".")
        if group not in parts:
            raise WeightsError(f"{file.uri}: key {key!r} is neither backbone.* nor head.*")
        parts[group][rest] = value
    activation = str(file.metadata[METADATA_KEY].get("activation", "relu"))
    head = head_from_state(parts["head"], activation=activation) if parts["head"] else None
    return TeacherParts("pcd_ray", parts["backbone"], head, None)


def _classifier_names(body: nn.Module) -> tuple[str, ...]:
    config: Any = body.pretrained_cfg
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names) - _LISTED_KEYS} more)" if len(names) > _LISTED_KEYS else ""
    return ", ".join(names[:_LISTED_KEYS]) + more
