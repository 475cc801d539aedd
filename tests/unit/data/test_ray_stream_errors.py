"""What a data task raises is raised again where its blocks are taken."""

from pathlib import Path

import pytest

from pcd_ray import errors, storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.data.ray_stream import Batch, _checked, _guarded
from pcd_ray.ray_fit import FAILURE_FILE, until_it_cannot


def taken(error: Exception) -> Batch:
    def work(_: Batch) -> Batch:
        raise error

    return _checked(_guarded(work, {}))


def test_a_store_that_is_away_from_a_task_does_not_end_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    with pytest.raises(storage.UnavailableError):
        until_it_cannot(folder, lambda: taken(storage.UnavailableError("away")))
    assert not storage.exists(folder.file(FAILURE_FILE))
    with pytest.raises(errors.ShardError):
        until_it_cannot(folder, lambda: taken(errors.ShardError("damaged")))
    assert storage.exists(folder.file(FAILURE_FILE))
