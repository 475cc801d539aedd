"""Scores of networks that training does not change, in one place for all runs that judge them.

A sweep's trials have the same teacher and the same untrained student: their kNN and their probes
are measured by the first trial that needs them. What is stored counts for the weights, the sets and
the settings that it was measured on, and for nothing else.

Shapes: C channels, L classes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import safetensors.torch
from torch import nn

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.distill.weights import read_weights, tensors_sha256
from pcd_ray.evaluate.eval_sets import crop_size_px
from pcd_ray.evaluate.segment.confusion import SegmentationScore
from pcd_ray.evaluate.segment.segmentation import LinearHead, ProbeResult

FORMAT = 1
"""Raised when scores are measured otherwise than before, so that older ones no longer count."""


def shared_knn(
    config: Config, network: nn.Module, measure: Callable[[], dict[int, float]]
) -> dict[int, float]:
    """Return top-1 in percent by number of neighbours, measured only where it is not stored."""
    stored = stored_knn(config, network)
    if stored is None:
        stored = measure()
        store_knn(config, network, stored)
    return stored


def stored_knn(config: Config, network: nn.Module) -> dict[int, float] | None:
    """Return what `store_knn` has stored for these weights, sets and crops; None: nothing."""
    place = _place(config, "knn", network)
    if place is None or not storage.exists(place[0]):
        return None
    return {int(k): value for k, value in json.loads(storage.read_text(place[0]))["top1"].items()}


def store_knn(config: Config, network: nn.Module, top1: dict[int, float]) -> None:
    """Store a network's kNN where ``eval.references`` says; nowhere where it is empty."""
    place = _place(config, "knn", network)
    if place is not None:
        storage.write_text(place[0], json.dumps({"of": place[1], "top1": top1}))


def shared_probe(
    config: Config, network: nn.Module, measure: Callable[[], ProbeResult]
) -> ProbeResult:
    """Return a network's linear probe, trained only where it is not stored."""
    place = _place(config, "probe", network)
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


def _place(config: Config, kind: str, network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return where a score lies and what it is of; None: scores are not shared."""
    if not config.eval.references:
        return None
    of = {
        "format": FORMAT,
        "kind": kind,
        "network_sha256": tensors_sha256(network),
        "measured_on": _knn_sets(config) if kind == "knn" else _probe_set(config),
    }
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    ending = "json" if kind == "knn" else "safetensors"
    return storage.join(config.eval.references, f"{kind}_{key}.{ending}"), of


def _knn_sets(config: Config) -> dict[str, Any]:
    return {
        "knn_train": config.eval.knn_train,
        "knn_test": config.eval.knn_test,
        "knn_k": config.eval.knn_k,
        "image_size_px": crop_size_px(config),
    }


def _probe_set(config: Config) -> dict[str, Any]:
    return {
        "segmentation": config.eval.segmentation,
        "preset": config.eval.segment.preset,
        "size_px": config.eval.segmentation_size_px,
        "seed": config.run.seed,
    }
