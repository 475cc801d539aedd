import pytest

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import ClusterResources, WorkerShare, share_for_pool, share_for_workers

LAPTOP = ClusterResources(cpus=2, gpus=0, nodes=1)


def share(
    have: ClusterResources, num_workers: int | tuple[int, int], **settings: float | str
) -> WorkerShare:
    values = {"device": "auto", "cpus_per_worker": 0.0, "threads_per_worker": 0}
    values |= {"cpus_per_data_task": 1.0} | settings
    return share_for_workers(have, num_workers=num_workers, **values)


def room(have: ClusterResources, num_workers: int, **settings: float | str) -> float:
    """CPUs that are left to data tasks."""
    return have.cpus - num_workers * share(have, num_workers, **settings).cpus


def test_two_workers_on_two_cores_leave_room_for_two_data_tasks() -> None:
    assert share(LAPTOP, 2) == WorkerShare(device="cpu", cpus=0.0, threads=1)
    assert room(LAPTOP, 2) == 2
    assert share(LAPTOP, 1).threads == 2


@pytest.mark.parametrize(("cpus", "nodes", "workers"), [(8, 1, 2), (64, 4, 8), (6, 2, 6)])
def test_on_larger_clusters_half_is_left_to_data(cpus: float, nodes: int, workers: int) -> None:
    have = ClusterResources(cpus, 0, nodes)
    assert room(have, workers) == pytest.approx(cpus / 2, abs=1e-2)
    per_node = -(-workers // nodes)
    assert share(have, workers).threads == max(1, int(cpus / nodes) // per_node)


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"), [(64, 8, 1.0), (9, 8, 0.5), (2, 1, 0.5), (1, 1, 0.0)]
)
def test_beside_a_gpu_a_worker_takes_one_cpu_at_most(
    cpus: float, gpus: int, expected: float
) -> None:
    have = ClusterResources(cpus, gpus, 1)
    assert share(have, gpus).device == "cuda"
    assert share(have, gpus).cpus == expected
    assert room(have, gpus) >= 1


def test_what_the_user_says_counts() -> None:
    have = ClusterResources(16, 2, 1)
    given = share(have, 2, device="cpu", cpus_per_worker=3.0, threads_per_worker=5)
    assert given == WorkerShare(device="cpu", cpus=3.0, threads=5)
    assert share(LAPTOP, 5, cpus_per_worker=0.1).cpus == 0.1  # cores may be shared on purpose


def test_of_an_elastic_pair_the_least_must_fit_and_each_gets_what_leaves_room_for_more() -> None:
    assert share(LAPTOP, (1, 4)) == share(LAPTOP, 2)
    gpus = ClusterResources(cpus=8, gpus=2, nodes=1)
    assert share(gpus, (1, 8)) == share(gpus, 2)
    with pytest.raises(ClusterError, match=r"num_workers=3 with .* need 3 GPUs, the cluster has 2"):
        share(gpus, (3, 8))
    four = ClusterResources(cpus=4, gpus=0, nodes=2)
    assert share(four, (2, 8), cpus_per_worker=1.5).cpus == 1.5  # and a data task
    with pytest.raises(ClusterError, match=r"num_workers=3 x 1\.5 CPUs and one data task"):
        share(four, (3, 8), cpus_per_worker=1.5)


def test_ray_is_never_asked_for_nothing() -> None:
    assert share(LAPTOP, 2).resources == {"CPU": 0.0, "memory": 1}


@pytest.mark.parametrize(
    ("have", "workers", "settings", "message"),
    [
        (
            LAPTOP,
            3,
            {},
            "train.num_workers=3 on CPUs need one each, the cluster has 2; use train.num_workers=2",
        ),
        (
            LAPTOP,
            2,
            {"cpus_per_worker": 1.0},
            "train.num_workers=2 x 1 CPUs and one data task of data.cpus_per_task=1 need 3 CPUs, "
            "the cluster has 2; lower train.num_workers, train.cpus_per_worker",
        ),
        (LAPTOP, 1, {"cpus_per_data_task": 4.0}, "need 4 CPUs, the cluster has 2"),
        (
            ClusterResources(64, 4, 1),
            8,
            {},
            "need 8 GPUs, the cluster has 4; use train.num_workers=4",
        ),
        (LAPTOP, 1, {"device": "cuda"}, "has 0; use train.num_workers=1 and train.device=cpu"),
    ],
)
def test_more_than_there_is_is_refused_with_numbers_and_the_fix(
    have: ClusterResources, workers: int, settings: dict[str, float | str], message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        share(have, workers, **settings)
    assert message in str(caught.value)


def test_one_worker_fits_on_one_of_several_nodes() -> None:
    have = ClusterResources(cpus=64, gpus=0, nodes=4)
    assert share(have, 1).cpus == 8  # half of a node, not of the cluster


@pytest.mark.parametrize(
    ("have", "device", "most", "size"),
    [
        (LAPTOP, "cpu", 100, 1),
        (ClusterResources(64, 0, 4), "cpu", 100, 16),
        (ClusterResources(64, 0, 4), "cpu", 3, 3),
        (ClusterResources(64, 8, 2), "cuda", 100, 8),
        (ClusterResources(8, 1, 1), "cuda", 100, 1),
    ],
)
def test_a_pool_never_takes_the_cpus_of_data_tasks(
    have: ClusterResources, device: str, most: int, size: int
) -> None:
    found, each = share_for_pool(have, device=device, most=most, cpus_per_data_task=0.5)
    assert found == size
    assert each.device == device
    assert have.cpus - size * each.cpus >= have.cpus / 2
    assert each.threads * size <= have.cpus


def test_a_pool_on_gpus_that_are_not_there_is_refused() -> None:
    with pytest.raises(ClusterError, match="need 1 GPUs, the cluster has 0"):
        share_for_pool(LAPTOP, device="cuda", most=4, cpus_per_data_task=0.5)
