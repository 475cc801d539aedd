"""What a configuration asks of the cluster: shares of its nodes, and the nodes themselves."""

from collections.abc import Callable
from dataclasses import replace

from pcd_ray.config import Config
from pcd_ray.ray_cluster import connect
from pcd_ray.ray_nodes import Cluster, Need, Node, fits, say_if_busy, wait_for_nodes
from pcd_ray.ray_shares import (
    Asked,
    WorkerShare,
    check_data_task,
    needs_of,
    share_for_pool,
    share_for_workers,
)


def cluster_of(config: Config) -> Cluster:
    """Join the cluster, or start one; return its nodes and those that there may be."""
    stated = config.run.autoscaled_nodes
    return connect([Node(each.cpus, each.gpus, each.labels, each.count) for each in stated])


def asked_of(config: Config) -> Asked:
    """Return what a configuration asks for training."""
    train, data = config.train, config.data
    return Asked(
        num_workers=train.num_workers,
        device=train.device,
        cpus_per_worker=train.cpus_per_worker,
        threads_per_worker=train.threads_per_worker,
        worker_labels=train.node_labels,
        cpus_per_data_task=data.cpus_per_task,
        data_labels=data.node_labels,
    )


def share_of_workers(
    config: Config, *, num_workers: int | None = None, device: str | None = None
) -> WorkerShare:
    """Decide what each of ``train.num_workers`` gets, or of another number, or on another device.

    Raises:
        ClusterError: the cluster can never hold them.
    """
    return share_for_workers(cluster_of(config), _asked(config, num_workers, device))


def share_of_pool(config: Config, *, device: str, most: int) -> tuple[int, WorkerShare]:
    """Decide how many actors, at most ``most``, compute on a device, and what each gets.

    Raises:
        ClusterError: the cluster can never hold one.
    """
    return share_for_pool(cluster_of(config), _asked(config, None, device), most=most)


def wait_for_workers(
    config: Config,
    share: WorkerShare,
    *,
    say: Callable[[str], None],
    num_workers: int | None = None,
) -> None:
    """Wait until nodes hold ``train.num_workers`` of this share, or so many, and a data task.

    Raises:
        ClusterError: they have not come within ``run.wait_for_nodes_s``.
    """
    asked = _asked(config, num_workers, None)
    workers, task = needs_of(share, asked, count=asked.least)
    wait_for_nodes(workers, task, limit_s=config.run.wait_for_nodes_s, say=say)


def task_of_data(config: Config) -> Need:
    """Join the cluster; return what one task of Ray Data reserves.

    Raises:
        ClusterError: no node can ever hold it.
    """
    return check_data_task(cluster_of(config), asked_of(config))


def wait_for_data_nodes(config: Config, task: Need, *, say: Callable[[str], None]) -> None:
    """Wait until there is a node for a task of Ray Data; log a line if all of them are busy.

    Raises:
        ClusterError: none has come within ``run.wait_for_nodes_s``.
    """
    wait_for_nodes(Need("workers", 0, 0.0), task, limit_s=config.run.wait_for_nodes_s, say=say)
    say_if_busy(task, say)


def note_on_nodes(config: Config, share: WorkerShare) -> str:
    """Say what the autoscaler will be asked for; empty: nothing, all nodes are there."""
    asked = asked_of(config)
    workers, task = needs_of(share, asked, count=asked.least)
    if fits(cluster_of(config).now, workers, task):
        return ""
    return f"the autoscaler will be asked for nodes that hold {workers} and {task}"


def _asked(config: Config, num_workers: int | None, device: str | None) -> Asked:
    asked = asked_of(config)
    return replace(
        asked,
        num_workers=asked.num_workers if num_workers is None else num_workers,
        device=device or asked.device,
    )
