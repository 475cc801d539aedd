import pytest

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import check_outlives_job, connect


def test_the_address_that_takes_jobs_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before in this process
    with pytest.raises(ClusterError, match=r"submit --address http://127\.0\.0\.1:8265 "):
        connect()


def test_nothing_is_stored_where_a_job_has_its_working_folder() -> None:
    check_outlives_job("run.root", "s3://bucket/runs")
    inside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(ClusterError, match=r"run\.root=/tmp/ray/.* a place that all nodes share"):
        check_outlives_job("run.root", inside)
