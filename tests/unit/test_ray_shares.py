from dataclasses import replace

import pytest

from pcd_ray.errors import ClusterError
from pcd_ray.ray_nodes import Cluster, Node, fits, with_autoscaled
from pcd_ray.ray_shares import (
    Asked,
    WorkerShare,
    _rounded,
    check_data_task,
    cpus_beside_others,
    needs_of,
    share_for_pool,
    share_for_workers,
)

LAPTOP = Cluster.fixed(Node(cpus=2))
HEAD = Node(cpus=0)
DATA, TRAIN = {"pool": "data"}, {"pool": "train"}
POOLS = {"worker_labels": TRAIN, "data_labels": DATA}


def cluster(cpus: float, gpus: float = 0, nodes: int = 1) -> Cluster:
    """So many nodes that are alike; CPUs and GPUs are those of all."""
    return Cluster.fixed(Node(cpus / nodes, gpus / nodes, count=nodes))


def autoscaled(*kinds: Node) -> Cluster:
    return Cluster([HEAD], with_autoscaled([HEAD], kinds))


def asked(num_workers: int | tuple[int, int], **settings: object) -> Asked:
    return Asked(**{"num_workers": num_workers, "cpus_per_data_task": 1.0, **settings})


def share(have: Cluster, num_workers: int | tuple[int, int], **settings: object) -> WorkerShare:
    return share_for_workers(have, asked(num_workers, **settings))


def cpus_of(have: Cluster) -> float:
    return sum(node.cpus * node.count for node in have.most)


def room(have: Cluster, num_workers: int, **settings: object) -> float:
    """CPUs that are left to data tasks."""
    return cpus_of(have) - num_workers * share(have, num_workers, **settings).cpus


def test_two_workers_on_two_cores_leave_room_for_two_data_tasks() -> None:
    assert share(LAPTOP, 2) == WorkerShare(device="cpu", cpus=0.0, threads=1)
    assert room(LAPTOP, 2) == 2
    assert share(LAPTOP, 1).threads == 2


@pytest.mark.parametrize(("cpus", "nodes", "workers"), [(8, 1, 2), (64, 4, 8), (6, 2, 6)])
def test_on_larger_clusters_half_is_left_to_data(cpus: float, nodes: int, workers: int) -> None:
    have = cluster(cpus, 0, nodes)
    assert room(have, workers) == pytest.approx(cpus / 2, abs=1e-2)
    per_node = -(-workers // nodes)
    assert share(have, workers).threads == max(1, int(cpus / nodes) // per_node)


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"), [(64, 8, 1.0), (9, 8, 0.5), (2, 1, 0.5), (1, 1, 0.0)]
)
def test_beside_a_gpu_a_worker_takes_one_cpu_at_most(
    cpus: float, gpus: int, expected: float
) -> None:
    have = cluster(cpus, gpus)
    assert share(have, gpus).device == "cuda"
    assert share(have, gpus).cpus == expected
    assert room(have, gpus) >= 1


def test_what_the_user_says_counts() -> None:
    have = cluster(16, 2)
    given = share(have, 2, device="cpu", cpus_per_worker=3.0, threads_per_worker=5)
    assert given == WorkerShare(device="cpu", cpus=3.0, threads=5)
    assert share(LAPTOP, 5, cpus_per_worker=0.1).cpus == 0.1  # cores may be shared on purpose


def test_of_an_elastic_pair_the_least_must_fit_and_each_gets_what_leaves_room_for_more() -> None:
    assert share(LAPTOP, (1, 4)) == share(LAPTOP, 2)
    gpus = cluster(8, gpus=2)
    assert share(gpus, (1, 8)) == share(gpus, 2)
    with pytest.raises(ClusterError, match=r"num_workers=3 with .* need 3 GPUs, the cluster has 2"):
        share(gpus, (3, 8))
    six = cluster(6, nodes=2)
    assert share(six, (2, 8), cpus_per_worker=1.5).cpus == 1.5  # and a data task
    with pytest.raises(ClusterError, match=r"num_workers=4 x 1\.5 CPUs and one data task"):
        share(six, (4, 8), cpus_per_worker=1.5)


def test_elastic_workers_with_labels_are_refused_where_ray_would_count_other_nodes() -> None:
    have = autoscaled(Node(8, 0, DATA, count=2), Node(4, 0, TRAIN, count=2))
    assert share(have, 2, **POOLS).cpus == 4.0
    assert share(have, (2, 2), **POOLS).cpus == 4.0
    message = (
        "train.num_workers is elastic on nodes with pool=train, but Ray counts the room on all "
        "nodes, and the others hold 8 workers of 2 CPUs, the cluster has 24 at most, 1 nodes of it "
        "now (nodes: 1 x 0 CPUs, 2 x 8 CPUs with pool=data, 2 x 4 CPUs with pool=train); give "
        "train.num_workers one number, or train.node_labels that all nodes with such resources have"
    )
    with pytest.raises(ClusterError) as caught:
        share(have, (1, 4), **POOLS)
    assert str(caught.value) == message
    with pytest.raises(ClusterError, match=r"others hold 4 workers of 1 GPU and 1 CPUs"):
        share(autoscaled(Node(48, 4, DATA), Node(48, 4, TRAIN)), (1, 4), **POOLS)


def test_elastic_workers_with_labels_may_be_where_no_other_node_holds_one() -> None:
    gpus = autoscaled(Node(32, 0, DATA, count=4), Node(48, 4, TRAIN, count=2))  # as cluster.yaml
    assert share(gpus, (2, 8), **POOLS) == share(gpus, 8, **POOLS)
    small = autoscaled(Node(2, 0, DATA), Node(3, 1, TRAIN, count=2))
    assert share(small, (1, 2), **POOLS, device="cpu").cpus == 3.0
    shared = Cluster.fixed(Node(8, 0, TRAIN, count=2))
    assert share(shared, (1, 4), worker_labels=TRAIN, data_labels=TRAIN).cpus == 2.0
    assert share_for_pool(gpus, asked((1, 8), device="cpu", **POOLS), most=4)[1].labels == TRAIN


def test_rays_count_of_what_equal_shares_reserve_is_their_number() -> None:
    """Ray Train divides the sum of what is reserved by one share, in floats, rounded down."""
    for workers in range(1, 65):
        for halves in range(1, 257):
            each = halves / 2 / workers
            rounded = _rounded(each)
            assert 0 < rounded <= each
            if each >= 1 / 16:
                assert each - rounded < 1 / 16
                assert sum([rounded] * workers) // rounded == workers
    assert share(cluster(8), 3).cpus == 1.3125  # 3 x 1.333 are 3.9989999999999997: room for 2
    assert cpus_beside_others(cluster(8), asked(3, device="cpu"), groups=1) == 1.125


def test_ray_is_never_asked_for_nothing() -> None:
    assert share(LAPTOP, 2).resources == {"CPU": 0.0, "memory": 1}
    assert share(cluster(1, 1), 1).resources == {"CPU": 0.0}  # beside its GPU


def test_without_a_reservation_a_worker_would_land_on_a_head_that_has_no_cpus() -> None:
    have = Cluster.fixed(HEAD, Node(4))
    assert share(have, 2).cpus == 1.0


def test_of_least_and_most_the_cluster_holds_the_least() -> None:
    assert share(cluster(16), (2, 4)) == share(cluster(16), 4)
    assert share(LAPTOP, (1, 4)) == share(LAPTOP, 2)
    with pytest.raises(ClusterError, match=r"train\.num_workers=3 on CPUs need one each"):
        share(LAPTOP, (3, 4))


def test_workers_take_their_nodes_whole_where_no_data_tasks_run() -> None:
    have = Cluster.fixed(HEAD, Node(8, 0, DATA), Node(4, 0, TRAIN, count=2))
    assert share(have, 2, **POOLS) == WorkerShare("cpu", cpus=4.0, threads=4, labels=TRAIN)
    assert share(have, 4, **POOLS) == WorkerShare("cpu", cpus=2.0, threads=2, labels=TRAIN)
    assert share(have, 3, **POOLS).cpus == 2.0  # no three on one node


def test_what_the_autoscaler_may_bring_decides_before_it_is_there() -> None:
    have = autoscaled(Node(32, 0, DATA, count=4), Node(48, 4, TRAIN, count=2))
    assert share(have, 8, **POOLS) == WorkerShare("cuda", cpus=1.0, threads=12, labels=TRAIN)
    assert share(autoscaled(Node(2, 0, DATA), Node(1, 0, TRAIN, count=2)), 2, **POOLS).cpus == 1.0
    workers, task = needs_of(share(have, 8, **POOLS), asked(8, **POOLS), count=8)
    assert not fits(have.now, workers, task)
    assert fits(have.most, workers, task)


def test_gpus_that_workers_may_not_use_do_not_decide_the_device() -> None:
    have = Cluster.fixed(Node(8, 1, DATA), Node(8, 0, TRAIN))
    assert share(have, 1, **POOLS).device == "cpu"
    assert share(have, 1).device == "cuda"


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
            "the cluster has 2 (nodes: 1 x 2 CPUs); lower train.num_workers, train.cpus_per_worker",
        ),
        (LAPTOP, 1, {"cpus_per_data_task": 4.0}, "need 4 CPUs, the cluster has 2"),
        (cluster(64, 4), 8, {}, "need 8 GPUs, the cluster has 4; use train.num_workers=4"),
        (
            LAPTOP,
            1,
            {"device": "cuda"},
            "has 0; use train.num_workers=1 and train.device=cpu; if an autoscaler brings more, "
            "say so in run.autoscaled_nodes",
        ),
        (  # enough in all, but on no node
            cluster(16, 0, nodes=4),
            1,
            {"cpus_per_worker": 6.0},
            "need 7 CPUs, the cluster has 16 (nodes: 4 x 4 CPUs)",
        ),
        (
            Cluster.fixed(Node(0, 0, DATA), Node(8, 0, TRAIN)),
            1,
            POOLS,
            "train.num_workers=1 x 8 CPUs on nodes with pool=train and one data task of "
            "data.cpus_per_task=1 on nodes with pool=data need 9 CPUs, the cluster has 8 "
            "(nodes: 1 x 0 CPUs with pool=data, 1 x 8 CPUs with pool=train)",
        ),
        (
            Cluster.fixed(Node(8, 0, DATA)),
            1,
            POOLS,
            "train.num_workers=1 on CPUs need one each on nodes with pool=train, the cluster has 0",
        ),
        (
            autoscaled(Node(32, 0, DATA, count=4), Node(48, 4, TRAIN, count=2)),
            9,
            {**POOLS, "device": "cuda"},
            "need 9 GPUs on nodes with pool=train, the cluster has 8; use train.num_workers=8; "
            "that is all that the autoscaler may bring",
        ),
        (
            autoscaled(Node(4, 0, DATA), Node(4, 1, TRAIN, count=2)),
            2,
            {**POOLS, "cpus_per_data_task": 5.0},
            "and 2 GPUs, the cluster has 12 at most, 1 nodes of it now (nodes: 1 x 0 CPUs, "
            "1 x 4 CPUs with pool=data, 2 x 1 GPU and 4 CPUs with pool=train)",
        ),
    ],
)
def test_more_than_there_can_be_is_refused_with_numbers_and_the_fix(
    have: Cluster, workers: int, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        share(have, workers, **settings)
    assert message in str(caught.value)


def test_packing_needs_a_node_for_one_task() -> None:
    have = autoscaled(Node(2, 0, DATA), Node(48, 4, TRAIN, count=2))
    assert check_data_task(have, asked(1, data_labels=DATA)).cpus == 1
    with pytest.raises(ClusterError, match=r"data\.cpus_per_task=3 on nodes with pool=data fits"):
        check_data_task(have, asked(1, data_labels=DATA, cpus_per_data_task=3.0))


def test_one_worker_fits_on_one_of_several_nodes() -> None:
    assert share(cluster(64, 0, nodes=4), 1).cpus == 8  # half of a node, not of the cluster


@pytest.mark.parametrize(
    ("have", "device", "most", "size"),
    [
        (LAPTOP, "cpu", 100, 1),
        (cluster(64, 0, 4), "cpu", 100, 16),
        (cluster(64, 0, 4), "cpu", 3, 3),
        (cluster(64, 8, 2), "cuda", 100, 8),
        (cluster(8, 1, 1), "cuda", 100, 1),
    ],
)
def test_a_pool_never_takes_the_cpus_of_data_tasks(
    have: Cluster, device: str, most: int, size: int
) -> None:
    wanted = Asked(device=device, cpus_per_data_task=0.5)
    found, each = share_for_pool(have, wanted, most=most)
    assert found == size
    assert each.device == device
    assert cpus_of(have) - size * each.cpus >= cpus_of(have) / 2
    assert each.threads * size <= cpus_of(have)


def test_a_pool_is_as_large_as_the_nodes_that_are_there_and_one_where_none_are() -> None:
    wanted = Asked(device="cuda", **POOLS)
    kinds = [Node(32, 0, DATA, count=4), Node(48, 4, TRAIN, count=2)]
    assert share_for_pool(autoscaled(*kinds), wanted, most=100)[0] == 1
    now = [HEAD, *(replace(kind, count=1) for kind in kinds)]
    up = Cluster(now, with_autoscaled(now, kinds))
    assert share_for_pool(up, wanted, most=100)[0] == 4


def test_more_nodes_than_the_launcher_brings_of_all_kinds_together_are_refused() -> None:
    head = Node(0, is_head=True)
    kinds = [Node(32, 0, DATA, count=4), Node(48, 4, TRAIN, count=4)]
    have = Cluster([head], [head, *kinds], limit=4)
    wanted = Asked(num_workers=12, device="auto", **POOLS)
    assert share_for_workers(have, wanted).device == "cuda"  # three nodes, and one for data
    with pytest.raises(ClusterError, match=r"with pool=train; max_workers: 4 of them at once\)"):
        share_for_workers(have, replace(wanted, num_workers=13))
    with pytest.raises(ClusterError, match=r"need 17 GPUs on nodes with pool=train, .* has 16"):
        share_for_workers(have, replace(wanted, num_workers=17))
    elastic = replace(wanted, num_workers=(2, 99))
    assert share_for_workers(have, elastic).cpus == 1
    # on CPUs, several workers share a node where there may be no more nodes
    cpus = Cluster([head], [head, Node(32, 0, DATA, 4), Node(8, 0, TRAIN, 9)], limit=4)
    wanted = Asked(num_workers=9, device="cpu", **POOLS)
    assert share_for_workers(cpus, wanted).cpus == 2.625


def test_a_pool_on_gpus_that_are_not_there_is_refused() -> None:
    with pytest.raises(ClusterError, match="need 1 GPUs, the cluster has 0"):
        share_for_pool(LAPTOP, Asked(device="cuda"), most=4)
