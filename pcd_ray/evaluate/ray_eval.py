"""``pcd-ray eval``: judge networks side by side on the cluster and write one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from pcd_ray import storage
from pcd_ray.checkpoint import find_checkpoint
from pcd_ray.config import Config
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError, PcdError, TrainingError
from pcd_ray.evaluate.comparison import Estimate, compare, plain
from pcd_ray.evaluate.eval_report import write_eval_report
from pcd_ray.evaluate.eval_sets import open_knn_images, open_probe
from pcd_ray.evaluate.judging import Kind, judge_rows, out_folder
from pcd_ray.evaluate.necks import stored_student
from pcd_ray.evaluate.ray_classify import judge_knn, judge_linear, neighbours
from pcd_ray.evaluate.ray_detection import judge_detection, open_detection_set
from pcd_ray.evaluate.ray_segmentation import judge_segmentation
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.side_by_side import (
    classified_images,
    detected_images,
    look_pictures,
    segmented_images,
)
from pcd_ray.evaluate.students import JudgedNetwork, Row, open_rows, stored_config
from pcd_ray.ray_cluster import WorkerShare, call_in_task, connect, share_for_workers

_COMMON = ("images_per_forward", "image_size_px")


def _labelled_images(config: Config) -> dict[str, str]:
    return {"eval.knn_train": config.eval.knn_train, "eval.knn_test": config.eval.knn_test}


def _check_neighbours(config: Config) -> None:
    images = open_knn_images(config)
    if images is not None:
        neighbours(config.eval.knn_ks, images.train.num_rows)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="knn",
            title="kNN on frozen, pooled features",
            judge=judge_knn,
            options=(*_COMMON, "knn_train", "knn_test", "knn_ks"),
            sets=_labelled_images,
            check=_check_neighbours,
            images=classified_images,
            draws=False,
            on_features=True,
        ),
        Kind(
            name="linear",
            title="Linear probe on frozen, pooled features",
            judge=judge_linear,
            options=(*_COMMON, "knn_train", "knn_test", "linear"),
            sets=_labelled_images,
            check=open_knn_images,
            images=classified_images,
            on_features=True,
        ),
        Kind(
            name="segment",
            title="Semantic segmentation",
            judge=judge_segmentation,
            options=(*_COMMON, "segmentation", "segmentation_size_px", "segment"),
            sets=lambda config: {"eval.segmentation": config.eval.segmentation},
            check=open_probe,
            images=segmented_images,
        ),
        Kind(
            name="detect",
            title="Detection and instance segmentation",
            judge=judge_detection,
            options=("detect",),
            sets=lambda config: {"eval.detect.data": config.eval.detect.data},
            check=open_detection_set,
            images=detected_images,
        ),
    )
}
"""What ``pcd-ray eval`` can do, by name."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Networks side by side."""

    kind: str
    path: str
    """Folder of the page."""
    table: dict[str, dict[str, Estimate]]
    """Metric -> row -> value in percent with its interval."""
    rows: dict[str, list[Scores]] = field(repr=False)
    """Row -> its measurements."""
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be judged -> why."""

    @property
    def report(self) -> str:
        """URI of the page."""
        return storage.join(self.path, "report.html")

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds."""
        judged = {label: measured for label, measured in self.rows.items() if measured}
        return {
            "kind": self.kind,
            "table": plain(self.table),
            "scores": {
                metric: {label: asdict(value) for label, value in of.items()}
                for metric, of in self.table.items()
            },
            "classes": {label: measured[0].classes for label, measured in judged.items()},
            "about": {label: [s.about for s in measured] for label, measured in judged.items()},
            "failures": self.failures,
            "path": self.path,
            "report": self.report,
        }


def config_for(specs: Sequence[str], config: Config | None = None) -> Config:
    """Return the options to judge by: those given, else those of the first run judged.

    Raises:
        CheckpointError: that run has no whole checkpoint.
    """
    return config or stored_config(specs) or Config()


def evaluate(kind: str, specs: Sequence[str], config: Config) -> EvalResult:
    """Judge networks, each part once: what an earlier call has finished is read, not repeated.

    Args:
        kind: ``knn``, ``linear``, ``segment`` or ``detect``.
        specs: what to judge, a row each (see `students`).
        config: sets and protocol; also what ``untrained`` and ``teacher`` mean.

    Returns:
        The comparison, its page written.

    Raises:
        ConfigError: no network, an unknown kind, or a set that is not given.
        PcdError: a network or a set cannot be had, told before anything is judged.
        TrainingError: some networks could not be judged; all others are on the page.
    """
    if kind not in KINDS:
        raise ConfigError(f"eval {kind!r} is none of {', '.join(KINDS)}; choose one of these")
    chosen = KINDS[kind]
    _check_sets(chosen, config)
    if not specs:
        raise ConfigError(f"eval {kind}: nothing to judge; give a run, a file or a timm name")
    rows = open_rows(specs, config)
    out = out_folder(specs[0], config)
    storage.check_writable(out)
    share = _share(config)
    measured, failures = judge_rows(chosen, rows, config, out=out, device=share.device)
    table = compare({label: scores for label, scores in measured.items() if scores})
    result = EvalResult(kind, storage.join(out, kind), table, measured, failures)
    looks: dict[str, bytes] = {}
    try:
        looks = _looks(chosen, rows, config, share)
    except PcdError as error:  # scores are what was asked for
        failures["pictures"] = " ".join(str(error).splitlines())
    _write(result, chosen, rows, config, looks)
    if failures:
        reasons = "; ".join(f"{part} ({why})" for part, why in failures.items())
        raise TrainingError(
            f"eval {kind}: not judged: {reasons}; the rest is in {result.report}, and the same "
            "command goes on from there"
        )
    return result


def _check_sets(kind: Kind, config: Config) -> None:
    missing = [option for option, uri in kind.sets(config).items() if not uri]
    if missing:
        raise ConfigError(
            f"eval {kind.name}: {' and '.join(missing)} not given; write "
            + " ".join(f"{option}=FOLDER" for option in missing)
        )
    kind.check(config)


def _share(config: Config) -> WorkerShare:
    return share_for_workers(
        connect(),
        num_workers=1,
        device=config.train.device,
        cpus_per_worker=config.train.cpus_per_worker,
        threads_per_worker=config.train.threads_per_worker,
        cpus_per_data_task=config.data.cpus_per_task,
    )


def _looks(kind: Kind, rows: Sequence[Row], config: Config, share: WorkerShare) -> dict[str, bytes]:
    """Draw the first network of each row on the same images."""
    drawn: dict[str, bytes] = call_in_task(
        _drawn,
        [row.networks[0] for row in rows],
        _necks(rows),
        kind.images(config),
        config.eval.pixel,
        config.eval.image_size_px or config.augment.image_size_px,
        share=replace(share, device="cpu"),
    )
    return drawn


def _necks(rows: Sequence[Row]) -> dict[str, Student]:
    """Return the students with a neck, by row: it is left out of what is judged."""
    stored = {
        row.label: stored_student(find_checkpoint(storage.absolute(row.run)))
        for row in rows
        if row.run
    }
    return {label: student for label, student in stored.items() if len(student.neck)}


def _drawn(
    networks: Sequence[JudgedNetwork],
    necks: Mapping[str, Student],
    images: Sequence[Image.Image],
    pixel: tuple[float, float],
    size_px: int,
) -> dict[str, bytes]:
    return look_pictures(networks, images, pixel=pixel, size_px=size_px, necks=necks)


def _write(
    result: EvalResult,
    kind: Kind,
    rows: Sequence[Row],
    config: Config,
    looks: Mapping[str, bytes],
) -> None:
    for name, png in looks.items():
        storage.write_bytes(storage.join(result.path, "figures", name), png)
    write_eval_report(
        result.report,
        title=kind.title,
        table=result.table,
        rows=result.rows,
        sources={row.label: ", ".join(n.source for n in row.networks) for row in rows},
        failures=result.failures,
        looks=looks,
        sets=kind.sets(config),
        config=config,
    )
    text = json.dumps(result.summary(), indent=2)
    storage.write_text(storage.join(result.path, "summary.json"), text)
