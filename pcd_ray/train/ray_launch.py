"""Config -> TorchTrainer -> result: what the driver does."""

import contextlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pcd_ray import errors, storage
from pcd_ray import metric_names as names
from pcd_ray.checkpoint import (
    Checkpoint,
    RunFolder,
    changed_run,
    check_same_run,
    checkpoint_name,
    checkpoint_steps,
    find_checkpoint,
    latest_checkpoint,
)
from pcd_ray.config import Config, config_to_values, to_yaml
from pcd_ray.data.shards import Shards, open_shards
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.eval_sets import open_knn_images, open_probe
from pcd_ray.evaluate.ray_judge import Judgement, judge
from pcd_ray.evaluate.references import REFERENCES
from pcd_ray.evaluate.run_report import write_report
from pcd_ray.export import student_of
from pcd_ray.progress import progress
from pcd_ray.ray_cluster import call_in_task, check_outlives_job
from pcd_ray.ray_events import Event
from pcd_ray.ray_fit import fit
from pcd_ray.ray_placement import note_on_nodes, share_of_workers, wait_for_workers
from pcd_ray.ray_shares import WorkerShare
from pcd_ray.train.ray_teacher_cache import build_caches
from pcd_ray.train.ray_worker import check_gpu, train_worker
from pcd_ray.train.run_log import RunLog
from pcd_ray.train.run_plan import RunPlan, plan_run


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run."""

    path: str
    """Its folder."""
    checkpoint: str
    """Its last checkpoint."""
    metrics: dict[str, Any]
    """Scores in percent, by metric and network, and how the run went."""
    history: list[dict[str, Any]] = field(repr=False)
    """Lines of ``metrics.jsonl``."""

    def student(self) -> nn.Module:
        """Return the student's backbone as a timm model with the trained weights, in eval mode."""
        return student_of(find_checkpoint(self.checkpoint))

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds."""
        return {"path": self.path, "checkpoint": self.checkpoint, **self.metrics}


def train(
    config: Config,
    *,
    listener: Callable[[Event], None] | None = None,
    build: Callable[..., int] = build_caches,
) -> TrainResult:
    """Train a student, or go on with the run of this name where it stopped.

    Args:
        config: the run.
        listener: is told what the workers tell, on a thread of its own, e.g. by a sweep.
        build: what computes teachers' maps that are not stored, as `build_caches` does.

    Returns:
        The finished run, judged, with its report written.

    Raises:
        InUseError: another driver trains this run.
        PcdError: what a user can mend; whatever was stored stays. A run that is finished but could
            not be judged in full has its summary and report all the same.
    """
    config = with_absolute_places(config)
    folder = RunFolder.of(config)
    with driving(FolderMarks(folder.uri, "run.name")):
        return _train(config, folder, listener, build)


def _train(
    config: Config,
    folder: RunFolder,
    listener: Callable[[Event], None] | None,
    build: Callable[..., int],
) -> TrainResult:
    found = _checked(config, folder)
    _prepare_folder(config, folder)
    log = RunLog(folder, total_steps=found.plan.steps)
    try:
        log.say(f"plan: {found.plan.headline}; {found.steps_done:,} steps are done")
        if found.steps_done < found.plan.steps:
            for option, note in found.plan.notes.items():
                log.say(f"note: {option}: {note}")
            wait_for_workers(config, found.share, say=log.say)
            if found.share.device == "cuda":
                call_in_task(check_gpu, share=found.share)
            build(config, found.shards, share=found.share, say=log.say)
            wait_for_workers(config, found.share, say=log.say)  # idle ones have gone meanwhile
            _fit(config, folder, found.share, log, listener)
    finally:
        log.close()
    log.say("evaluating the student")
    judgement = judge(config, share=found.share, say=log.say)
    with progress("writing the report"):
        result = _finish(config, folder, found.plan, judgement, log.history)
    if "not_evaluated" in result.metrics:
        log.say(f"note: not evaluated: {result.metrics['not_evaluated']}")
    if judgement.failures:
        reasons = "; ".join(f"{part} ({why})" for part, why in judgement.failures.items())
        raise EvaluationError(
            f"the run is finished and stored, but its summary and report in {folder.uri} are "
            f"written without {reasons}; mend that, and the same command judges it again"
        )
    return result


def dry_run(config: Config) -> RunPlan:
    """Check everything that `train` would and return the plan, without training.

    Nothing is left on storage. Whether a bucket can be written is therefore not tried.

    Raises:
        PcdError: what would stop the run.
    """
    config = with_absolute_places(config)
    return _checked(config, RunFolder.of(config), dry=True).plan


def with_absolute_places(config: Config) -> Config:
    """Return the configuration with paths that mean the same in a worker's own folder."""

    def absolute(section: Any, *options: str) -> Any:
        given = {name: getattr(section, name) for name in options}
        return replace(section, **{k: storage.absolute(v) for k, v in given.items() if v})

    teachers = {
        name: replace(absolute(each, "weights"), cache=absolute(each.cache, "path"))
        for name, each in config.teachers.items()
    }
    return replace(
        config,
        run=absolute(config.run, "root"),
        data=absolute(config.data, "shards"),
        eval=absolute(config.eval, "knn_train", "knn_test", "segmentation", "references"),
        export=absolute(config.export, "path"),
        **teachers,
    )


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is known before a run starts."""

    shards: Shards
    share: WorkerShare
    plan: RunPlan
    steps_done: int
    """Optimiser steps of the newest checkpoint; 0: there is none."""


def _checked(config: Config, folder: RunFolder, *, dry: bool = False) -> _Checked:
    """Check data and storage, then the cluster, then the networks: the cheapest first."""
    if not config.data.shards:
        raise errors.ConfigError("data.shards is empty; give the folder that `pcd-ray pack` wrote")
    shards = open_shards(config.data.shards)
    open_knn_images(config)
    open_probe(config)
    check_outlives_job("run.root", config.run.root)
    storage.check_writable(folder.uri, in_buckets=not dry)
    stored = latest_checkpoint(folder, with_state=False)
    guarded = None if config.run.allow_changes else stored
    if guarded is not None:
        check_same_run(config, guarded, data_sha256=shards.content_hash)
    share = share_of_workers(config)
    if config.train.sync_batchnorm and share.device == "cpu":
        raise errors.ConfigError(
            "train.sync_batchnorm=true works on cuda alone; set it to false or train.device=cuda"
        )
    plan = plan_run(config, shards, device=share.device)
    if guarded is not None:
        _refuse_other_teachers(config, plan, guarded)
    _check_caches_can_be_written(plan, dry=dry)
    if note := note_on_nodes(config, share):
        plan.notes["run.wait_for_nodes_s"] = note
    if stored is not None and stored.about["step"] >= plan.steps:
        stored = latest_checkpoint(folder)  # a finished run is continued if its end is damaged
    return _Checked(shards, share, plan, 0 if stored is None else int(stored.about["step"]))


def _check_caches_can_be_written(plan: RunPlan, *, dry: bool) -> None:
    """Refuse a cache that is to be made where nothing can be written; a whole one may be so."""
    for cache in (plan.teacher_cache, (plan.teacher_2 or {}).get("teacher_cache")):
        if cache is not None and cache["state"] != "whole":
            storage.check_writable(storage.parent(cache["uri"]), in_buckets=not dry)


def _refuse_other_teachers(config: Config, plan: RunPlan, stored: Checkpoint) -> None:
    """Refuse to go on with a run when what lies in a teacher's place has changed."""
    changes, folder = [], RunFolder.of(config)
    for name, teacher in config.teachers.items():
        sha256 = plan.identities[name]["sha256"]
        place = teacher.weights or teacher.arch
        if not sha256:  # a head would be fitted anew
            changes.append(
                f"{name}.weights: the weights of {place} are others than those that the run fitted "
                f"a head to, or {folder.fitted_head(name)} is gone"
            )
        elif sha256 != stored.about[name]["sha256"]:
            changes.append(f"{name}.weights: the weights of {place} are others")
    if changes:
        raise changed_run(stored, changes)


def _prepare_folder(config: Config, folder: RunFolder) -> None:
    """Take away what an earlier try left that must not count; never a file that is not ours."""
    if not checkpoint_steps(folder):  # nothing to go on with
        heads = [folder.fitted_head(name) for name in ("teacher", "teacher_2")]
        for uri in (*heads, *map(folder.file, (REFERENCES, "metrics.jsonl"))):
            storage.delete_file(uri)
        for file in storage.list_files(folder.file("tensorboard")):
            if storage.name_of(file.uri).startswith("events.out.tfevents"):
                storage.delete_file(file.uri)
    storage.write_text(folder.file("config.yaml"), to_yaml(config))


def _fit(
    config: Config,
    folder: RunFolder,
    share: WorkerShare,
    log: RunLog,
    listener: Callable[[Event], None] | None,
) -> None:
    """Train on the workers, passing on what they tell."""
    said: dict[str, Callable[[Event], None]] = {
        "metrics": lambda event: log.metrics(event.step, event.epoch, event.values),
        "resumed": lambda event: log.resume_at(event.step),
        "checkpoint": lambda _: log.save(),
        "lost": lambda event: log.lost(event.text),
        "say": lambda event: log.say(event.text),
    }

    def on_event(event: Event) -> None:
        if event.kind in said:
            said[event.kind](event)
        if listener is not None:
            listener(event)

    with contextlib.ExitStack() as start:
        start.enter_context(progress("starting the workers"))
        said["reserved"] = lambda _: start.close()
        fit(
            train_worker,
            {"config": config_to_values(config)},
            folder=folder,
            share=share,
            settings=config.train,
            num_workers=config.train.num_workers,
            on_event=on_event,
        )


def _finish(
    config: Config,
    folder: RunFolder,
    plan: RunPlan,
    judgement: Judgement,
    history: list[dict[str, Any]],
) -> TrainResult:
    step = judgement.step
    result = TrainResult(
        path=folder.uri,
        checkpoint=storage.join(folder.checkpoints, checkpoint_name(step)),
        metrics={
            "step": step,
            "training_s": round(_training_s(history), 1),
            **judgement.scores,
            "segmentation_classes": judgement.segmentation_classes,
            **({"not_judged": judgement.failures} if judgement.failures else {}),
            **({} if _has_evaluation_set(config) else {"not_evaluated": _how_to_evaluate(folder)}),
            "plan": plan.summary(),
        },
        history=history,
    )
    storage.write_text(folder.file("summary.json"), json.dumps(result.summary(), indent=2))
    write_report(folder, config, result.summary(), history)
    return result


def _has_evaluation_set(config: Config) -> bool:
    return bool(config.eval.knn_train or config.eval.segmentation)


def _how_to_evaluate(folder: RunFolder) -> str:
    run = shlex.quote(folder.uri)
    return (
        "no labeled set is given (eval.knn_train and eval.knn_test, or eval.segmentation). Rerun "
        "the same command with these options, or run e.g. "
        f"`pcd-ray eval knn {run} eval.knn_train=FOLDER eval.knn_test=FOLDER` or "
        f"`pcd-ray eval segment {run} eval.segmentation=FOLDER`"
    )


def _training_s(history: list[dict[str, Any]]) -> float:
    """Return the time in training steps, over all sittings of a run."""
    total, before = 0.0, 0
    for line in history:
        if names.STEP_S in line:
            total += line[names.STEP_S] * (line["step"] - before)
            before = line["step"]
    return total
