"""What is this: a folder of images, packed shards, a weights file, a checkpoint or a run."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder, checkpoint_steps, find_checkpoint
from pcd_ray.data.image_index import classes_of, column
from pcd_ray.data.shards import MANIFEST, open_shards, verify_shards
from pcd_ray.data.sources import LIST_SUFFIXES, is_list, list_images
from pcd_ray.distill.heads import output_width
from pcd_ray.distill.spatial_adaptor import layer_names
from pcd_ray.distill.teacher_parts import arch_advice, headless_words, take_apart
from pcd_ray.distill.weights import read_weights
from pcd_ray.errors import PcdError

_WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What a place on storage holds."""

    kind: str
    """``images``, ``shards``, ``weights``, ``checkpoint`` or ``run``."""
    facts: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {"kind": self.kind, **self.facts}


def inspect(uri: str, *, verify: bool = False) -> InspectResult:
    """Say what a file or folder is.

    Args:
        uri: a folder of images, a list of images, packed shards, weights, a checkpoint or a run.
        verify: read every byte of shards against their hashes, which takes as long as reading.

    Raises:
        PcdError: it is missing, damaged, or none of the things that pcd_ray knows.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise PcdError(f"{uri}: there is no such file or folder; check the path")
    if storage.exists(storage.join(uri, MANIFEST)):
        return _shards(uri, verify=verify)
    if storage.exists(storage.join(uri, "checkpoint.json")):
        return _checkpoint(uri, "checkpoint")
    if checkpoint_steps(RunFolder(uri)):
        return _checkpoint(uri, "run")
    if storage.exists(RunFolder(uri).file("config.yaml")):
        return InspectResult("run", {"checkpoints": "none yet: `pcd-ray train` goes on with it"})
    if is_weights(uri):
        return _weights(uri)
    if not storage.is_folder(uri) and not is_list(uri):
        raise PcdError(
            f"{uri} is a file of no kind that pcd_ray knows; give weights "
            f"({', '.join(_WEIGHTS_SUFFIXES)}), a list of images ({', '.join(LIST_SUFFIXES)}) "
            "or a folder"
        )
    return _images(uri)


def is_weights(uri: str) -> bool:
    """Say whether a URI names a weights file."""
    return storage.name_of(uri).lower().endswith(_WEIGHTS_SUFFIXES)


def _shards(uri: str, *, verify: bool) -> InspectResult:
    shards = verify_shards(uri) if verify else open_shards(uri)
    return InspectResult(
        "shards",
        {
            "images": shards.num_images,
            "bad_images_left_out": shards.num_bad,
            "shards": len(shards.files),
            "bytes": sum(file.bytes for file in shards.files),
            "classes": len(shards.classes),
            "sources": [
                {"uri": s.uri, "images": s.images, "weight": s.weight} for s in shards.sources
            ],
            "content_hash": shards.content_hash,
            "verified": "all hashes match"
            if verify
            else "manifest, index and sizes; every byte with --verify",
        },
    )


def _images(uri: str) -> InspectResult:
    notes: list[str] = []
    index = list_images(uri, notes)
    suffixes = Counter(key.rpartition(".")[2].lower() for key in index.column("key").to_pylist())
    return InspectResult(
        "images",
        {
            "images": index.num_rows,
            "bytes": int(column(index, "size").sum()),
            "classes": len(classes_of(index)),
            "formats": dict(suffixes.most_common()),
        }
        | ({"notes": "; ".join(notes)} if notes else {}),
    )


def _weights(uri: str) -> InspectResult:
    file = read_weights(uri)
    parts = take_apart(file)
    head = list(parts.head) if parts.head is not None else []
    network = parts.network
    if isinstance(network, str):
        network = f"not known: {parts.foreign or f'{network}; {arch_advice(network)}'}"
    return InspectResult(
        "weights",
        {
            "method": "not said: a bare backbone" if parts.layout == "timm" else parts.layout,
            "network": f"{network}, up to stage {parts.tap}" if parts.tap else str(network),
            "conversions": list(parts.notes) or "none",
            "tensors": len(file.tensors),
            "parameters": sum(value.numel() for value in parts.backbone.values()),
            "head": layer_names(head) or f"none: {headless_words(parts)}",
            "output_width": output_width(parts.head, 0) if parts.head is not None else None,
            "mean": _statistics(parts.mean),
            "std": _statistics(parts.std),
            "unused": parts.unused,
            "licence": parts.licence or "unknown",
            "file_sha256": file.sha256,
        },
    )


def _statistics(values: tuple[float, ...] | None) -> list[float] | str:
    return "what timm says of the network" if values is None else list(values)


def _checkpoint(uri: str, kind: str) -> InspectResult:
    stored = find_checkpoint(uri)
    steps = checkpoint_steps(RunFolder(uri)) if kind == "run" else [stored.about["step"]]
    facts = {key: stored.about[key] for key in ("step", "total_steps", "epoch")}
    return InspectResult(
        kind,
        facts
        | {name: _identity(stored.about[name]) for name in stored.config.teachers}
        | {
            "student": stored.about["student"]["backbone"],
            "loss": stored.config.loss.kind,
            "checkpoints": steps,
            "metrics": stored.about["metrics"],
            "queue_filled_pct": [
                round(100 * min(1, queue["num_pushed"] / len(queue["negatives"])))
                for queue in stored.state["queues"]
                if queue
            ],
            "data_sha256": stored.about["data_sha256"],
            "verified": "the state's hash matches",
        },
    )


def _identity(teacher: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of a teacher, its hash told apart from that of a file."""
    return {("tensors_sha256" if k == "sha256" else k): v for k, v in teacher.items()}
