"""A sweep: trials on the cluster, the best one as a file.

Trials are runs in ``FOLDER/trials``, remembered by the Optuna study. Giving the same command again
runs what is left: trials that are over stay, interrupted ones go on from their checkpoints.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, config_to_values, to_yaml, with_values
from pcd_ray.data.shards import open_shards
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray.errors import ClusterError, ConfigError
from pcd_ray.ray_cluster import check_outlives_job
from pcd_ray.ray_connect import environment
from pcd_ray.ray_fit import stopped_in_order
from pcd_ray.ray_nodes import HEAD, Cluster, Node, cpus_of, gpus_of, nodes_with
from pcd_ray.ray_placement import asked_of, cluster_of
from pcd_ray.ray_shares import cpus_beside_others
from pcd_ray.train.ray_launch import dry_run, with_absolute_places
from pcd_ray.train.run_plan import RunPlan
from pcd_ray.train.teacher_cache import bytes_in_words, usual_cache_path
from pcd_ray.tune.ray_progress import Progress
from pcd_ray.tune.ray_search import NUMBER, StudySearch, stopping_rule
from pcd_ray.tune.ray_trial import CacheBuilder, run_trial
from pcd_ray.tune.records import (
    TrialRecord,
    best_trial,
    best_yaml,
    records_of,
    trade_offs,
    trial_name,
    trial_values,
    trials_csv,
)
from pcd_ray.tune.space import Space, open_space, with_absolute_choices
from pcd_ray.tune.study import (
    OVER,
    OpenStudy,
    StudyMarks,
    begin_study,
    find_study,
    new_study,
    story_of,
)
from pcd_ray.tune.sweep_report import UNITS, write_sweep_report

_OF_TUNE = "ray_tune"  # what Tune notes for itself; the study knows more
_DRIVER_SHARE = {"CPU": 0, HEAD: 0.001}  # a trial's own process waits for workers, on the head
# trials write their own metrics, and Progress says what a user needs to know
_QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
_OF_MAPS = ("teacher.", "teacher_2.", "augment.", "pairing.", "train.precision")
"""Options that teachers' maps follow from begin so."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A sweep, finished or as far as it is."""

    path: str
    """Its folder."""
    best_config: str
    """``best.yaml``; empty: no trial has finished."""
    best: Mapping[str, Any]
    """Number, score and varied options of the best trial."""
    trade_offs: list[int]
    """Trials that no other beats in score and in cost; empty without ``tune.cost``."""
    study: str
    """Optuna storage URL, for Optuna's dashboard; passwords are masked."""
    trials: list[TrialRecord] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Return what the command prints."""
        rows = [_printed(record) for record in self.trials]
        columns = dict.fromkeys(name for row in rows for name in row)
        return {
            "trials": [{name: row.get(name, "-") for name in columns} for row in rows],
            "path": self.path,
            "best_config": self.best_config,
            "best": dict(self.best),
            "trade_offs": self.trade_offs,
            "report": storage.join(self.path, "report.html"),
            "study": self.study,
        }


def sweep(config: Config) -> SweepResult:
    """Search ``tune.space``, or go on with the sweep of this name.

    Raises:
        PcdError: what is wrong with the space, the settings, the data or the cluster, before any
            trial starts. A trial that fails later is recorded with its reason and stops nothing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = with_absolute_choices(with_absolute_places(config))
    space = open_space(config)
    _check_scores(config, space)
    if not config.data.shards:
        raise ConfigError("data.shards is empty; give the folder that `pcd-ray pack` wrote")
    images = open_shards(config.data.shards).content_hash
    folder = RunFolder.of(config)
    check_outlives_job("run.root", folder.uri)
    storage.check_writable(folder.uri)
    story = story_of(config, space, data_sha256=images)
    found = find_study(config, folder, story)
    # a new one is checked before: what is refused must not be what the study is a study of
    ready = None if found else _checked(config)
    opened = found or new_study(config, folder)
    if trials_left(config, opened):
        # trials in a database may be reached from machines that do not share the folder
        with driving(FolderMarks(folder.uri, "run.name")), driving(StudyMarks(opened)):
            ready = ready or _checked(config)
            begin_study(opened, config, space, story)
            storage.write_text(folder.file("sweep.yaml"), to_yaml(_without_secrets(config)))
            _run(config, space, folder, opened, ready)
    return write_records(config, folder, opened)


def write_records(config: Config, folder: RunFolder, opened: OpenStudy) -> SweepResult:
    """Write ``trials.csv``, ``best.yaml`` and ``report.html`` of what the study holds."""
    records = records_of(opened)
    storage.write_text(folder.file("trials.csv"), trials_csv(records))
    best = best_trial(opened)
    if best is not None:
        text = best_yaml(_without_secrets(config), best, unit=UNITS[config.tune.metric])
        storage.write_text(folder.file("best.yaml"), text)
    write_sweep_report(folder, _without_secrets(config), opened, records)
    return SweepResult(
        path=folder.uri,
        best_config=folder.file("best.yaml") if best else "",
        best={"trial": best.number, "score": best.values[0], **trial_values(best)} if best else {},
        trade_offs=[] if config.tune.cost == "none" else trade_offs(opened),
        study=opened.shown_url,
        trials=records,
    )


def trials_left(config: Config, opened: OpenStudy) -> int:
    """Return how many trials are to run; if any, then all that have begun."""
    left = config.tune.trials - len(opened.trials(*OVER))
    return max(left, len(opened.trials(TrialState.RUNNING))) if left > 0 else 0


def trials_at_a_time(config: Config, have: Cluster, *, device: str) -> int:
    """Return how many trials run at once; of an elastic trial's workers there may be the most.

    Raises:
        ClusterError: ``tune.max_concurrent`` trials need more than the cluster can have.
    """
    nodes = nodes_with(have.most, config.train.node_labels)
    workers, asked = config.train.max_workers, config.tune.max_concurrent
    per_worker = config.train.cpus_per_worker
    cpus = cpus_of(nodes, have.limit)
    shared = nodes_with(nodes, config.data.node_labels)
    per_task = config.data.cpus_per_task if shared else 0.0
    if device == "cuda":
        gpus = gpus_of(nodes, have.limit)
        fitting = max(1, gpus // workers)
        if per_trial := workers * per_worker + per_task:
            fitting = max(1, min(fitting, int(cpus // per_trial)))
        needs = (
            f"{workers} GPUs (train.num_workers) and {per_trial:g} CPUs each, the cluster has "
            f"{gpus} and {cpus:g}"
        )
    else:
        per_trial = workers * max(per_worker, 1) + per_task
        fitting = max(1, int(cpus // per_trial))
        needs = f"{per_trial:g} CPUs each, the cluster has {cpus:g}"
    if asked > fitting:
        raise ClusterError(
            f"tune.max_concurrent={asked} trials need {needs}; use at most {fitting}, or 0"
        )
    return asked or (fitting if device == "cuda" else 1)


def places_of(
    config: Config, folder: RunFolder, have: Cluster, *, many: int, device: str
) -> dict[str, Any]:
    """Return the options that a sweep sets for all of its trials: what they share and may use.

    Caches lie where a run in the sweep's own place has them, and so ``best.yaml``.
    """
    places: dict[str, Any] = {"eval.pictures": False}
    if not config.eval.references:
        places["eval.references"] = folder.file("references")
    for name, teacher in config.teachers.items():
        if teacher.cache.views and not teacher.cache.path:
            places[f"{name}.cache.path"] = usual_cache_path(config)
    if brought := [_stated(node) for node in have.most if node not in have.now]:
        places["run.autoscaled_nodes"] = brought  # trials cannot see the launcher's file
    if many > 1 and not config.train.threads_per_worker:
        nodes = [node for node in nodes_with(have.most, config.train.node_labels) if node.cpus]
        cores = min((node.cpus for node in nodes), default=1.0)
        count = max(1, min(have.limit, sum(node.count for node in nodes)))
        share = cores / -(-many * config.train.max_workers // count)
        places["train.threads_per_worker"] = max(1, int(share))
    if many > 1 and not config.train.cpus_per_worker:
        asked = replace(asked_of(config), device=device)
        places["train.cpus_per_worker"] = cpus_beside_others(have, asked, groups=many)
    return places


def _stated(node: Node) -> dict[str, Any]:
    """Return nodes as ``run.autoscaled_nodes`` states them."""
    values = asdict(node)
    del values["is_head"]  # the autoscaler brings none
    return values


def cache_builder(config: Config, space: Space, *, many: int) -> Any:
    """Start what builds caches for trials that run at once; None: they have none to share.

    It is on the head, since other nodes may be taken away. If it dies it is started again and asked
    once more: what is built stays.
    """
    stored = any(teacher.cache.views for teacher in config.teachers.values())
    varied = any(name.endswith(".cache.views") for name in space.distributions)
    if many == 1 or not (stored or varied):
        return None
    on_head: Any = {"num_cpus": 0, "resources": {HEAD: _DRIVER_SHARE[HEAD]}}
    lasting: Any = {"max_restarts": -1, "max_task_retries": 1}
    return ray.remote(**on_head, **lasting)(CacheBuilder).remote()


def cache_lines(space: Space, plan: RunPlan) -> list[str]:
    """Return what the teachers' stored maps of a sweep will cost, before they are made."""
    lines = []
    varied = [name for name in space.distributions if name.startswith(_OF_MAPS)]
    for name in ("teacher", "teacher_2"):
        values = plan.summary() if name == "teacher" else (plan.teacher_2 or {})
        cache = values.get("teacher_cache")
        if cache is None:
            continue
        size = f"{cache['maps']:,} maps, {bytes_in_words(cache['bytes'])}"
        there = {"whole": "all there", "partial": "partly there", "missing": "to be made"}
        each = f"; as much again for each new value of {', '.join(varied)}" * bool(varied)
        lines.append(f"{name} cache: {size}, in {cache['uri']}: {there[cache['state']]}{each}")
    return lines


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is known before a trial starts."""

    have: Cluster
    plan: RunPlan
    many: int
    """Trials at a time."""


def _checked(config: Config) -> _Checked:
    """Return what trials run with.

    Raises:
        PcdError: what is wrong with cluster, data or networks, so that no trial could run.
    """
    have = cluster_of(config)
    plan = dry_run(config)
    return _Checked(have, plan, trials_at_a_time(config, have, device=plan.device))


def _run(
    config: Config,
    space: Space,
    folder: RunFolder,
    opened: OpenStudy,
    ready: _Checked,
) -> None:
    """Run the trials that are left.

    Raises:
        KeyboardInterrupt: the user stopped it; what ran goes on with the same command.
    """
    plan, many = ready.plan, ready.many
    trials_uri, left = folder.file("trials"), trials_left(config, opened)
    progress = Progress(config, opened, lambda: write_records(config, folder, opened))
    notes = [*cache_lines(space, plan), *filter(None, [plan.notes.get("run.wait_for_nodes_s")])]
    progress.begin(space, at_a_time=many, left=left, notes=notes)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trial = tune.with_parameters(
        run_trial,
        base=config_to_values(_without_secrets(config)),
        trials_uri=trials_uri,
        places=places_of(config, folder, ready.have, many=many, device=plan.device),
        builder=cache_builder(config, space, many=many),
    )
    tuner = tune.Tuner(
        tune.with_resources(trial, _DRIVER_SHARE),
        tune_config=tune.TuneConfig(
            search_alg=StudySearch(opened, space, config, trials_uri),
            scheduler=stopping_rule(config, space, opened),
            num_samples=left,
            max_concurrent_trials=many,
            trial_dirname_creator=_folder_of,
        ),
        run_config=tune.RunConfig(
            name=_OF_TUNE, storage_path=folder.uri, callbacks=[progress], verbose=0
        ),
    )
    try:
        with (
            environment(_QUIET),
            stopped_in_order(),
        ):  # Tune heeds Ctrl-C alone; SIGTERM aborts the process in its loop
            tuner.fit()
    finally:
        storage.delete_folder(folder.file(_OF_TUNE))
    if opened.trials(TrialState.RUNNING):
        raise KeyboardInterrupt


def _folder_of(trial: Any) -> str:
    return trial_name(trial.config[NUMBER])


def _check_scores(config: Config, space: Space) -> None:
    """Refuse a metric that no trial would report."""
    metric, judged = config.tune.metric, config.eval
    if metric == "knn_top1" and not judged.knn_train:
        raise ConfigError(
            "tune.metric=knn_top1, but eval.knn_train is empty: no trial would report it; give "
            "labelled images in eval.knn_train and eval.knn_test (the same ones: leave one out)"
        )
    if metric == "segmentation_miou" and not judged.segmentation:
        raise ConfigError(
            "tune.metric=segmentation_miou, but eval.segmentation is empty: no trial would report "
            "it; give a labelled segmentation set"
        )
    option = "every_epochs" if metric == "knn_top1" else "probe_every_epochs"
    if config.tune.scheduler != "none" and not getattr(judged, option):
        raise ConfigError(
            f"tune.scheduler={config.tune.scheduler} stops trials by their scores while they "
            f"train, but eval.{option}=0; set it to 1, or tune.scheduler=none"
        )
    if config.tune.scheduler != "none" and config.tune.grace_epochs > space.most_epochs:
        raise ConfigError(
            f"tune.grace_epochs={config.tune.grace_epochs} is above train.epochs="
            f"{space.most_epochs}; use less"
        )


def _without_secrets(config: Config) -> Config:
    """Return the configuration without the study's URL, which may hold a password."""
    return with_values(config, {"tune.storage": ""})


def _printed(record: TrialRecord) -> dict[str, Any]:
    score = "-" if record.score is None else f"{record.score:.1f}"
    values = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in record.values.items()
    }
    cost = {} if record.cost is None else {"cost": f"{record.cost:g}"}
    row = {"trial": str(record.number), "state": record.state, "score": score, **cost}
    return {**row, "epochs": record.epochs, **values}
