import pytest

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import check_outlives_job


def test_nothing_is_stored_where_a_job_has_its_working_folder() -> None:
    check_outlives_job("run.root", "s3://bucket/runs")
    inside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(ClusterError, match=r"run\.root=/tmp/ray/.* a place that all nodes share"):
        check_outlives_job("run.root", inside)
