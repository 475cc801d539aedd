"""What a sweep says while it runs, and what must not end it."""

import io
from pathlib import Path
from types import SimpleNamespace

from studies import opened_study
from tiny import tiny_config

from pcd_ray.tune.ray_progress import Progress
from pcd_ray.tune.ray_search import EPOCH, NUMBER, SCORE, VALUES

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}}


def test_files_that_cannot_be_written_are_a_warning_while_trials_go_on(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "s"}, tune={"space": SPACE})
    opened = opened_study(config)
    opened.study.ask()
    console = io.StringIO()

    def write() -> None:
        raise ZeroDivisionError("no panels")

    progress = Progress(config, opened, write, console)
    trial = SimpleNamespace(config={NUMBER: 0, VALUES: {}}, last_result=None)
    progress.on_trial_complete(0, [], trial)
    progress.on_trial_error(0, [], trial)
    assert console.getvalue().count("could not be written (no panels); trials go on") == 2


def test_an_epoch_is_told_of_those_that_the_trial_has(tmp_path: Path) -> None:
    space = {"train.epochs": {"choice": [2, 7]}}
    config = tiny_config(run={"root": str(tmp_path), "name": "s"}, tune={"space": space})
    opened, console = opened_study(config), io.StringIO()
    progress = Progress(config, opened, lambda: None, console)
    for values in ({"train.epochs": 7}, {}):
        trial = SimpleNamespace(config={NUMBER: 0, VALUES: values})
        progress.on_trial_result(0, [], trial, {SCORE: 12.0, EPOCH: 1})
    assert console.getvalue().splitlines() == [
        "trial 0: epoch 1 of 7 knn_top1 12.0",
        f"trial 0: epoch 1 of {config.train.epochs} knn_top1 12.0",
    ]
