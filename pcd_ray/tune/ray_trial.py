"""One trial: a whole training run in the sweep's folder, whose scores Tune hears as they come."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import tune

from pcd_ray import metric_names as names
from pcd_ray import storage
from pcd_ray.config import Config, TuneConfig, config_from_values
from pcd_ray.ray_events import Event
from pcd_ray.train.ray_launch import TrainResult, train
from pcd_ray.tune.ray_search import (
    EPOCH,
    FINISHED,
    NUMBER,
    RESERVATION,
    SCORE,
    VALUES,
    reason_file,
    trial_name,
)
from pcd_ray.tune.space import trial_config
from pcd_ray.tune.study import COST


def run_trial(
    parameters: dict[str, Any], *, base: dict[str, Any], trials_uri: str, places: Mapping[str, Any]
) -> None:
    """Train and judge one trial, or go on with it where it stopped.

    Args:
        parameters: its number and the values of the options that it varies.
        base: the sweep's configuration, as plain data.
        trials_uri: folder of the trials' runs.
        places: options that the sweep sets for all trials.
    """
    number = parameters[NUMBER]
    try:
        config = config_of_trial(config_from_values(base), parameters[VALUES], number, trials_uri)
        config = trial_config(config, places)
        result = train(config, listener=_Reporter(config.tune))
    except Exception as error:
        storage.write_text(reason_file(trials_uri, number), _story(error))
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


class _Reporter:
    """Tells Tune the score of each epoch, and what to free should it end the trial."""

    def __init__(self, options: TuneConfig) -> None:
        self._name = names.SCORES[options.metric]
        self._reservation = ""

    def __call__(self, event: Event) -> None:
        if event.kind == "reserved":
            self._reservation = event.text
        elif self._name in event.values:
            score, epoch = event.values[self._name], int(event.epoch + 1e-6)
            told = {SCORE: score, EPOCH: epoch, RESERVATION: self._reservation}
            tune.report({**told, COST: math.nan})  # Tune insists on it; known at the end


def _story(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return (
        text if type(error).__module__.startswith("pcd_ray") else f"{type(error).__name__}: {text}"
    )
