import pytest
import ray

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import check_outlives_job, explained_death


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
