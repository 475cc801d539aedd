import contextlib
import os

import pytest
import ray

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import check_outlives_job, connect, explained_death
from pcd_ray.ray_connect import environment


def test_starting_ray_changes_no_variable_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str | None] = {}

    def fails(**_: object) -> None:
        seen["mode"] = os.environ.get("RAY_AUTH_MODE")
        raise ConnectionError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    before = dict(os.environ)
    with pytest.raises(ClusterError):
        connect()
    assert seen == {"mode": "disabled"}
    assert dict(os.environ) == before


@pytest.mark.parametrize("before", [None, "mine"])
def test_variables_are_set_for_a_call_and_put_back(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PCD_RAY_TEST", raising=False)
    if before:
        monkeypatch.setenv("PCD_RAY_TEST", before)
    with contextlib.suppress(ZeroDivisionError), environment({"PCD_RAY_TEST": "ours"}):
        assert os.environ["PCD_RAY_TEST"] == "ours"
        raise ZeroDivisionError
    assert os.environ.get("PCD_RAY_TEST") == before


def test_nothing_is_stored_where_a_job_has_its_working_folder() -> None:
    check_outlives_job("run.root", "s3://bucket/runs")
    inside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(ClusterError, match=r"run\.root=/tmp/ray/.* a place that all nodes share"):
        check_outlives_job("run.root", inside)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (MemoryError("cannot allocate 3 GiB"), "there was not enough memory (cannot allocate 3 Gi"),
        (ray.exceptions.OutOfDiskError(), "the disk that holds Ray's files is full: free space"),
        (ray.exceptions.ObjectStoreFullError(), "object store is full: use smaller batches"),
        (ray.exceptions.RuntimeEnvSetupError("no pip"), "could not set up its environment: see"),
        (ray.exceptions.NodeDiedError("gone"), "its node is gone: rerun the same command"),
        (ray.exceptions.LocalRayletDiedError(), "Ray on this machine has ended: see Ray's logs"),
        (ray.exceptions.TaskUnschedulableError("no GPU"), "no node can hold it: check data.node_l"),
        (ray.exceptions.ActorDiedError(), "it may have run out of memory: rerun the same command"),
        (ray.exceptions.WorkerCrashedError(), "it may have run out of memory: rerun the same"),
    ],
)
def test_each_death_has_its_own_fix(error: Exception, fix: str) -> None:
    assert fix in str(explained_death(error))


def test_errors_of_the_work_itself_are_no_deaths() -> None:
    assert explained_death(ValueError("wrong")) is None
    assert explained_death(ray.exceptions.RayTaskError("f", "trace", ValueError("wrong"))) is None
