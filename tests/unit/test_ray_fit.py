"""How a run's end is explained when its workers fail."""

import json
import signal
import sys
import threading
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from stored_run import store_run

from pcd_ray.config import TrainConfig
from pcd_ray.errors import ShardError, TrainingError
from pcd_ray.ray_fit import (
    FAILURE_FILE,
    _run_config,
    loss_line,
    raise_failure,
    stopped_in_order,
)

SETTINGS = TrainConfig(max_failures=2, max_preemptions=4)


def death(*, preempted: bool) -> Exception:
    """A worker's death as Ray Train tells it."""
    died = ray.exceptions.RayActorError(error_msg="The actor died.", preempted=preempted)
    return WorkerHealthCheckFailedError("A worker health check failed.", died)


def test_a_run_that_fails_again_and_again_says_where_it_stands(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10, 20)
    cause = RuntimeError("Training failed:\nworker 1 died\n")
    message = r"failed 3 times \(train\.max_failures=2\): worker 1 died; .* goes on from step 20"
    with pytest.raises(TrainingError, match=message) as raised:
        raise_failure(folder, SETTINGS, cause)
    assert raised.value.__cause__ is cause


def test_a_workers_own_words_are_passed_on_as_its_kind_of_error(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    Path(folder.file(FAILURE_FILE)).write_text(
        json.dumps({"kind": "ShardError", "message": "cat.jpg is damaged; pack again"})
    )
    with pytest.raises(ShardError, match=r"cat\.jpg is damaged; pack again"):
        raise_failure(folder, SETTINGS, None)


@pytest.mark.parametrize("told", [True, False])
def test_machines_that_were_taken_away_too_often_are_not_called_failures(
    told: bool, tmp_path: Path
) -> None:
    folder, _ = store_run(tmp_path, 10)
    died = ray.train.WorkerGroupError("died", {0: ValueError("reset"), 1: death(preempted=True)})
    notice = ray.train.PreemptionError(ray.train.PreemptionInfo(None, {"a": [1]}))
    message = r"machines were taken away 5 times \(train\.max_preemptions=4\): .* from step 10"
    with pytest.raises(TrainingError, match=message):
        raise_failure(folder, SETTINGS, notice if told else died)


def test_a_worker_that_dies_is_a_failure_and_its_manager_is_neither(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    died = ray.train.WorkerGroupError("worker 1 died", {1: death(preempted=False)})
    with pytest.raises(TrainingError, match=r"training failed 3 times \(train\.max_failures=2\)"):
        raise_failure(folder, SETTINGS, died)
    with pytest.raises(TrainingError, match="the process that looks after the workers died: "):
        raise_failure(folder, SETTINGS, ray.exceptions.ActorDiedError())


def test_a_loss_names_who_died_and_not_who_missed_them() -> None:
    errors = {0: ValueError("connection reset"), 2: death(preempted=False)}
    assert loss_line(errors) == "lost: worker 2 died"
    taken = {**errors, 1: death(preempted=True)}
    assert loss_line(taken) == "lost: worker 1, 2 was taken away with its machine"
    broken = RuntimeError("Read error [127.0.0.1]:10983: Connection reset by peer.")
    assert loss_line({1: broken}) == "lost: a worker that worker 1 was connected to"
    assert loss_line({0: ValueError("no\nmemory")}) == "worker 0 failed: memory"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_an_interrupt_whatever_ray_makes_of_it_and_ours_again_afterwards(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupted() -> None:
        with stopped_in_order():
            signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray Train does
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with stopped_in_order():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before[0]


def test_a_thread_that_trains_has_no_say_in_signals() -> None:
    seen = []

    def body() -> None:
        with stopped_in_order():
            seen.append("ran")

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == ["ran"]


def test_on_a_notice_no_report_goes_on_without_a_worker_that_is_still_there(tmp_path: Path) -> None:
    """Relaxed, a worker that reports last would wait for ever, and the others for its gradients."""
    folder, _ = store_run(tmp_path, 10)
    failures = _run_config(folder, SETTINGS, "mailbox").failure_config
    assert not failures.relax_collectives_on_preemption
    assert (failures.max_failures, failures.max_preemption_failures) == (2, 4)
