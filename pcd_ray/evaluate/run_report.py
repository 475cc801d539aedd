"""The page of a run: its scores, curves and pictures, in one file that opens without a network."""

from collections.abc import Mapping, Sequence
from typing import Any

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, to_yaml
from pcd_ray.evaluate.figures import loss_curve
from pcd_ray.evaluate.references import stored_references
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
    "teacher_2": "Second teacher",
}
_HOW = {
    "pixel": "pixel by pixel",
    "image": "image by image",
    "mse": "by regression of pixels",
}
PICTURES = {
    "pca_maps.png": "The same images as each network's frozen backbone sees them: the three "
    "strongest principal components of its map as red, green and blue.",
    "similarity.png": "What resembles the marked pixel: the cosine of its feature with that of "
    "every other position of the same image. Yellow is alike; each network has its own scale.",
    "similarity_across.png": "What resembles the first image's marked pixel, in that image and "
    "in the others.",
    "receptive_fields.png": "Effective receptive field: how much each pixel of the image moves the "
    "feature in the middle of the map (absolute gradient, averaged over images; brightness is its "
    "square root). The frame is the smallest square that holds half of it.",
    "attention_student.png": "Where the marked pixel looks in the student's MHSA neck, which is "
    "left out at export: attention of each head, from none (dark) to its own maximum (yellow), "
    "which is given as a multiple of an even share.",
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
    figures = [*_curves(folder, config, summary, history), *_pictures(folder)]
    page = render_report(
        title=f"Distilling {config.student.backbone} {_HOW[config.loss.kind]}: {config.run.name}",
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
    folder: RunFolder,
    config: Config,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> list[Figure]:
    if not history:
        return []
    scores = stored_references(folder, config) or summary.get("knn_top1", {})
    references = {_NETWORKS[n]: scores[n] for n in _NETWORKS if n in scores and n != "student"}
    unit = "" if config.loss.kind == "mse" else "nats"
    png = loss_curve(history, knn_references=references, loss_unit=unit)
    storage.write_bytes(folder.file("figures", "loss_curve.png"), png)
    return [Figure(png, "How training went. Chance for a position is 100 / positions of the map.")]


def _pictures(folder: RunFolder) -> list[Figure]:
    found = []
    for name, caption in PICTURES.items():
        uri = folder.file("figures", name)
        if storage.exists(uri):
            found.append(Figure(storage.read_bytes(uri), caption))
    return found


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    networks = [name for name in _NETWORKS if name != "teacher_2" or name in summary["plan"]]
    header = ("", *(_NETWORKS[name] for name in networks))
    rows = [
        (title, *(f"{summary[key][network]:.1f}" for network in networks))
        for key, title in _METRICS.items()
        if key in summary
    ]
    tables = [Table("Scores of frozen backbones", header, rows)] if rows else []
    classes = summary.get("segmentation_classes") or {}
    if classes:
        rows = [
            (name, *("-" if scores[n] is None else f"{scores[n]:.1f}" for n in networks))
            for name, scores in classes.items()
        ]
        tables.append(Table("Segmentation by class: IoU %, validation", header, rows))
    return tables


def _lead(config: Config, summary: Mapping[str, Any]) -> str:
    plan = summary["plan"]
    teachers = " and ".join(
        f"{teacher['arch']} ({teacher['source']})" for teacher in _teachers(plan).values()
    )
    return (
        f"A {config.student.backbone} ({plan['backbone_parameters'] / 1e6:.1f} M parameters) "
        f"learned from {teachers} on "
        f"{plan['images']:,} unlabelled images in {summary['step']:,} steps of "
        f"{plan['global_batch_size']}, {summary['training_s'] / 60:.1f} minutes on "
        f"{_workers(plan['num_workers'])} {plan['device']} worker(s)."
    )


def _workers(number: int | Sequence[int]) -> str:
    return f"{number}" if isinstance(number, int) else " to ".join(map(str, number))


def _notes(config: Config, summary: Mapping[str, Any]) -> list[str]:
    plan = summary["plan"]
    return [
        *(f"Not judged: {part} ({why})." for part, why in summary.get("not_judged", {}).items()),
        *([f"Not evaluated: {summary['not_evaluated']}."] if "not_evaluated" in summary else []),
        "Labels were used for judging alone, never for training.",
        f"One seed ({config.run.seed}): differences of a point or two may be chance.",
        *(
            f"{_NETWORKS[name]}'s licence: {teacher['licence']}."
            for name, teacher in _teachers(plan).items()
        ),
        *(
            f"SpatialAdaptor's law on {'this teacher' if name == 'teacher' else name}: relative "
            f"error {teacher.get('law_error', plan['law_error']):.1e} in float64 (rule "
            f"{options.adaptor.rule}, mean over the {options.adaptor.gate_mean})."
            for (name, teacher), options in zip(
                _teachers(plan).items(), config.teachers.values(), strict=True
            )
        ),
        _loss_note(config, plan["chance_loss"]),
    ]


def _loss_note(config: Config, chance: float) -> str:
    if config.loss.kind == "mse":
        return (
            "The loss is the squared distance of unit vectors, not comparable with contrastive "
            f"ones: a student at right angles to its teacher costs {chance:.2f} here."
        )
    pairs = "pooled images" if config.loss.kind == "image" else "pixels"
    return (
        f"The loss compares {pairs}. Losses of other kinds, temperatures or queue sizes are not "
        f"comparable: a student that knows nothing costs {chance:.2f} here."
    )


def _teachers(plan: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what the plan says of each teacher, by the name of its section."""
    return {name: plan[name] for name in ("teacher", "teacher_2") if name in plan}
