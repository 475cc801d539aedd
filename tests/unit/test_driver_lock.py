"""One driver at a time in a folder or study; a killed one is followed at once on its machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from s3_server import S3Server, s3_server
from tiny import tiny_config

from pcd_ray import storage
from pcd_ray.driver_lock import (
    REFRESH_S,
    STALE_S,
    DriverLock,
    FolderMarks,
    Marks,
    Process,
    driving,
)
from pcd_ray.errors import InUseError
from pcd_ray.train.ray_launch import train
from pcd_ray.tune import ray_sweep
from pcd_ray.tune.study import OpenStudy, StudyMarks

BUCKET = "runs"


class Clock:
    """A clock that a test sets, and that sleeping moves."""

    def __init__(self) -> None:
        self.now = 1e9
        self.events: list[tuple[float, Callable[[], object]]] = []
        """What happens when: each once, as somebody sleeps until then."""

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [each for each in self.events if each[0] <= self.now]:
            self.events.remove(event)
            event[1]()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as served:
        served.client().create_bucket(Bucket=BUCKET)
        yield served


@pytest.fixture(params=["folder", "s3", "study"])
def marks(request: pytest.FixtureRequest, tmp_path: Path) -> Marks:
    if request.param == "study":
        return StudyMarks(OpenStudy(optuna.create_study(study_name="s"), "sqlite:///study.db"))
    if request.param == "folder":
        return FolderMarks(str(tmp_path / "runs" / "m"), "run.name")
    server: S3Server = request.getfixturevalue("server")
    return FolderMarks(f"s3://{BUCKET}/{uuid.uuid4().hex}{server.query}", "run.name")


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def refuse_to_wait(line: str) -> None:
    pytest.fail(f"waits: {line}")


def elsewhere(**change: Any) -> Process:
    return replace(Process.of(os.getpid()), **(change or {"host": "elsewhere"}))


def lock_of(marks: Marks, clock: Clock, process: Process | None = None) -> DriverLock:
    return DriverLock(marks, process, clock=clock, sleep=clock.sleep)


def test_a_driver_of_this_machine_is_refused_while_it_lives_and_followed_once_it_is_killed(
    marks: Marks, other: "subprocess.Popen[bytes]", clock: Clock
) -> None:
    lock_of(marks, clock, Process.of(other.pid)).take(refuse_to_wait)
    since = r"2001-09-09 01:46:40 UTC"
    clock.now += 2 * STALE_S  # however long ago it was heard of
    with pytest.raises(
        InUseError,
        match=rf"in use: process {other.pid} on .* since {since}; wait .* another run.name",
    ):
        lock_of(marks, clock).take(refuse_to_wait)
    assert len(marks.read()) == 1
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, though nobody has asked
    lock_of(marks, clock).take(refuse_to_wait)
    assert len(marks.read()) == 1


def test_a_later_process_of_the_same_id_is_another(marks: Marks, clock: Clock) -> None:
    lock_of(marks, clock, elsewhere(began="long ago")).take(refuse_to_wait)
    lock_of(marks, clock).take(refuse_to_wait)
    assert "long ago" not in "".join(marks.read().values())


@pytest.mark.parametrize(
    ("change", "age", "wait"),
    [
        ({"host": "elsewhere"}, 100, STALE_S - 100),
        ({"machine": "container"}, 100, STALE_S - 100),
        ({"host": "elsewhere"}, 9000, 3 * REFRESH_S),
        ({"host": "elsewhere"}, -500, STALE_S),  # its clock is ahead
    ],
)
def test_a_driver_that_cannot_be_seen_is_waited_for_until_its_mark_is_stale(
    marks: Marks, clock: Clock, change: dict[str, Any], age: float, wait: float
) -> None:
    """A retried job, whose first machine died: it starts without anybody's doing."""
    lines: list[str] = []
    lock_of(marks, clock, elsewhere(**change)).take(refuse_to_wait)
    clock.now += age
    began = clock.now
    lock_of(marks, clock).take(lines.append)
    assert wait < clock.now - began < wait + 3
    (line,) = lines
    assert f"was working here {max(age, 0)} s ago; waiting up to {wait:.0f} s" in line
    assert len(marks.read()) == 1


@pytest.mark.parametrize("behind", [0, 900])
def test_a_driver_that_cannot_be_seen_but_refreshes_its_mark_is_left_alone(
    marks: Marks, clock: Clock, behind: float
) -> None:
    """Also if its clock is behind, so that its marks look old."""
    there = DriverLock(marks, elsewhere(), clock=lambda: clock.now - behind)
    there.take(refuse_to_wait)
    clock.events.append((clock.now + REFRESH_S, there.refresh))
    began = clock.now
    with pytest.raises(InUseError, match="on elsewhere has been working here since"):
        lock_of(marks, clock).take(lambda _: None)
    assert clock.now - began < REFRESH_S + 3
    there.refresh()
    assert not there.is_lost


def test_a_driver_that_ends_meanwhile_is_followed(marks: Marks, clock: Clock) -> None:
    there = lock_of(marks, clock, elsewhere())
    there.take(refuse_to_wait)
    clock.events.append((clock.now + 1.0, there.release))
    began = clock.now
    lock_of(marks, clock).take(lambda _: None)
    assert clock.now - began < 3


class Together:
    """Marks of a driver that waits for another one before it looks the first time."""

    def __init__(self, marks: Marks, both_wrote: threading.Barrier) -> None:
        self.name, self.option = marks.name, marks.option
        self.read, self.clear = marks.read, marks.clear
        self._marks, self._both_wrote, self._waits = marks, both_wrote, True

    def write(self, token: str, text: str) -> None:
        self._marks.write(token, text)
        if self._waits:
            self._waits = False
            self._both_wrote.wait()


def test_of_two_that_begin_at_the_same_moment_one_goes_on(
    marks: Marks, other: "subprocess.Popen[bytes]"
) -> None:
    """Each has written its mark before either looks; what follows is up to them."""
    both_wrote = threading.Barrier(2)
    outcomes: list[str] = []

    def begin(process: Process) -> None:
        try:
            DriverLock(Together(marks, both_wrote), process).take(lambda _: None)
            outcomes.append("drives")
        except InUseError:
            outcomes.append("refused")

    processes = [Process.of(os.getpid()), Process.of(other.pid)]
    threads = [threading.Thread(target=begin, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["drives", "refused"]
    assert len(marks.read()) == 1


def test_a_driver_that_was_taken_for_dead_finds_out(marks: Marks, clock: Clock) -> None:
    slept = lock_of(marks, clock, elsewhere())
    slept.take(refuse_to_wait)
    lock_of(marks, clock).take(lambda _: None)
    slept.refresh()
    assert slept.is_lost
    slept.release()  # nothing of its own is left
    assert len(marks.read()) == 1


def test_storage_that_fails_for_a_moment_ends_no_run(tmp_path: Path, clock: Clock) -> None:
    root = tmp_path / "m"
    lock = lock_of(FolderMarks(str(root), "run.name"), clock)
    lock.take(refuse_to_wait)
    (before,) = [path.read_text() for path in root.iterdir()]
    root.rename(tmp_path / "away")
    root.write_text("a file where the folder was")
    with pytest.raises(storage.StorageError):
        lock.refresh()
    assert not lock.is_lost
    root.unlink()
    (tmp_path / "away").rename(root)
    clock.now += REFRESH_S
    lock.refresh()
    assert [path.read_text() for path in root.iterdir()] != [before]


def test_what_is_no_mark_locks_nothing(tmp_path: Path, clock: Clock) -> None:
    for number, text in enumerate(("", "[1]", "{}", '{"process": {}}')):
        (tmp_path / f"driver-{number:012d}.json").write_text(text)
    (tmp_path / "driver-notes.json").write_text("mine")
    lock = lock_of(FolderMarks(str(tmp_path), "run.name"), clock)
    lock.take(refuse_to_wait)
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["driver-notes.json"]


def test_the_lock_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "m"
    with driving(FolderMarks(str(folder), "run.name")):
        assert len([*folder.iterdir()]) == 1
        with driving(FolderMarks(str(folder), "run.name")):  # the demo's run, in the demo
            assert len([*folder.iterdir()]) == 2
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), driving(FolderMarks(str(folder), "run.name")):
        raise ZeroDivisionError
    assert [*folder.iterdir()] == []


DRIVER = """
import signal, sys, time
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray import driver_lock
driver_lock.REFRESH_S = float(sys.argv[2])
if sys.argv[3] == "foreground":
    signal.signal(signal.SIGINT, signal.default_int_handler)
else:  # as a job of a shell
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    with driving(FolderMarks(sys.argv[1], "run.name")):
        print("drives", flush=True)
        while True:
            time.sleep(60)
except BaseException as error:
    print(type(error).__name__, error, flush=True)
    raise
"""


@pytest.fixture(params=["foreground"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that drives a folder until it is ended."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "m"), "0.05", request.param]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "drives\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_stopped_releases_its_lock(
    driver: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals
) -> None:
    driver.send_signal(number)
    driver.wait(timeout=60)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("driver", ["foreground", "background"], indirect=True)
def test_a_driver_that_another_took_over_from_is_stopped(
    driver: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    """As a machine that wakes up after another has found its mark stale."""
    (mark,) = (tmp_path / "m").iterdir()
    mark.unlink()
    assert driver.stdout is not None
    said = driver.stdout.readline()
    assert said.startswith(f"InUseError {tmp_path / 'm'}: the mark of this driver is gone")
    assert driver.wait(timeout=60) != 0


def test_a_run_is_refused_beside_its_driver_before_anything_is_touched(
    driver: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    with pytest.raises(InUseError, match=f"m is in use: process {driver.pid} on"):
        train(tiny_config(run={"root": str(tmp_path), "name": "m"}))
    (mark,) = (tmp_path / "m").iterdir()
    assert json.loads(mark.read_text())["process"]["pid"] == driver.pid


def test_a_sweep_is_refused_beside_its_driver(
    tmp_path: Path, other: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    ran: list[OpenStudy] = []

    def run(*given: Any) -> None:
        ran.append(given[3])
        with pytest.raises(InUseError):
            lock_of(StudyMarks(ran[0]), clock, Process.of(other.pid)).take(refuse_to_wait)

    monkeypatch.setattr(ray_sweep, "_run", run)
    monkeypatch.setattr(ray_sweep, "_checked", lambda _: None)  # of a cluster that is not there
    monkeypatch.setattr(ray_sweep, "open_shards", lambda _: SimpleNamespace(content_hash="a"))
    monkeypatch.setattr(ray_sweep, "check_outlives_job", lambda *_: None)
    config = tiny_config(
        run={"root": str(tmp_path), "name": "s"},
        data={"shards": str(tmp_path)},
        tune={"space": {"loss.temperature": {"log": [0.03, 0.5]}}, "scheduler": "none"},
        eval={"knn_train": "labelled", "knn_test": "labelled"},
    )
    ray_sweep.sweep(config)
    lock_of(StudyMarks(ran[0]), clock, Process.of(other.pid)).take(refuse_to_wait)
    with pytest.raises(InUseError, match=f"the sweep s in .* process {other.pid} on"):
        ray_sweep.sweep(config)
    assert len(ran) == 1
