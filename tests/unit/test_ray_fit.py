"""How a run's end is explained when its workers fail."""

import json
import signal
import sys
import threading
from pathlib import Path

import pytest
from stored_run import store_run

from pcd_ray.errors import ShardError, TrainingError
from pcd_ray.ray_fit import FAILURE_FILE, raise_failure, stopped_in_order


def test_a_run_that_fails_again_and_again_says_where_it_stands(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10, 20)
    cause = RuntimeError("Training failed:\nworker 1 died\n")
    message = r"failed 3 times \(train\.max_failures=2\): worker 1 died; .* goes on from step 20"
    with pytest.raises(TrainingError, match=message) as raised:
        raise_failure(folder, 2, cause)
    assert raised.value.__cause__ is cause


def test_a_workers_own_words_are_passed_on_as_its_kind_of_error(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    Path(folder.file(FAILURE_FILE)).write_text(
        json.dumps({"kind": "ShardError", "message": "cat.jpg is damaged; pack again"})
    )
    with pytest.raises(ShardError, match=r"cat\.jpg is damaged; pack again"):
        raise_failure(folder, 0, None)


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
