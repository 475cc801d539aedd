"""One trial: a whole training run in the sweep's folder, whose scores Tune hears as they come."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray import tune

from pcd_ray import metric_names as names
from pcd_ray import storage
from pcd_ray.config import Config, TuneConfig, config_from_values, config_to_values
from pcd_ray.data.shards import Shards, open_shards
from pcd_ray.errors import ConfigError
from pcd_ray.ray_cluster import fetched
from pcd_ray.ray_events import Event
from pcd_ray.ray_shares import WorkerShare
from pcd_ray.train.ray_launch import TrainResult, train
from pcd_ray.train.ray_teacher_cache import build_caches
from pcd_ray.tune.ray_search import (
    EPOCH,
    FINISHED,
    NUMBER,
    REFUSAL,
    RESERVATION,
    SCORE,
    VALUES,
    reason_file,
    train_command,
)
from pcd_ray.tune.records import trial_name
from pcd_ray.tune.space import trial_config
from pcd_ray.tune.study import COST


def run_trial(
    parameters: dict[str, Any],
    *,
    base: dict[str, Any],
    trials_uri: str,
    places: Mapping[str, Any],
    builder: Any,
) -> None:
    """Train and judge one trial, or go on with it where it stopped.

    Args:
        parameters: its number, the values of the options that it varies, and why it cannot be.
        base: the sweep's configuration, as plain data.
        trials_uri: folder of the trials' runs.
        places: options that the sweep sets for all trials, where they do not vary.
        builder: a `CacheBuilder` actor that all trials share; None: no other trial runs.
    """
    number = parameters[NUMBER]
    try:
        if parameters[REFUSAL]:
            raise ConfigError(parameters[REFUSAL])
        shared = trial_config(config_from_values(base), places)
        config = config_of_trial(shared, parameters[VALUES], number, trials_uri)
        result = train(config, listener=Reporter(config), build=_build_by(builder))
    except Exception as error:
        storage.write_text(reason_file(trials_uri, number), _story(error, trials_uri, number))
        raise
    tune.report(
        {
            SCORE: result.metrics[config.tune.metric]["student"],
            EPOCH: config.train.epochs,
            COST: cost_of(result, config.tune),
            FINISHED: True,
        }
    )


def config_of_trial(
    base: Config, values: Mapping[str, Any], number: int, trials_uri: str
) -> Config:
    """Return the configuration of a trial: a run of its own, below the sweep's folder.

    Raises:
        ConfigError: the values do not go together.
    """
    config = trial_config(base, values)
    return replace(config, run=replace(config.run, root=trials_uri, name=trial_name(number)))


def cost_of(result: TrainResult, options: TuneConfig) -> float:
    """Return what a finished trial cost, in the unit of ``tune.cost``."""
    if options.cost == "parameters":
        return float(result.metrics["plan"]["backbone_parameters"])
    return float(result.metrics["training_s"])


class CacheBuilder:
    """Builds teachers' maps for trials that run at once: an actor, one request after the other.

    Of trials that need the same maps the first one has them made, the others find them whole.
    """

    def build(self, values: dict[str, Any], share: WorkerShare) -> int:
        """Do what `build_caches` does, for a configuration as plain data."""
        config = config_from_values(values)
        shards = open_shards(config.data.shards)
        return build_caches(config, shards, share=share, say=lambda _: None)


def _build_by(builder: Any) -> Callable[..., int]:
    def build(
        config: Config, shards: Shards, *, share: WorkerShare, say: Callable[[str], None]
    ) -> int:
        del shards, say  # it opens them itself; nobody reads a trial's console
        asked = builder.build.remote(config_to_values(config), share)
        return int(fetched([asked])[0])

    return build_caches if builder is None else build


class Reporter:
    """Tells Tune the score of each epoch, and what to free should it end the trial.

    That of the last epoch is not told: who has trained to the end is judged, not stopped.
    """

    def __init__(self, config: Config) -> None:
        self._name = names.SCORES[config.tune.metric]
        self._epochs = config.train.epochs
        self._reservation = ""

    def __call__(self, event: Event) -> None:
        if event.kind == "reserved":
            self._reservation = event.text
        elif self._name in event.values:
            score, epoch = event.values[self._name], int(event.epoch + 1e-6)
            told = {SCORE: score, EPOCH: epoch, RESERVATION: self._reservation}
            if epoch < self._epochs:
                tune.report({**told, COST: math.nan})  # Tune insists on it; known at the end


def _story(error: Exception, trials_uri: str, number: int) -> str:
    """Say why a trial failed; what a run is advised to do, the sweep does not."""
    text = str(error).strip() or type(error).__name__
    if not type(error).__module__.startswith("pcd_ray"):
        text = f"{type(error).__name__}: {text}"
    if "same command" not in text:
        return text
    command = train_command(trials_uri, number)
    said = text.replace("the same command again", command).replace("the same command", command)
    return f"{said}; the sweep does not go on with this trial"
