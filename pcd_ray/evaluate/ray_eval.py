"""``pcd-ray eval``: judge networks side by side on the cluster and write one page."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from pcd_ray import storage
from pcd_ray.checkpoint import find_checkpoint
from pcd_ray.config import Config
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError, EvaluationError
from pcd_ray.evaluate.comparison import Estimate, compare, plain
from pcd_ray.evaluate.eval_places import out_folder, page_name, parts_folder
from pcd_ray.evaluate.eval_report import Page, write_eval_report
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Kind, Measurements, judge_rows, protocol_of, story_of
from pcd_ray.evaluate.necks import stored_student
from pcd_ray.evaluate.ray_kinds import KINDS
from pcd_ray.evaluate.side_by_side import look_pictures
from pcd_ray.evaluate.students import Row, open_rows, stored_config
from pcd_ray.progress import progress
from pcd_ray.ray_cluster import call_in_task
from pcd_ray.ray_placement import share_of_workers, wait_for_workers
from pcd_ray.ray_shares import WorkerShare


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Networks side by side."""

    kind: str
    path: str
    """Folder of the page."""
    table: dict[str, dict[str, Estimate]]
    """Metric -> row -> value in percent with its interval."""
    rows: Measurements = field(repr=False)
    """Row -> network -> seed -> scores."""
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be judged -> why."""

    @property
    def report(self) -> str:
        """URI of the page."""
        return storage.join(self.path, "report.html")

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds."""
        judged = {
            label: [scores for training in measured for scores in training]
            for label, measured in self.rows.items()
            if any(measured)
        }
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
        EvaluationError: some networks could not be judged; all others are on the page.
    """
    chosen = _kind(kind)
    if not specs:
        raise ConfigError(f"eval {kind}: nothing to judge; give a run, a file or a timm name")
    _check_given(chosen, config)
    with progress("reading networks"):
        rows = open_rows(specs, config)
    with progress("reading labeled sets"):
        data = chosen.open(config)
    for note in chosen.notes(data, config):
        _say(f"note: {note}")
    out = out_folder(specs[0], config)
    storage.check_writable(out)
    share = share_of_workers(config, num_workers=1)
    wait_for_workers(config, share, say=_say, num_workers=1)
    with progress("comparing labeled sets with stored scores"):
        page = _page(chosen, data, config, share.device)
        protocol = protocol_of(chosen, data, config, share.device)
    parts = parts_folder(specs[0], config)
    measured, failures = judge_rows(
        chosen, rows, data, config, protocol=protocol, parts=parts, device=share.device
    )
    name = page_name(kind, chosen.method(config), page.sets, protocol)
    result = EvalResult(kind, storage.join(out, name), compare(measured), measured, failures)
    with progress("writing the page"):  # pictures may fail in ways that nobody can catch
        _write(result, page, rows, config, {})
    looks = _looks(result, chosen.images, data, rows, config, share)
    with progress("writing the page"):
        _write(result, page, rows, config, looks)
    if failures:
        reasons = "; ".join(f"{part} ({why})" for part, why in failures.items())
        raise EvaluationError(
            f"eval {kind}: not judged or drawn: {reasons}; the rest is in {result.report}, and the "
            "same command goes on from there"
        )
    return result


def _page(kind: Kind, data: Any, config: Config, device: str) -> Page:
    return Page(
        title=kind.title(config),
        sets=kind.sets(config),
        facts={**kind.facts(data, config, device), "device": device},
        notes=kind.notes(data, config),
        fine_tuned=kind.fine_tunes(config),
    )


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ConfigError(f"eval {name!r} is none of {', '.join(KINDS)}; choose one of these")
    return KINDS[name]


def _check_given(kind: Kind, config: Config) -> None:
    missing = [option for option, uri in kind.sets(config).items() if not uri]
    if missing:
        raise ConfigError(
            f"eval {kind.name}: {' and '.join(missing)} not given; write "
            + " ".join(f"{option}=FOLDER" for option in missing)
        )


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _looks(
    result: EvalResult,
    images: Callable[[Any, Config], list[Image.Image]],
    data: Any,
    rows: Sequence[Row],
    config: Config,
    share: WorkerShare,
) -> dict[str, bytes]:
    """Draw the first network of each row that could be judged, on the same images.

    What fails is noted in the result, by picture.
    """
    shown = shown_networks(rows, result.rows)
    if not shown:
        return {}
    try:
        drawn, failed = call_in_task(
            _drawn,
            [network for network, _ in shown],
            _necks(shown),
            images(data, config),
            config.eval.pixel,
            config.eval.image_size_px or config.augment.image_size_px,
            share=replace(share, device="cpu"),
            what="drawing pictures",
        )
    except Exception as error:  # scores are what was asked for
        result.failures["pictures"] = story_of(error)
        return {}
    result.failures.update(failed)
    looks: dict[str, bytes] = drawn
    return looks


def shown_networks(rows: Sequence[Row], measured: Measurements) -> list[tuple[JudgedNetwork, str]]:
    """Return the first network of each row that has scores, and its run, ``""`` where it has none.

    One that failed, such as a training that has diverged, would cost all rows their pictures.
    """
    judged = (
        [
            (network, run)
            for network, run, scores in zip(
                row.networks, row.runs, measured[row.label], strict=True
            )
            if scores
        ]
        for row in rows
    )
    return [networks[0] for networks in judged if networks]


def _necks(shown: Sequence[tuple[JudgedNetwork, str]]) -> dict[str, Student]:
    """Return the students with a neck, by row: it is left out of what is judged."""
    stored = {
        network.label: stored_student(find_checkpoint(storage.absolute(run)))
        for network, run in shown
        if run
    }
    return {label: student for label, student in stored.items() if len(student.neck)}


def _drawn(
    networks: Sequence[JudgedNetwork],
    necks: Mapping[str, Student],
    images: Sequence[Image.Image],
    pixel: tuple[float, float],
    size_px: int,
) -> tuple[dict[str, bytes], dict[str, str]]:
    return look_pictures(networks, images, pixel=pixel, size_px=size_px, necks=necks)


def _write(
    result: EvalResult,
    page: Page,
    rows: Sequence[Row],
    config: Config,
    looks: Mapping[str, bytes],
) -> None:
    """Write the page, its numbers and its pictures; none of an earlier call stay."""
    figures = storage.join(result.path, "figures")
    storage.delete_folder(figures)
    for name, png in looks.items():
        storage.write_bytes(storage.join(figures, name), png)
    write_eval_report(
        result.report,
        page,
        table=result.table,
        measured=result.rows,
        rows=rows,
        failures=result.failures,
        looks=looks,
        config=config,
    )
    text = json.dumps(result.summary(), indent=2)
    storage.write_text(storage.join(result.path, "summary.json"), text)
