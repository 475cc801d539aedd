import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pcd_ray.config import config_from_values
from pcd_ray.errors import ConfigError
from pcd_ray.ray_nodes import (
    HEAD,
    Need,
    Node,
    Standstill,
    busy_line,
    cpus_of,
    fits,
    gpus_of,
    launchers_nodes,
    nodes_now,
    room_for,
    say_if_busy,
    with_autoscaled,
)

DATA, TRAIN = {"pool": "data"}, {"pool": "train"}
OWN = "01000000"  # a job
LAUNCHERS = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0, "GPU": 0}, "node_config": {}},
        "data": {"resources": {"CPU": 32}, "labels": DATA, "max_workers": 9},
        "train": {"resources": {"CPU": 48, "GPU": 4}, "labels": TRAIN, "max_workers": 2},
        "on_demand": {"resources": {"CPU": 48, "GPU": 4}, "labels": TRAIN, "max_workers": 0},
        "unknown": {"node_config": {"InstanceType": "m5.large"}},
        "free": {"resources": {"CPU": 1}},
    },
}


def test_the_launchers_file_says_what_may_come() -> None:
    kinds, limit = launchers_nodes(json.dumps(LAUNCHERS))
    assert kinds == [
        Node(32, 0, DATA, 5),  # no more than max_workers of all
        Node(48, 4, TRAIN, 2),
        Node(1, 0, {}, 5),
    ]
    assert limit == 5
    assert launchers_nodes("{}") == ([], 2)


def test_the_launchers_total_holds_for_all_kinds_together() -> None:
    workers, task = (
        Need("workers", 8, cpus=1, gpus=1, labels=TRAIN),
        Need("data task", 1, 1, 0, DATA),
    )
    most = [Node(0, is_head=True), Node(32, 0, DATA, 5), Node(48, 4, TRAIN, 2)]
    assert fits(most, workers, task, 3)
    assert not fits(most, workers, task, 2)
    assert fits([Node(2, 0, DATA, is_head=True), *most[1:]], workers, task, 2)  # it counts not
    assert room_for([Node(48, 1, TRAIN, 9), Node(48, 4, TRAIN, 2)], workers, 3) == 9
    assert cpus_of(most, 3) == 2 * 48 + 32
    assert gpus_of(most, 1) == 4


def test_nodes_that_the_autoscaler_has_brought_count_once() -> None:
    kinds = [Node(32, 0, DATA, 4), Node(48, 4, TRAIN, 2)]
    head, brought = Node(0), Node(32, 0, {**DATA, "ray.io/node-id": "a"})
    assert with_autoscaled([head], kinds) == [head, *kinds]
    assert with_autoscaled([head, brought, brought], kinds) == [head, *kinds]
    own = Node(16, 0, DATA)  # of another kind
    assert with_autoscaled([own, brought], kinds) == [own, *kinds]


def test_no_node_that_is_there_is_lost_among_those_that_may_come() -> None:
    kind = Node(32, 0, DATA, 2)
    head = Node(32, 0, DATA, is_head=True)  # of the same shape
    brought = Node(32, 0, DATA)
    assert with_autoscaled([head, brought], [kind]) == [head, kind]
    more = with_autoscaled([head, *[brought] * 5], [kind])  # more than it may bring
    assert sum(node.count for node in more) == 6
    # two kinds of one shape, as spot and on demand, and one that all of them are of besides
    kinds = [Node(32, 0, {}, 1), kind, replace(kind, count=1)]
    assert with_autoscaled([brought] * 3, kinds) == kinds
    assert with_autoscaled([Node(32), *[brought] * 3], kinds) == kinds


def test_the_head_is_known_by_its_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"CPU": 32.0, "node:10.0.0.1": 1.0}
    told = [
        {"Alive": True, "Resources": resources | {HEAD: 1.0}, "Labels": DATA},
        {"Alive": True, "Resources": resources, "Labels": DATA},
        {"Alive": False, "Resources": resources, "Labels": DATA},
    ]
    monkeypatch.setattr("ray.nodes", lambda: told)
    assert nodes_now() == [Node(32, 0, DATA, is_head=True), Node(32, 0, DATA)]


def test_room_is_counted_node_by_node() -> None:
    need = Need("workers", 3, cpus=3, gpus=1, labels=TRAIN)
    assert room_for([Node(4, 4, TRAIN, 2), Node(2, 1, TRAIN), Node(64, 8, DATA)], need) == 2
    assert room_for([Node(0.3, labels=TRAIN)], Need("workers", 3, cpus=0.1)) == 3  # in floats too


def test_a_task_may_need_the_node_that_workers_would_fill() -> None:
    workers, task = Need("workers", 2, cpus=3), Need("data task", 1, cpus=2)
    assert fits([Node(3), Node(5)], workers, task)
    assert not fits([Node(3), Node(4)], workers, task)
    assert fits([Node(3, count=3)], workers, task)
    assert not fits([], Need("workers", 0, cpus=0), task)


def test_a_loss_is_waited_out_with_a_line_now_and_then_while_nodes_are_missing() -> None:
    now = [100.0]
    standstill = Standstill(Need("workers", 2, 4, 1, TRAIN), clock=lambda: now[0])
    one, two = [Node(8, 1, TRAIN)], [Node(8, 1, TRAIN, 2)]

    def said(nodes: list[Node], *, seconds: int, busy: str = "") -> list[str]:
        lines = []
        for _ in range(seconds):
            now[0] += 1
            lines += filter(None, [standstill.line(lambda: nodes, lambda _: busy)])
        return lines

    assert said(one, seconds=60) == []  # nothing is lost
    standstill.begin()
    first = said(one, seconds=60)
    assert [line.rpartition("; ")[2] for line in first] == ["15 s", "30 s", "60 s"]
    assert "room for 1 of 2 workers of 1 GPU and 4 CPUs on nodes with pool=train" in first[0]
    standstill.begin()  # told again
    assert said(two, seconds=60) == []  # they are there, and start
    assert [line.rpartition("; ")[0] for line in said(two, seconds=60, busy="busy")] == ["busy"]
    assert len(said(one, seconds=60)) == 1
    standstill.end()
    assert said(one, seconds=60) == []


@pytest.mark.parametrize(
    ("state", "job", "free", "waits"),
    [
        ("PENDING", "01000000", 4.0, True),  # free, but not in one place
        ("PENDING", "02000000", 4.0, False),  # another run's
        ("CREATED", "01000000", 0.0, False),  # they have it, and start
        ("CREATED", "02000000", 0.0, True),
        ("REMOVED", "01000000", 0.0, True),
    ],
)
def test_workers_wait_for_room_until_they_have_it(
    state: str, job: str, free: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {
        "placement_group_id": f"afa773c2{job}",
        "state": state,
        "bundles": {0: {"CPU": 1.0, "GPU": 1.0}},
    }
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: OWN))
    monkeypatch.setattr("ray.util.placement_group_table", lambda: {"a": group})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 64.0, "GPU": free})
    line = busy_line(Need("workers", 2, 1, 1, TRAIN))
    told = (
        "the nodes are there but busy: 2 workers of 1 GPU and 1 CPUs on nodes with pool=train ask "
        f"for room, free on all nodes are 64 of 64 CPUs and {free:g} of 8 GPUs"
    )
    assert line == (told if waits else "")


@pytest.mark.parametrize(("free", "said"), [([1.0], []), ([0.0, 1.0], []), ([0.0] * 12, [0.0])])
def test_work_that_waits_for_busy_nodes_is_told_so_after_a_while(
    free: list[float], said: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, lines, slept = iter(free), list[str](), list[float]()
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": next(seen)})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("pcd_ray.ray_nodes.time.sleep", slept.append)
    say_if_busy(Need("data tasks", 1, 1.0), lines.append)
    assert lines == [
        "the nodes are there but busy: 1 data tasks of 1 CPUs wait for room, free on all nodes are "
        f"{left:g} of 2 CPUs"
        for left in said
    ]
    assert sum(slept) == (10.0 if said else len(free) - 1)


def test_labels_are_plain_names_and_values() -> None:
    given = config_from_values(
        {
            "data": {"node_labels": {"ray.io/node-group": "cpu-nodes"}},
            "run": {"autoscaled_nodes": [{"count": 2, "cpus": 4, "labels": {"pool": "data"}}]},
        }
    )
    assert given.data.node_labels == {"ray.io/node-group": "cpu-nodes"}
    assert given.run.autoscaled_nodes[0].labels == {"pool": "data"}
    with pytest.raises(ConfigError, match=r"train\.node_labels must be plain names and values"):
        config_from_values({"train": {"node_labels": {"pool": "!in(a, b)"}}})
    with pytest.raises(ConfigError, match=r"run\.autoscaled_nodes\.count must be > 0, got 0"):
        config_from_values({"run": {"autoscaled_nodes": [{"count": 0, "cpus": 4}]}})
