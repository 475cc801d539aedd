"""The Optuna study of a sweep: what was tried, how it went, what may go on.

The study is the sweep's memory. It outlives the driver, in SQLite in the sweep's folder or wherever
``tune.storage`` says, and Optuna's own dashboard reads it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import (
    Config,
    TuneConfig,
    changed_options,
    config_from_values,
    config_to_values,
    option_names,
    option_value,
)
from pcd_ray.errors import ConfigError
from pcd_ray.seeds import derive_seed
from pcd_ray.tune.space import Space, flat_space

OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States of trials that are not run again."""
HISTORY = "history"
"""User attribute: [[epoch, score], ...]."""
REASON = "reason"
"""User attribute of a failed trial: why."""
COST = "cost"
"""User attribute: what the trial cost, in the unit of ``tune.cost``."""
ADDED = "added"
"""User attribute: options that a space function set without asking for them."""
_STUDY_FILE = "study.db"  # of a sweep that keeps its study itself
_SWEEP = "sweep"  # user attribute of the study: what it is a study of
_DRIVER = "driver:"  # how user attributes of the study that mark its driver begin
_SAME_FOR_ALL = ("space", "space_function", "metric", "cost")  # of tune: scores compare only so
_FREE_EVAL = ("eval.pictures", "eval.pixel", "eval.out", "eval.references", "eval.seeds")


@dataclass(frozen=True, slots=True)
class OpenStudy:
    """A study and where it is stored."""

    study: optuna.Study
    url: str
    """Its Optuna storage, with any password."""

    @property
    def shown_url(self) -> str:
        """The storage as it may be printed."""
        password = urlsplit(self.url).password
        return self.url.replace(f":{password}@", ":***@") if password else self.url

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in some states, or all, by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)


class StudyMarks:
    """Marks of drivers as user attributes of the study, for `driving`."""

    option = "run.name"

    def __init__(self, opened: OpenStudy) -> None:
        self._study = opened.study
        self.name = f"the sweep {opened.study.study_name} in {opened.shown_url}"

    def read(self) -> dict[str, str]:
        """Return each mark's text, by its token."""
        attributes = self._study.user_attrs.items()
        own = {name: text for name, text in attributes if name.startswith(_DRIVER) and text}
        return {name.removeprefix(_DRIVER): text for name, text in own.items()}

    def write(self, token: str, text: str) -> None:
        """Store a mark."""
        self._study.set_user_attr(_DRIVER + token, text)

    def clear(self, token: str) -> None:
        """Empty a mark: Optuna deletes no attribute."""
        self._study.set_user_attr(_DRIVER + token, "")


@dataclass(frozen=True, slots=True)
class Story:
    """What a sweep is a sweep of: trials of another one would not compare."""

    space_sha256: str
    data_sha256: str
    """Of the packed images' content."""
    weights_sha256: Mapping[str, str]
    """Teacher, or a file that trials choose -> hash of the file; a place may change, that not."""
    config: Mapping[str, Any]


def story_of(config: Config, space: Space, *, data_sha256: str) -> Story:
    """Return what a sweep is a sweep of.

    Raises:
        StorageError: a file of weights cannot be read.
    """
    own = {name: teacher.weights for name, teacher in config.teachers.items()}
    files = {key: uri for key, uri in (own | {w: w for w in space.weights}).items() if uri}
    hashes = {uri: _file_sha256(uri) for uri in set(files.values()) if storage.exists(uri)}
    values = config_to_values(config)
    values["tune"]["storage"] = ""  # a place, maybe with a password
    return Story(
        space_sha256=space.sha256,
        data_sha256=data_sha256,
        weights_sha256={key: hashes[uri] for key, uri in files.items() if uri in hashes},
        config=values,
    )


def find_study(config: Config, folder: RunFolder, story: Story) -> OpenStudy | None:
    """Return the sweep's study as it was left; None: it has not begun, and none is written.

    Args:
        config: the sweep.
        folder: where it lives.
        story: what it is a sweep of now.

    Raises:
        ConfigError: the study is one of another space, of other settings or of another folder; or
            it should be a SQLite file in a bucket.
    """
    url = _url(config, folder)
    if not config.tune.storage and not storage.exists(folder.file(_STUDY_FILE)):
        return None
    connected = _storage(url)
    if config.run.name not in optuna.get_all_study_names(connected):
        return None
    study = optuna.load_study(
        study_name=config.run.name, storage=connected, sampler=sampler(config)
    )
    opened = OpenStudy(study, url)
    stored = study.user_attrs.get(_SWEEP)
    if stored is None and (opened.trials() or study.directions != _directions(config.tune)):
        raise ConfigError(
            f"{opened.shown_url} holds a study {config.run.name!r} that pcd-ray did not begin; "
            "choose another run.name"
        )
    if stored is None:  # its driver died as it began
        return None
    _refuse_other_root(json.loads(stored), config, opened)
    _refuse_changes(json.loads(stored), config, story)
    return opened


def new_study(config: Config, folder: RunFolder) -> OpenStudy:
    """Store an empty study, which is none of any sweep before `begin_study`."""
    url = _url(config, folder)
    if not config.tune.storage:
        os.makedirs(folder.uri, exist_ok=True)
    study = optuna.create_study(
        storage=_storage(url),
        study_name=config.run.name,
        directions=_directions(config.tune),
        sampler=sampler(config),
        load_if_exists=True,
    )
    return OpenStudy(study, url)


def begin_study(opened: OpenStudy, config: Config, space: Space, story: Story) -> None:
    """Say what a study is of, with the configuration's own values as its first trial if wanted.

    One that has begun is left as it is. For the driver that has the study's mark.

    Args:
        opened: the study.
        config: the sweep.
        space: what it searches.
        story: what it is a sweep of.

    Raises:
        ConfigError: another driver has begun it meanwhile, with other settings.
    """
    stored = opened.study.user_attrs.get(_SWEEP)
    if stored is not None:
        _refuse_changes(json.loads(stored), config, story)
        return
    opened.study.set_user_attr(_SWEEP, json.dumps(asdict(story)))
    if config.tune.own_values_first:
        opened.study.enqueue_trial(space.own_values(config))


def sampler(config: Config, *, trials: int = 0) -> optuna.samplers.BaseSampler:
    """Return what chooses values; trials that run count as bad, so that others look elsewhere.

    Args:
        config: the sweep.
        trials: how many the study has: a later sitting must not draw the first one's values again.
    """
    seed = derive_seed(config.run.seed, "sampler", trials) % 2**32
    if config.tune.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=config.tune.random_trials,
        constant_liar=True,
    )


def new_storage(url: str) -> optuna.storages.BaseStorage:
    """Return a connection to a study's storage, for another user of it."""
    return _storage(url)


def history_of(trial: FrozenTrial) -> dict[int, float]:
    """Return a trial's scores by epoch."""
    return {int(epoch): score for epoch, score in trial.user_attrs.get(HISTORY, [])}


def _url(config: Config, folder: RunFolder) -> str:
    if config.tune.storage:
        return config.tune.storage
    if storage.is_remote(folder.uri):
        raise ConfigError(
            f"run.root={config.run.root} is a bucket, where SQLite cannot live; give tune.storage, "
            "an Optuna storage URL such as postgresql://..., or a local run.root"
        )
    return f"sqlite:///{folder.file(_STUDY_FILE)}"


def _storage(url: str) -> optuna.storages.BaseStorage:
    try:
        patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=patient)
    except Exception as error:  # of SQLAlchemy and of each database's own driver
        shown = url.partition("://")[0] + "://..."  # what follows may hold a password
        raise ConfigError(
            f"tune.storage={shown} cannot be opened ({type(error).__name__}); give an Optuna "
            "storage URL, install its driver, or leave it empty for SQLite in the sweep's folder"
        ) from error


def _directions(tune: TuneConfig) -> list[StudyDirection]:
    """Return Optuna's directions: the score is to be high, the cost low."""
    high, low = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    return [high] if tune.cost == "none" else [high, low]


def _file_sha256(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def _refuse_other_root(stored: Mapping[str, Any], config: Config, opened: OpenStudy) -> None:
    """Refuse a study whose trials lie elsewhere; one in its own folder may move with that."""
    root = stored["config"]["run"]["root"]
    if config.tune.storage and root != config.run.root:
        raise ConfigError(
            f"run.root={config.run.root}, but {opened.shown_url} holds the sweep {config.run.name} "
            f"of run.root={root}; give that, or choose another run.name"
        )


def _refuse_changes(stored: Mapping[str, Any], config: Config, story: Story) -> None:
    before = config_from_values(stored["config"])
    changes = changed_options(before, config)
    if stored["space_sha256"] != story.space_sha256:
        changes += _changes_of_space(before.tune, config.tune)
    if stored.get("data_sha256", story.data_sha256) != story.data_sha256:
        changes.append(f"data.shards: the packed images at {config.data.shards} are others")
    changes += [
        f"{f'{key}.weights' if key in config.teachers else key}: the weights there are others"
        for key, sha256 in stored.get("weights_sha256", {}).items()  # early studies have none
        if story.weights_sha256.get(key, sha256) != sha256
    ]
    for name in option_names():
        section, _, option = name.rpartition(".")
        judged = name.startswith("eval.") and name not in _FREE_EVAL
        if not judged and not (section == "tune" and option in _SAME_FOR_ALL[2:]):
            continue
        old, new = option_value(before, name), option_value(config, name)
        if old != new:
            changes.append(f"{name}: {old!r} -> {new!r}")
    if changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"{RunFolder.of(config).uri} holds a sweep with other settings, whose trials would not "
            f"compare:\n"
            f"  {listed}\nchoose another run.name, or set these back"
        )


def _changes_of_space(before: TuneConfig, now: TuneConfig) -> list[str]:
    """Return a line for each option that is searched otherwise than before."""
    old, new = (dict(flat_space(each.space)) for each in (before, now))
    lines = [
        f"tune.space: {name}: {old.get(name, 'not searched')} -> {new.get(name, 'not searched')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if before.space_function or now.space_function:
        lines.append(
            f"tune.space_function: {before.space_function or 'none'} -> "
            f"{now.space_function or 'none'}; its text, what it asks for or what it sets is another"
        )
    return lines or ["tune.space: other options or ranges"]
