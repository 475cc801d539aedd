"""Weights files: read without running anything, load into a backbone whole, hash, write our own.

Read are ``.safetensors`` and torch files of both kinds (zip and older) by torch's ``weights_only``
unpickler. Old checkpoints name a few harmless things besides tensors (`_NO_TENSORS`): an inert
object stands in for each, so not even those are imported or called. Anything else is refused.
Tensors of files on a local disk are mapped into memory, not copied: processes of a machine share
them. What a file's keys mean is in `state_dicts`, `conversions`, `releases` and `teacher_parts`.
"""

import contextlib
import hashlib
import json
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.state_dicts import listed, open_checkpoint
from pcd_ray.errors import WeightsError

METADATA_KEY = "pcd_ray"
"""Name under which our own safetensors files carry their JSON metadata."""
_HEAD_BYTES = 1024  # enough to tell what a file is
_BYTES_AT_ONCE = 1 << 20
_COUNT = ".num_batches_tracked"  # torch before 0.4.1 did not count, and nothing here needs it
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
    entry: str = ""
    """The entries that led to the weights, joined by dots; empty: the file holds nothing else."""


class _LeftOut:
    """Stands for what is no tensor: takes anything, does nothing."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(uri: str) -> WeightsFile:
    """Read a .safetensors or torch file; the entry that holds the weights is opened.

    Local files are mapped into memory. A remote file is copied to a temporary one (``TMPDIR``),
    which is mapped and removed.

    Raises:
        StorageError: the file cannot be read.
        WeightsError: it is empty, truncated, needs unpickling, or holds no state dict or several.
    """
    with _on_local_disk(uri) as path:
        head, sha256 = storage.attempted(uri, "read", lambda: _examined(path))
        if not head:
            raise WeightsError(f"{uri} is empty (0 bytes); fetch the file again")
        if _looks_like_safetensors(head):
            file = WeightsFile(uri, *_safetensors(uri, path), sha256)
        else:
            found = open_checkpoint(_torch_content(uri, path, head), uri=uri)
            file = WeightsFile(uri, found.tensors, {}, sha256, found.beside, found.entry)
    if not file.tensors:
        raise WeightsError(f"{uri} holds no tensors; give a weights file")
    return file


@contextlib.contextmanager
def _on_local_disk(uri: str) -> Iterator[str]:
    """Yield the path of a file, or of a copy of a remote one that is removed behind.

    What is mapped into memory stays readable: its blocks are freed when the mapping is.
    """
    fs, path = storage.filesystem(uri)
    if not storage.is_remote(uri):
        yield path
        return
    with contextlib.ExitStack() as stack:
        try:
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="pcd_ray_weights_"))
        except OSError as error:
            raise storage.StorageError(
                f"{uri} cannot be copied to a temporary file: {error}; set TMPDIR to a folder that "
                "is writable"
            ) from error

        def download() -> None:
            with fs.open_input_stream(path) as source, open(copy.name, "wb") as target:
                shutil.copyfileobj(source, target, _BYTES_AT_ONCE)

        storage.attempted(uri, "read", download)
        yield copy.name


def _examined(path: str) -> tuple[bytes, str]:
    """Return the first bytes of a file and its SHA-256."""
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
        stream.seek(0)
        return head, hashlib.file_digest(stream, "sha256").hexdigest()


def load_backbone(
    backbone: Backbone, state: Mapping[str, Tensor], *, uri: str, assign: bool = False
) -> None:
    """Load weights into a backbone, every key used but those of the classifier that was cut.

    Args:
        backbone: the network.
        state: its weights under timm's names.
        uri: their file, for messages.
        assign: take the tensors themselves, without a copy wherever they have the network's type:
            for networks that are never trained.

    Raises:
        WeightsError: keys are missing, left over, or of another shape.
    """
    own = backbone.body.state_dict()
    classifier = _classifier_prefixes(backbone.body)
    left = [key for key in state if key not in own and not key.startswith(classifier)]
    missing = [key for key in own if key not in state and not key.endswith(_COUNT)]
    if state and not own.keys() & state.keys():
        raise WeightsError(
            f"{uri} holds none of the {len(own)} tensors of {backbone.name}: its keys are "
            f"{listed(list(state))}, those of {backbone.name} are {listed(list(own))}; give "
            "weights under timm's names"
        )
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
    used = {key: state.get(key, value) for key, value in own.items()}
    check_finite(used, uri=uri)
    if assign:
        used = {key: value.to(own[key].dtype) for key, value in used.items()}
    backbone.body.load_state_dict(used, strict=True, assign=assign)


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


def _safetensors(uri: str, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise WeightsError(
            f"{uri} is a damaged safetensors file ({error}); fetch the file again"
        ) from error
    return tensors, _own_metadata(uri, metadata)


def _torch_content(uri: str, path: str, head: bytes) -> object:
    inert: list[Any] = [(_LeftOut, name) for name in _NO_TENSORS]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except Exception as error:  # bytes that are no torch file fail in any way
        refused = isinstance(error, pickle.UnpicklingError) and _refused_name(str(error))
        if refused:
            raise WeightsError(
                f"{uri} names {refused}, which no weights need, and is not unpickled freely; give "
                "the file as its publisher has it, or save its state dict alone, or as .safetensors"
            ) from error
        raise WeightsError(f"{uri} {_what_else(path, head)}") from error


def _mappable(path: str) -> bool:
    """Whether a file is a zip of plain bytes: older torch files and compressed zips are not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())


def _refused_name(problem: str) -> str:
    """Return what a pickle names that torch does not build; empty: something else is wrong."""
    named = re.search(r"GLOBAL (\S+)", problem)
    return named[1] if named else ""


def _what_else(path: str, head: bytes) -> str:
    """Say what a file is that torch cannot read as tensors, and what to do."""
    again = "fetch the file again"
    if head.lstrip()[:1] == b"<":
        return f"is a web page and no weights (an error page or a login); {again}"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a pointer of git-lfs and no weights; run `git lfs pull`, or fetch the file itself"
        )
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return f"is truncated at {Path(path).stat().st_size:,} bytes; {again}"
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            names = []
        if any(name.endswith("/constants.pkl") for name in names):
            return (
                "is a TorchScript program, which is not run here; save its state dict alone, or "
                "give the same weights under timm's names"
            )
        return f"is a damaged torch file, or a zip of something else; {again}"
    if head[:1] == b"\x80":
        return (
            "is a pickle of no plain tensors, or a truncated one, and is not unpickled freely; "
            f"{again}, or save its state dict alone, or as .safetensors"
        )
    return f"is no weights file; give a .safetensors or .pth file, or {again}"


def _looks_like_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000


def _own_metadata(uri: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a safetensors file's metadata, our own entry of it read as JSON."""
    if METADATA_KEY in metadata:
        try:
            metadata[METADATA_KEY] = dict(json.loads(metadata[METADATA_KEY]))
        except (ValueError, TypeError) as error:
            raise WeightsError(
                f"{uri}: its metadata {METADATA_KEY!r} is no JSON mapping ({error}); export again"
            ) from error
    return metadata


def _classifier_prefixes(body: nn.Module) -> tuple[str, ...]:
    config: Any = body.pretrained_cfg
    names = config.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
