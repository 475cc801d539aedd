"""The page of a run: its scores, curves and pictures, in one file that opens without a network."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, to_yaml
from pcd_ray.evaluate.figures import loss_curve
from pcd_ray.evaluate.report import Figure, Table, render_report

_METRICS = {
    "segmentation_miou": "Segmentation, linear probe on the frozen map: mIoU %, validation",
    "segmentation_test_miou": "Segmentation, linear probe on the frozen map: mIoU %, test",
    "knn_top1": "kNN on pooled features: top-1 %",
    "knn_k1_top1": "kNN with one neighbour: top-1 %",
}
_NETWORKS = {
    "untrained": "Student, untrained",
    "student": "Student, distilled",
    "teacher": "Teacher",
}
_PICTURES = {
    "pca_maps.png": "The same images as each network's frozen backbone sees them: the three "
    "strongest principal components of its map as red, green and blue.",
    "segmentation.png": "What a linear classifier makes of each frozen map, beside the truth.",
    "views.png": "Views as the networks are fed them, with the crop and flip they carry.",
}


def write_report(
    folder: RunFolder,
    config: Config,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """Write ``figures/loss_curve.png`` and ``report.html``; return the page's URI.

    Args:
        folder: the run.
        config: its options.
        summary: what ``summary.json`` holds.
        history: lines of ``metrics.jsonl``.
    """
    figures = [*_curves(folder, summary, history), *_pictures(folder)]
    page = render_report(
        title=f"Distilling {config.student.backbone} pixel by pixel: {config.run.name}",
        lead=_lead(config, summary),
        tables=_tables(summary),
        figures=figures,
        notes=_notes(config, summary),
        config_yaml=to_yaml(config),
    )
    uri = folder.file("report.html")
    storage.write_text(uri, page)
    return uri


def _curves(
    folder: RunFolder, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> list[Figure]:
    if not history:
        return []
    scores = summary.get("knn_top1", {})
    uri = folder.file("references.json")
    if storage.exists(uri):
        scores = next(iter(json.loads(storage.read_text(uri)).values()))
    references = {_NETWORKS[n]: v for n, v in scores.items() if n in ("untrained", "teacher")}
    png = loss_curve(history, knn_references=references)
    storage.write_bytes(folder.file("figures", "loss_curve.png"), png)
    return [Figure(png, "How training went. Chance for a position is 100 / positions of the map.")]


def _pictures(folder: RunFolder) -> list[Figure]:
    found = []
    for name, caption in _PICTURES.items():
        uri = folder.file("figures", name)
        if storage.exists(uri):
            found.append(Figure(storage.read_bytes(uri), caption))
    return found


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    header = ("", *_NETWORKS.values())
    rows = [
        (title, *(f"{summary[key][network]:.1f}" for network in _NETWORKS))
        for key, title in _METRICS.items()
        if key in summary
    ]
    tables = [Table("Scores of frozen backbones", header, rows)] if rows else []
    classes = summary.get("segmentation_classes") or {}
    if classes:
        rows = [
            (name, *("-" if scores[n] is None else f"{scores[n]:.1f}" for n in _NETWORKS))
            for name, scores in classes.items()
        ]
        tables.append(Table("Segmentation by class: IoU %, validation", header, rows))
    return tables


def _lead(config: Config, summary: Mapping[str, Any]) -> str:
    plan = summary["plan"]
    return (
        f"A {config.student.backbone} ({plan['backbone_parameters'] / 1e6:.1f} M parameters) "
        f"learned from {plan['teacher']['arch']} ({plan['teacher']['source']}) on "
        f"{plan['images']:,} unlabelled images in {summary['step']:,} steps of "
        f"{plan['global_batch_size']}, {summary['training_s'] / 60:.1f} minutes on "
        f"{plan['num_workers']} {plan['device']} worker(s)."
    )


def _notes(config: Config, summary: Mapping[str, Any]) -> list[str]:
    plan = summary["plan"]
    return [
        "Labels were used for judging alone, never for training.",
        f"One seed ({config.run.seed}): differences of a point or two may be chance.",
        f"Teacher's licence: {plan['teacher']['licence']}.",
        f"SpatialAdaptor's law on this teacher: relative error {plan['law_error']:.1e} in float64 "
        f"(rule {config.teacher.adaptor.rule}).",
        f"Losses of other temperatures or queue sizes are not comparable: a student that knows "
        f"nothing costs {plan['chance_loss']:.2f} here.",
    ]
