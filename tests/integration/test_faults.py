"""Workers, machines, drivers and heads that are lost in the middle of a run, on real clusters."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_cluster import FaultyCluster
from processes import train_workers, wait_for
from spot_metadata import serving
from tiny_run import BATCH, NUM_IMAGES, changed, prepare

from pcd_ray.checkpoint import Checkpoint, RunFolder, checkpoint_steps, find_checkpoint
from pcd_ray.config import Config, to_yaml
from pcd_ray.data.plan import EpochPlan, SeenAudit
from pcd_ray.data.shards import open_shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

EVENT_S = 300.0  # for one event: on a busy machine Ray's processes get little of it
NOTICE_S = 60.0  # clouds give half a minute or more
EPOCHS = 8
STEPS = EPOCHS * NUM_IMAGES // BATCH


class Command:
    """``pcd-ray train`` as a driver of its own on a cluster."""

    def __init__(self, config: Config, folder: Path, cluster: FaultyCluster) -> None:
        self.run = RunFolder.of(config)
        file = folder / f"{config.run.name}.yaml"
        file.write_text(to_yaml(config))
        self._started = time.monotonic()
        self.begun_s = 0.0
        """Seconds from the command until training went on."""
        self._log = folder / f"{config.run.name}_{time.monotonic_ns()}.log"
        environment = os.environ | {
            "RAY_ADDRESS": cluster.address,
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pcd_ray", "train", str(file), "--json"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
                env=environment,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for_checkpoint(self, beyond: int) -> int:
        """Wait until a step beyond this one is stored; return it."""
        self.wait_until(lambda: any(step > beyond for step in checkpoint_steps(self.run)))
        return checkpoint_steps(self.run)[-1]

    def wait_for_resumption(self) -> int:
        """Wait until training goes on from a stored step; return it."""
        self.wait_for_words("resumed at step")
        self.begun_s = time.monotonic() - self._started
        return self.resumed_at()[0]

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.said)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, or the command has ended without it."""
        try:
            wait_for(lambda: happened() or self.process.poll() is not None, timeout_s=EVENT_S)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it said:\n{self.said}") from None
        assert self.process.poll() is None, self.said

    def finish(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=2 * EVENT_S)
        assert self.process.returncode == 0, self.said
        summary: dict[str, Any] = json.loads(out)
        return summary

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def resumed_at(self) -> list[int]:
        return [int(step) for step in re.findall(r"resumed at step (\d+) of ", self.said)]

    def recovery_s(self) -> list[int]:
        return [int(s) for s in re.findall(r"training again (\d+) s after the loss", self.said)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    del ray_session
    return changed(
        prepare(tmp_path_factory.mktemp("faults")),
        data={"cpus_per_task": 0.4},
        train={"epochs": EPOCHS, "cpus_per_worker": 0.6, "start_timeout_s": 21.0},
        eval={"every_epochs": 0, "knn_train": "", "knn_test": "", "pictures": False},
    )


class Stage:
    """Clusters and commands of a test; none of them outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clusters: list[FaultyCluster] = []
        self._commands: list[Command] = []

    def new_cluster(self) -> FaultyCluster:
        """Return a head and two machines of one CPU each."""
        cluster = FaultyCluster(self._folder / str(len(self._clusters)))
        self._clusters.append(cluster)
        cluster.tell("add")
        cluster.tell("add")
        return cluster

    def train(self, config: Config, cluster: FaultyCluster) -> Command:
        """Start ``pcd-ray train``."""
        self._commands.append(Command(config, self._folder, cluster))
        return self._commands[-1]

    def clear(self) -> None:
        for command in self._commands:
            command.kill()
        for cluster in self._clusters:
            cluster.end()


@pytest.fixture
def stage() -> Iterator[Stage]:
    # a short name: sockets have it in theirs
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as name:
        built = Stage(Path(name))
        yield built
        built.clear()


def assert_each_image_once(stored: Checkpoint, epochs: int) -> None:
    plan = EpochPlan(open_shards(stored.config.data.shards).plan_sources, stored.config.run.seed)
    audit = SeenAudit(stored.state["audit"])
    assert [audit.verdict(plan, epoch) for epoch in range(epochs)] == [None] * epochs


def assert_same_end(one: Checkpoint, other: Checkpoint) -> None:
    """Both runs have come to the same numbers, to the bit."""
    assert one.state["step"] == other.state["step"] == STEPS
    for part in ("student", "average"):
        for name, value in one.state[part].items():
            assert torch.equal(value, other.state[part][name]), name
    (queue,), (expected,) = one.state["queues"], other.state["queues"]
    assert torch.equal(queue["negatives"], expected["negatives"])
    assert queue["num_pushed"] == expected["num_pushed"] == STEPS * BATCH
    assert one.state["audit"] == other.state["audit"]


def logged_steps(run: RunFolder) -> list[int]:
    lines = Path(run.file("metrics.jsonl")).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def lose_a_worker(command: Command, cluster: FaultyCluster) -> int:
    """Kill a worker between steps or in one; return the step that is stored when all goes on."""
    command.wait_for_checkpoint(0)
    os.kill(train_workers(cluster.pid)[-1], signal.SIGKILL)
    resumed = command.wait_for_resumption()
    assert "warning: lost: " in command.said
    return command.wait_for_checkpoint(resumed)


def lose_a_machine(command: Command, cluster: FaultyCluster) -> None:
    """Take a machine away, bring another, and wait until all goes on."""
    command.wait_for_checkpoint(command.resumed_at()[0])
    cluster.tell("remove")
    cluster.tell("add")
    command.wait_until(lambda: len(command.resumed_at()) == 2)
    command.wait_for_checkpoint(command.resumed_at()[1])
    assert checkpoint_steps(command.run)[-1] < STEPS


def test_a_run_that_loses_worker_driver_machine_and_head_ends_as_if_it_had_not(
    prepared: Config, stage: Stage
) -> None:
    cluster = stage.new_cluster()
    undisturbed = stage.train(prepared, cluster)
    undisturbed.finish()
    config = changed(prepared, run={"name": "disturbed"})
    first = stage.train(config, cluster)
    step = lose_a_worker(first, cluster)
    first.kill()
    second = stage.train(config, cluster)
    assert second.wait_for_resumption() >= step
    lose_a_machine(second, cluster)
    cluster.end()  # the head and all that ran on it
    second.kill()
    third = stage.train(config, stage.new_cluster())
    assert 0 < third.wait_for_resumption() < STEPS
    assert third.finish()["step"] == STEPS
    stored = find_checkpoint(third.run.uri)
    assert_same_end(find_checkpoint(undisturbed.run.uri), stored)
    assert_each_image_once(stored, EPOCHS)
    logged = logged_steps(third.run)  # lines of the last moments of a killed driver are lost
    assert logged == sorted(set(logged) & set(logged_steps(undisturbed.run)))
    assert logged[-1] == STEPS
    print(
        f"seconds until training went on: worker {first.recovery_s()}, "
        f"driver {second.begun_s:.0f}, machine {second.recovery_s()}, head {third.begun_s:.0f}"
    )


KEPT = "of 1 to 2 workers: the global batch of 4 is kept as"


def give_notice(cluster: FaultyCluster) -> None:
    """Have AWS's metadata service say that a machine goes, and what runs there tell Ray."""
    watcher = [sys.executable, "-m", "pcd_ray.ray_spot_notice", "--address", cluster.address]
    with serving() as metadata:
        metadata.announce(datetime.now(UTC) + timedelta(seconds=NOTICE_S))  # Ray is told half of it
        watcher += ["--node-id", cluster.oldest(), "--metadata-url", metadata.url]
        subprocess.run(watcher, check=True, timeout=EVENT_S)


def take_a_machine_away_with_notice(command: Command, cluster: FaultyCluster) -> float:
    """Return the seconds from its end until training goes on with the other one."""
    before = train_workers(cluster.pid)
    give_notice(cluster)
    command.wait_for_words("will be taken away in ")
    (step,) = re.findall(r"will be taken away in \d+ s; step (\d+) is stored", command.said)
    command.wait_until(lambda: not set(before) & set(train_workers(cluster.pid)))
    cluster.tell("remove")
    gone = time.monotonic()
    command.wait_for_words(f"1 {KEPT} 4 images each in 2 passes;")
    assert command.wait_for_resumption() >= int(step)
    return time.monotonic() - gone


def bring_a_machine(command: Command, cluster: FaultyCluster) -> float:
    """Return the seconds until training goes on with it too."""
    cluster.tell("add")
    added = time.monotonic()
    command.wait_until(lambda: command.said.count(f"2 {KEPT} 2 images each in 1 pass;") == 2)
    return time.monotonic() - added


def test_an_elastic_run_heeds_a_notice_shrinks_and_grows_and_reads_each_image_once(
    prepared: Config, stage: Stage
) -> None:
    # no failure is allowed, so that what is lost must be counted as taken away
    train = {"epochs": 200, "num_workers": [1, 2], "max_failures": 0, "resize_check_s": 5.0}
    data = {"images_per_task": 64}  # few tasks are begun sooner
    config = changed(prepared, run={"name": "elastic"}, train=train, data=data)
    cluster = stage.new_cluster()
    command = stage.train(config, cluster)
    command.wait_for_checkpoint(0)
    shrunk_s = take_a_machine_away_with_notice(command, cluster)
    command.wait_for_checkpoint(command.resumed_at()[0])
    grown_s = bring_a_machine(command, cluster)
    read = command.said.count(" read: ")
    command.wait_until(lambda: command.said.count(" read: ") > read + 1)
    command.kill()
    stored = find_checkpoint(command.run.uri)
    epochs = stored.state["step"] * BATCH // NUM_IMAGES
    assert epochs >= 2
    assert_each_image_once(stored, epochs)
    print(f"seconds until training went on: one machine less {shrunk_s:.0f}, more {grown_s:.0f}")
