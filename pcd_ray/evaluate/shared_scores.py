"""Scores of networks that training does not change, in one place for all runs that judge them.

A sweep's trials have the same teacher and the same untrained student: their kNN and their probes
are measured by the first trial that needs them. What is stored counts for the network, for what the
sets hold and for the settings that it was measured on, and for nothing else.

Shapes: C channels, L classes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import safetensors.torch

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.weights import read_weights, tensors_sha256
from pcd_ray.evaluate.contents import files_sha256, hash_of
from pcd_ray.evaluate.eval_sets import crop_size_px
from pcd_ray.evaluate.segment.confusion import SegmentationScore
from pcd_ray.evaluate.segment.segmentation import LinearHead, ProbeResult
from pcd_ray.evaluate.segment.segmentation_data import SegmentationData

FORMAT = 3
"""Raised when scores are measured otherwise than before, so that older ones no longer count."""


def shared_knn(
    config: Config, network: Backbone, sets: Sequence[str], measure: Callable[[], dict[int, float]]
) -> dict[int, float]:
    """Return top-1 in percent by number of neighbours, measured only where it is not stored.

    Args:
        config: where scores are shared, sizes and neighbours.
        network: whose it is.
        sets: hashes of what the sets hold.
        measure: measures it.
    """
    stored = stored_knn(config, network, sets)
    if stored is None:
        stored = measure()
        store_knn(config, network, sets, stored)
    return stored


def stored_knn(config: Config, network: Backbone, sets: Sequence[str]) -> dict[int, float] | None:
    """Return what `store_knn` has stored for this network, these sets and crops; None: nothing."""
    place = _place(config, "knn", network, lambda: _knn_sets(config, sets))
    if place is None or not storage.exists(place[0]):
        return None
    return {int(k): value for k, value in json.loads(storage.read_text(place[0]))["top1"].items()}


def store_knn(
    config: Config, network: Backbone, sets: Sequence[str], top1: dict[int, float]
) -> None:
    """Store a network's kNN where ``eval.references`` says; nowhere where it is empty."""
    place = _place(config, "knn", network, lambda: _knn_sets(config, sets))
    if place is not None:
        storage.write_text(place[0], json.dumps({"of": place[1], "top1": top1}))


def shared_probe(
    config: Config, network: Backbone, data: SegmentationData, measure: Callable[[], ProbeResult]
) -> ProbeResult:
    """Return a network's linear probe, trained only where it is not stored."""
    place = _place(config, "probe", network, lambda: _probe_set(config, data))
    if place is None:
        return measure()
    uri, of = place
    if storage.exists(uri):
        return _read_probe(uri)
    result = measure()
    scores = {split: asdict(score) for split, score in result.scores.items()}
    tensors = {"weight": result.head.weight.cpu(), "bias": result.head.bias.cpu()}
    metadata = {"scores": json.dumps(scores), "of": json.dumps(of)}
    storage.write_bytes(uri, safetensors.torch.save(tensors, metadata=metadata))
    return result


def _read_probe(uri: str) -> ProbeResult:
    file = read_weights(uri)
    scores = json.loads(file.metadata["scores"])
    return ProbeResult(
        scores={split: SegmentationScore(**values) for split, values in scores.items()},
        confusions={},
        head=LinearHead(file.tensors["weight"], file.tensors["bias"]),
    )


def _place(
    config: Config, kind: str, network: Backbone, measured_on: Callable[[], dict[str, Any]]
) -> tuple[str, dict[str, Any]] | None:
    """Return where a score lies and what it is of; None: scores are not shared."""
    if not config.eval.references:
        return None
    of = {
        "format": FORMAT,
        "kind": kind,
        "network": _network(network),
        "measured_on": measured_on(),
    }
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    ending = "json" if kind == "knn" else "safetensors"
    return storage.join(config.eval.references, f"{kind}_{key}.{ending}"), of


def _network(network: Backbone) -> dict[str, Any]:
    """Return all that a network's maps follow from; strides and paddings are in no weight."""
    return {
        "name": network.name,
        "sha256": tensors_sha256(network),
        "body_sha256": hash_of(repr(network.body)),
        "kwargs": repr(
            sorted(network.kwargs.items())
        ),  # heads of attention are in no module's text
        "tap": network.tap,
        "recentred": network.recentred,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
    }


def _knn_sets(config: Config, sets: Sequence[str]) -> dict[str, Any]:
    return {
        "sets": list(sets),
        "knn_k": config.eval.knn_k,
        "image_size_px": crop_size_px(config),
    }


def _probe_set(config: Config, data: SegmentationData) -> dict[str, Any]:
    splits = {split: list(data.names(split)) for split in data.splits}
    files = [*data.images.values(), *data.masks.values()]
    return {
        "segmentation": data.uri,
        "set_sha256": hash_of([list(data.classes), data.relabel, splits, files_sha256(files)]),
        "size_px": config.eval.segmentation_size_px,
        "seed": config.run.seed,
    }
