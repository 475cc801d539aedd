"""Sweeps on real Ray: trials that finish, fail, are stopped, and go on after a SIGKILL."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from processes import wait_for
from studies import opened_study
from tiny_run import changed, prepare

from pcd_ray.checkpoint import RunFolder, checkpoint_steps
from pcd_ray.config import Config, config_from_file, to_yaml
from pcd_ray.data.shards import open_shards
from pcd_ray.errors import ClusterError, ConfigError
from pcd_ray.tune.ray_sweep import SweepResult, sweep
from pcd_ray.tune.study import HISTORY, history_of

EVENT_S = 400  # a busy machine starts Ray slowly
SPACE = {"loss.temperature": {"uniform": [0.1, 0.4]}}
FUNCTION = """
def space(trial):
    trial.suggest_float("loss.temperature", 0.1, 0.4)
    if trial.number == 0:
        return {"optim.base_lr": 1e30}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    del ray_session
    config = prepare(tmp_path_factory.mktemp("tune"))
    workers = {"num_workers": 1, "checkpoint_every_steps": 0, "log_every_steps": 4}
    return changed(config, train=workers, eval={"knn_test": config.eval.knn_train})


def searching(config: Config, name: str, **sections: dict[str, Any]) -> Config:
    tune = {"space": SPACE, "scheduler": "none"} | sections.pop("tune", {})
    return changed(config, run={"name": name}, tune=tune, **sections)


def swept(config: Config) -> tuple[SweepResult, str]:
    with contextlib.redirect_stderr(io.StringIO()) as console:
        result = sweep(config)
    return result, console.getvalue()


@dataclass(frozen=True, slots=True)
class Sitting:
    """A sweep of two trials, the first of which fails, and what was said."""

    config: Config
    result: SweepResult
    console: str

    @property
    def trials(self) -> Path:
        return Path(self.result.path) / "trials"


@pytest.fixture(scope="module")
def first(prepared: Config, tmp_path_factory: pytest.TempPathFactory) -> Sitting:
    function = tmp_path_factory.mktemp("function") / "space.py"
    function.write_text(FUNCTION)
    tune = {"space": {}, "space_function": f"{function}:space", "trials": 2, "cost": "training_s"}
    config = searching(prepared, "first", tune=tune, train={"epochs": 6})
    return Sitting(config, *swept(config))


def test_a_sweep_leaves_its_best_run_as_a_file_and_a_failing_trial_stops_nothing(
    first: Sitting,
) -> None:
    result, folder = first.result, Path(first.result.path)
    assert [trial.state for trial in result.trials] == ["failed", "finished"]
    assert "not finite" in result.trials[0].reason
    assert "trial 0 failed: the loss is not finite" in first.console
    own = {"loss.temperature": first.config.loss.temperature}
    assert result.trials[0].values == own | {"optim.base_lr": 1e30}
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["failed", "finished"]
    best = config_from_file(result.best_config)
    assert result.best["trial"] == 1
    summary = json.loads((first.trials / "trial_0001/summary.json").read_text())
    assert summary["knn_top1"]["student"] == pytest.approx(result.best["score"])
    stored = config_from_file(str(first.trials / "trial_0001/config.yaml"))
    assert best.loss == stored.loss
    assert len(list((folder / "references").glob("knn_*.json"))) == 2  # teacher and untrained
    page = (folder / "report.html").read_text()
    assert 'href="trials/trial_0001/report.html"' in page
    assert not (folder / "ray_tune").exists()
    assert result.trade_offs == [1]


@pytest.mark.slow
def test_a_trial_that_is_stopped_early_frees_what_it_reserved(
    prepared: Config, tmp_path: Path
) -> None:
    # two real trials, each of which reserves more than half of the machine
    config = searching(
        prepared,
        "stopped",
        train={"epochs": 40, "cpus_per_worker": 1.2},
        tune={"trials": 8, "scheduler": "asha", "own_values_first": False},
    )
    opened = opened_study(config, data_sha256=open_shards(config.data.shards).content_hash)
    for number in range(6):  # better than any real trial can be at the first rung
        opened.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=150.0 + number,
                params={"loss.temperature": 0.11 + number / 100},
                distributions={"loss.temperature": FloatDistribution(0.1, 0.4)},
                user_attrs={HISTORY: [[1, 150.0 + number]]},
            )
        )
    driver = start(config, tmp_path)
    try:
        _, said = driver.communicate(timeout=EVENT_S)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    trials = opened.study.trials[6:]
    assert [trial.state for trial in trials] == [TrialState.PRUNED] * 2, said
    assert [set(history_of(trial)) for trial in trials] == [{1}] * 2
    assert "judged" not in said


def start(config: Config, folder: Path) -> "subprocess.Popen[str]":
    """Start ``pcd-ray tune`` as a user does, with a Ray of its own."""
    path = folder / "sweep.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "pcd_ray", "tune", str(path)]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_driver_that_is_killed_repeats_no_trial_and_loses_no_checkpoint(
    first: Sitting, tmp_path: Path
) -> None:
    config = changed(first.config, tune={"trials": 3})
    third = RunFolder(str(first.trials / "trial_0002"))
    driver = start(config, tmp_path)
    try:
        measured = Path(third.file("metrics.jsonl"))
        wait_for(lambda: bool(checkpoint_steps(third)) and measured.exists(), timeout_s=EVENT_S)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    study = optuna.load_study(study_name="first", storage=f"sqlite:///{first.result.path}/study.db")
    over = [TrialState.FAIL, TrialState.COMPLETE]
    assert [trial.state for trial in study.trials] == [*over, TrialState.RUNNING]
    step, values = checkpoint_steps(third)[-1], study.trials[2].params
    lines = [x for x in measured.read_text().splitlines() if json.loads(x)["step"] <= step]
    assert lines
    before = written(first.trials / "trial_0000") | written(first.trials / "trial_0001")

    again = start(config, tmp_path)
    _, said = again.communicate(timeout=EVENT_S)
    assert again.returncode == 0, said
    assert written(first.trials / "trial_0000") | written(first.trials / "trial_0001") == before
    assert [trial.state for trial in study.trials] == [*over, TrialState.COMPLETE]
    assert study.trials[2].params == values
    # with the timings of the killed sitting: these steps were not done again
    assert measured.read_text().splitlines()[: len(lines)] == lines
    assert "2 of 3 trials are over, 1 to go" in said


def written(folder: Path) -> dict[Path, int]:
    """Return when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        (
            {"eval": {"knn_train": "", "knn_test": "", "every_epochs": 0}},
            ConfigError,
            "no trial would report it",
        ),
        ({"tune": {"metric": "segmentation_miou"}}, ConfigError, "eval.segmentation is empty"),
        (
            {"eval": {"every_epochs": 0}, "tune": {"scheduler": "asha"}},
            ConfigError,
            "eval.every_epochs=0; set it to 1",
        ),
        (
            {"tune": {"scheduler": "asha", "grace_epochs": 9}},
            ConfigError,
            "grace_epochs=9 is above train.epochs=2",
        ),
        ({"tune": {"max_concurrent": 5}}, ClusterError, "max_concurrent=5.*the cluster has 2"),
        ({"train": {"num_workers": 4}}, ClusterError, "train.num_workers=4"),
        ({"teacher": {"weights": "absent.safetensors"}}, Exception, "absent.safetensors"),
    ],
)
def test_what_no_trial_could_run_with_is_refused_before_one_starts(
    prepared: Config, sections: dict[str, dict[str, Any]], kind: type[Exception], message: str
) -> None:
    config = searching(prepared, f"refused{abs(hash(message))}", **sections)
    with pytest.raises(kind, match=message):
        sweep(config)
    # nothing is stored that the corrected command would have to agree with
    assert list(Path(RunFolder.of(config).uri).glob("*")) == []
