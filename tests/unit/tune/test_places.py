"""What trials that run at once may use together, and where they keep what they share."""

from pathlib import Path

import pytest
from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, with_values
from pcd_ray.errors import ClusterError
from pcd_ray.ray_nodes import Cluster, Node
from pcd_ray.tune.ray_sweep import places_of, trials_at_a_time


@pytest.mark.parametrize(
    ("node", "device", "workers"),
    [
        (Node(16), "cpu", 2),
        (Node(16, count=4), "cpu", 1),
        (Node(4, 4), "cuda", 1),
        (Node(64, 8), "cuda", 2),
        (Node(3, 8), "cuda", 1),
    ],
)
def test_trials_that_run_at_once_leave_data_tasks_room(
    node: Node, device: str, workers: int, tmp_path: Path
) -> None:
    config = tiny_config(
        run={"root": str(tmp_path)}, train={"num_workers": workers}, data={"cpus_per_task": 1.0}
    )
    have = Cluster.fixed(node)
    with pytest.raises(ClusterError, match="use at most") as error:
        trials_at_a_time(_asking(config, 99), have, device=device)
    many = int(str(error.value).partition("use at most ")[2].partition(",")[0])
    assert many > 1
    assert trials_at_a_time(_asking(config, many), have, device=device) == many
    places = places_of(config, RunFolder.of(config), have, many=many, device=device)
    reserved = many * workers * places["train.cpus_per_worker"]
    assert reserved > 0
    cpus = node.cpus * node.count
    assert cpus - reserved >= max(1.0, cpus / 2 - 0.1)
    if device == "cuda":
        assert many * workers <= node.gpus * node.count


def test_on_a_small_machine_trials_reserve_nothing(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)})
    have = Cluster.fixed(Node(4))
    places = places_of(config, RunFolder.of(config), have, many=2, device="cpu")
    assert places["train.cpus_per_worker"] == 0.0


def test_maps_lie_where_the_best_configuration_looks_for_them(tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path), "name": "s"},
        teacher={"arch": "test_resnet", "head": "none", "cache": {"views": 2}},
    )
    one = Cluster.fixed(Node(2))
    places = places_of(config, RunFolder.of(config), one, many=1, device="cpu")
    assert places["teacher.cache.path"] == str(tmp_path / "teacher_cache")


def _asking(config: Config, many: int) -> Config:
    return with_values(config, {"tune.max_concurrent": many})
