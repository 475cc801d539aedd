"""What trials that run at once may use together, and where they keep what they share."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, with_values
from pcd_ray.errors import ClusterError
from pcd_ray.ray_nodes import Cluster, Node
from pcd_ray.tune import ray_sweep
from pcd_ray.tune.ray_sweep import cache_builder, places_of, trials_at_a_time
from pcd_ray.tune.space import open_space


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


def test_trials_are_told_what_the_autoscaler_may_bring(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)})
    kind = Node(48, 4, {"pool": "train"}, 2)
    have = Cluster([Node(0, is_head=True)], [Node(0, is_head=True), kind])
    places = places_of(config, RunFolder.of(config), have, many=1, device="cuda")
    (told,) = with_values(config, places).run.autoscaled_nodes
    assert Node(told.cpus, told.gpus, told.labels, told.count) == kind


def test_maps_lie_where_the_best_configuration_looks_for_them(tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path), "name": "s"},
        teacher={"arch": "test_resnet", "head": "none", "cache": {"views": 2}},
    )
    one = Cluster.fixed(Node(2))
    places = places_of(config, RunFolder.of(config), one, many=1, device="cpu")
    assert places["teacher.cache.path"] == str(tmp_path / "teacher_cache")


def test_a_sweep_searches_relative_weights_where_its_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Config] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_sweep, "_run", lambda config, *_: ran.append(config))
    monkeypatch.setattr(ray_sweep, "_checked", lambda _: None)  # of a cluster that is not there
    monkeypatch.setattr(ray_sweep, "open_shards", lambda _: SimpleNamespace(content_hash="a"))
    monkeypatch.setattr(ray_sweep, "check_outlives_job", lambda *_: None)
    for name in "ab":
        Path(f"{name}.pth").touch()
    config = tiny_config(
        run={"root": "runs", "name": "s"},
        data={"shards": "shards"},
        tune={"space": {"teacher.weights": {"choice": ["a.pth", "b.pth"]}}, "scheduler": "none"},
        eval={"knn_train": "labelled", "knn_test": "labelled"},
    )
    ray_sweep.sweep(config)
    choices = {"choice": [f"{tmp_path}/a.pth", f"{tmp_path}/b.pth"]}
    assert ran[0].tune.space == {"teacher.weights": choices}


@pytest.mark.parametrize(
    ("views", "varied", "many", "started"),
    [(2, False, 2, True), (0, True, 2, True), (0, False, 2, False), (2, True, 1, False)],
)
def test_a_builder_of_maps_is_there_for_trials_that_share_them_and_outlives_its_death(
    views: int, varied: bool, many: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def remote(**options: Any) -> Callable[[type], Any]:
        asked.append(options)
        return lambda kind: type("Remote", (), {"remote": staticmethod(kind)})

    monkeypatch.setattr("ray.remote", remote)
    rule: dict[str, Any] = (
        {"teacher.cache.views": {"choice": [0, 2]}}
        if varied
        else {"loss.temperature": {"log": [0.1, 0.5]}}
    )
    teacher = {"arch": "test_resnet", "head": "none", "cache": {"views": views}}
    config = tiny_config(teacher=teacher, tune={"space": rule})
    builder = cache_builder(config, open_space(config), many=many)
    assert (builder is not None) == started
    restarts = [(each["max_restarts"], each["max_task_retries"]) for each in asked]
    assert restarts == [(-1, 1)] * started


def _asking(config: Config, many: int) -> Config:
    return with_values(config, {"tune.max_concurrent": many})
