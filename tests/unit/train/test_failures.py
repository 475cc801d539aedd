"""How a run's end is explained when its workers fail."""

import json
from pathlib import Path

import pytest
from stored_run import store_run

from pcd_ray.checkpoint import latest_checkpoint
from pcd_ray.errors import ShardError, TrainingError
from pcd_ray.train.ray_launch import _raise_failure
from pcd_ray.train.ray_worker import FAILURE_FILE


def test_a_run_that_fails_again_and_again_says_where_it_stands(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10, 20, train={"max_failures": 2})
    stored = latest_checkpoint(folder)
    assert stored is not None
    cause = RuntimeError("Training failed:\nworker 1 died\n")
    message = r"failed 3 times \(train\.max_failures=2\): worker 1 died; .* goes on from step 20"
    with pytest.raises(TrainingError, match=message) as raised:
        _raise_failure(folder, stored.config, cause)
    assert raised.value.__cause__ is cause


def test_a_workers_own_words_are_passed_on_as_its_kind_of_error(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    Path(folder.file(FAILURE_FILE)).write_text(
        json.dumps({"kind": "ShardError", "message": "cat.jpg is damaged; pack again"})
    )
    with pytest.raises(ShardError, match=r"cat\.jpg is damaged; pack again"):
        _raise_failure(folder, None, None)  # type: ignore[arg-type]
