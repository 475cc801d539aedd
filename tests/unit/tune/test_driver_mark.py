"""Two drivers never run one sweep, and a killed one is followed at once on its own machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from tiny import tiny_config

from pcd_ray.errors import ConfigError
from pcd_ray.tune import ray_sweep
from pcd_ray.tune.driver_mark import REFRESH_S, STALE_S, DriverMark, Process
from pcd_ray.tune.ray_progress import Progress
from pcd_ray.tune.study import OpenStudy

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(time=clock, monotonic=clock)
    monkeypatch.setattr("pcd_ray.tune.driver_mark.time", fake)
    return clock


@pytest.fixture
def opened() -> OpenStudy:
    return OpenStudy(optuna.create_study(study_name="s"), "sqlite:///study.db")


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def elsewhere() -> Process:
    return replace(Process.of(os.getpid()), host="elsewhere")


def test_a_driver_of_this_machine_is_refused_while_it_lives_and_followed_once_it_is_killed(
    opened: OpenStudy, other: "subprocess.Popen[bytes]", clock: Clock
) -> None:
    DriverMark(opened, Process.of(other.pid)).take()
    clock.now += 2 * STALE_S  # however long ago it was heard of
    with pytest.raises(ConfigError, match=f"process {other.pid} on this machine; wait"):
        DriverMark(opened).take()
    clock.now -= 2 * STALE_S
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, though nobody has asked
    DriverMark(opened).take()


def test_a_later_process_of_the_same_id_is_another(opened: OpenStudy, clock: Clock) -> None:
    del clock
    DriverMark(opened, replace(Process.of(os.getpid()), began="long ago")).take()
    DriverMark(opened).take()
    assert "long ago" not in opened.study.user_attrs["driver"]


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_a_driver_that_cannot_be_seen_is_known_by_a_mark_that_is_refreshed(
    opened: OpenStudy, clock: Clock, change: dict[str, Any]
) -> None:
    there = DriverMark(opened, replace(Process.of(os.getpid()), **change))
    there.take()
    clock.now += STALE_S - 5
    with pytest.raises(ConfigError, match="give the same command again in 6 s"):
        DriverMark(opened).take()
    there.refresh()
    clock.now += STALE_S - 5
    with pytest.raises(ConfigError, match="another driver runs the sweep s, process"):
        DriverMark(opened).take()
    clock.now += 6
    DriverMark(opened).take()
    there.release()  # not its own any more
    with pytest.raises(ConfigError, match="another driver"):
        DriverMark(opened, elsewhere()).take()


def test_a_mark_is_written_now_and_then_alone_and_taken_away_at_the_end(
    opened: OpenStudy, clock: Clock
) -> None:
    mark = DriverMark(opened)
    mark.take()
    before = opened.study.user_attrs
    clock.now += REFRESH_S - 1
    mark.refresh()
    assert opened.study.user_attrs == before
    clock.now += 1
    mark.refresh()
    assert opened.study.user_attrs != before
    mark.release()
    DriverMark(opened, elsewhere()).take()


def test_a_storage_that_fails_for_a_moment_ends_no_sweep(
    opened: OpenStudy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = DriverMark(opened)
    mark.take()
    taken = opened.study.user_attrs["driver"]
    clock.now += REFRESH_S

    def fail(*_: Any) -> None:
        raise OSError("database is locked")

    monkeypatch.setattr(opened.study, "set_user_attr", fail)
    progress = Progress(tiny_config(), opened, mark, lambda: None)
    progress.on_step_end(0, [])
    mark.release()
    assert opened.study.user_attrs["driver"] == taken
    monkeypatch.undo()
    clock.now += REFRESH_S
    progress.on_step_end(0, [])
    assert opened.study.user_attrs["driver"] != taken


def test_a_step_of_the_sweep_refreshes_the_mark(opened: OpenStudy, clock: Clock) -> None:
    mark = DriverMark(opened, elsewhere())
    mark.take()
    progress = Progress(tiny_config(), opened, mark, lambda: None)
    clock.now += STALE_S
    progress.on_step_end(0, [])
    clock.now += 1
    with pytest.raises(ConfigError):
        DriverMark(opened).take()


def test_a_sweep_runs_with_its_mark_and_refuses_to_beside_another(
    tmp_path: Path, other: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[OpenStudy] = []

    def run(*given: Any) -> None:
        opened = given[3]
        ran.append(opened)
        with pytest.raises(ConfigError, match="another driver"):
            DriverMark(opened, Process.of(other.pid)).take()

    monkeypatch.setattr(ray_sweep, "_run", run)
    monkeypatch.setattr(ray_sweep, "_checked", lambda _: None)  # of a cluster that is not there
    monkeypatch.setattr(ray_sweep, "open_shards", lambda _: SimpleNamespace(content_hash="a"))
    monkeypatch.setattr(ray_sweep, "check_outlives_job", lambda *_: None)
    config = tiny_config(
        run={"root": str(tmp_path), "name": "s"},
        data={"shards": str(tmp_path)},
        tune={"space": SPACE, "scheduler": "none"},
        eval={"knn_train": "labelled", "knn_test": "labelled"},
    )
    ray_sweep.sweep(config)
    DriverMark(ran[0], Process.of(other.pid)).take()
    with pytest.raises(ConfigError, match=f"process {other.pid} on this machine"):
        ray_sweep.sweep(config)
    assert len(ran) == 1
