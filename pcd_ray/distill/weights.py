"""Weights files: read without running anything, load into a backbone whole, hash, write our own.

Read are ``.safetensors`` and torch files of both kinds (zip and older) by torch's ``weights_only``
unpickler. Old checkpoints name a few harmless things besides tensors (`_NO_TENSORS`): an inert
object stands in for each, so not even those are imported or called. Anything else is refused.
What a file's keys mean is in `releases` and `teacher_parts`.
"""

import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.distill.backbones import Backbone
from pcd_ray.errors import WeightsError

METADATA_KEY = "pcd_ray"
"""Name under which our own safetensors files carry their JSON metadata."""
_COUNT = ".num_batches_tracked"  # torch before 0.4.1 did not count, and nothing here needs it
_LISTED_KEYS = 6  # of a long list of keys, the first few say enough


_CONTAINERS = ("state_dict", "teacher", "model")
"""Entries that hold the weights: MoCo's, DINO's, and that of Barlow Twins, VICReg and BYOL."""
_NO_TENSORS = (
    "argparse.Namespace",  # DINO's arguments
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",  # scores beside the weights
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "__main__.exclude_bias_and_norm",  # in the optimiser of Barlow Twins and VICReg
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # solo-learn's
    "mmengine.logging.history_buffer.HistoryBuffer",  # curves beside mmpretrain's weights ...
    "builtins.getattr",  # ... whose own functions are named so
)
"""What published checkpoints name besides tensors."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A weights file as read: tensors by name, what it says of itself, and its hash."""

    uri: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str
    beside: tuple[str, ...] = ()
    """Names of what the file holds beside the weights: optimiser, arguments, another network."""


class _LeftOut:
    """Stands for what is no tensor: takes anything, does nothing."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(uri: str) -> WeightsFile:
    """Read a .safetensors or torch file; the entry that holds the weights is opened.

    Raises:
        StorageError: the file cannot be read.
        WeightsError: it is empty, truncated, needs unpickling, or holds no tensors.
    """
    data = storage.read_bytes(uri)
    if not data:
        raise WeightsError(f"{uri} is empty (0 bytes); fetch the file again")
    sha256 = hashlib.sha256(data).hexdigest()
    if _looks_like_safetensors(data):
        file = WeightsFile(uri, *_safetensors(uri, data), sha256)
    else:
        tensors, beside = _tensors_of(uri, _torch_content(uri, data))
        file = WeightsFile(uri, tensors, {}, sha256, beside)
    if not file.tensors:
        raise WeightsError(f"{uri} holds no tensors; give a weights file")
    return file


def load_backbone(backbone: Backbone, state: Mapping[str, Tensor], *, uri: str) -> None:
    """Load weights into a backbone, every key used but those of the classifier that was cut.

    Raises:
        WeightsError: keys are missing, left over, or of another shape.
    """
    own = backbone.body.state_dict()
    classifier = _classifier_names(backbone.body)
    left = [key for key in state if key not in own and key.rpartition(".")[0] not in classifier]
    missing = [key for key in own if key not in state and not key.endswith(_COUNT)]
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {listed(names)}"
        for names, what in ((missing, "keys missing"), (left, "keys left over"), (wrong, "shapes"))
        if names
    ]
    if problems:
        raise WeightsError(
            f"{uri} is no {backbone.name} file ({'; '.join(problems)}); give the matching file, "
            "or change teacher.arch and teacher.kwargs"
        )
    check_finite({key: state[key] for key in own if key in state}, uri=uri)
    backbone.body.load_state_dict({k: state.get(k, v) for k, v in own.items()}, strict=True)


def check_finite(tensors: Mapping[str, Tensor], *, uri: str) -> None:
    """Refuse weights that are infinite or no number.

    Raises:
        WeightsError: some are; they are named.
    """
    bad = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise WeightsError(
            f"{uri} holds infinite or NaN numbers in {listed(bad)}; fetch the file again, or take "
            "an earlier checkpoint"
        )


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


def listed(names: list[str]) -> str:
    """Return names in a row, a long list cut."""
    more = f", ... ({len(names) - _LISTED_KEYS} more)" if len(names) > _LISTED_KEYS else ""
    return ", ".join(names[:_LISTED_KEYS]) + more


def _safetensors(uri: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{uri} is a damaged safetensors file ({error}); fetch the file again"
        ) from error
    return tensors, _safetensors_metadata(uri, data)


def _torch_content(uri: str, data: bytes) -> object:
    inert: list[Any] = [(_LeftOut, name) for name in _NO_TENSORS]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no torch file fail in any way
        refused = isinstance(error, pickle.UnpicklingError) and _refused_name(str(error))
        if refused:
            raise WeightsError(
                f"{uri} names {refused}, which no weights need, and is not unpickled freely; give "
                "the file as its publisher has it, or save its state dict alone, or as .safetensors"
            ) from error
        raise WeightsError(f"{uri} {_what_else(data)}") from error


def _refused_name(problem: str) -> str:
    """Return what a pickle names that torch does not build; empty: something else is wrong."""
    named = re.search(r"GLOBAL (\S+)", problem)
    return named[1] if named else ""


def _what_else(data: bytes) -> str:
    """Say what bytes are that torch cannot read as tensors, and what to do."""
    again = "fetch the file again"
    if data.lstrip()[:1] == b"<":
        return f"is a web page and no weights (an error page or a login); {again}"
    if data.startswith(b"version https://git-lfs"):
        return (
            "is a pointer of git-lfs and no weights; run `git lfs pull`, or fetch the file itself"
        )
    if data.startswith(b"PK"):
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return f"is truncated at {len(data):,} bytes; {again}"
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            names = []
        if any(name.endswith("/constants.pkl") for name in names):
            return (
                "is a TorchScript program, which is not run here; save its state dict alone, or "
                "give the same weights under timm's names"
            )
        return f"is a damaged torch file, or a zip of something else; {again}"
    if data[:1] == b"\x80":
        return (
            "is a pickle of no plain tensors, or a truncated one, and is not unpickled freely; "
            f"{again}, or save its state dict alone, or as .safetensors"
        )
    return f"is no weights file; give a .safetensors or .pth file, or {again}"


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


def _tensors_of(uri: str, content: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if isinstance(content, dict):
        entry = next((name for name in _CONTAINERS if isinstance(content.get(name), dict)), None)
        inner = content[entry] if entry else content
        if inner:
            tensors = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
            if len(tensors) == len(inner):
                beside = [str(name) for name in content if name != entry] if entry else []
                return tensors, tuple(beside)
            strange = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
            raise WeightsError(
                f"{uri} holds entries that are no tensors: {listed(strange)}; "
                "give the file that holds the state dict"
            )
    raise WeightsError(f"{uri} holds a {type(content).__name__}, not a state dict of tensors")


def _classifier_names(body: nn.Module) -> tuple[str, ...]:
    config: Any = body.pretrained_cfg
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
