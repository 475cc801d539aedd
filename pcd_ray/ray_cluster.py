"""The cluster: join the one that the environment names, or start one on this machine.

Work runs there in tasks, and what kills it is told in words; who gets how much is in `ray_shares`.
"""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.util
from ray.util.placement_group import PlacementGroup

from pcd_ray import progress
from pcd_ray.errors import ClusterError, PcdError
from pcd_ray.ray_connect import join_ray, start_ray
from pcd_ray.ray_events import EventReceiver, EventSender
from pcd_ray.ray_nodes import Cluster, Node, cluster_nodes
from pcd_ray.ray_shares import WorkerShare

PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process that computes on CPUs. Torch's threads otherwise spin while they
wait for each other, which costs several times the work itself as soon as cores are shared with
data tasks; read once, when torch is loaded."""
_DEATHS: tuple[tuple[type[Exception], str], ...] = (
    (
        ray.exceptions.OutOfDiskError,
        "the disk that holds Ray's files is full: free space there, or set RAY_TMPDIR to a folder "
        "on another disk",
    ),
    (
        ray.exceptions.ObjectStoreFullError,
        "Ray's object store is full: use smaller batches, fewer workers on a node, or nodes with "
        "more memory",
    ),
    (
        ray.exceptions.RuntimeEnvSetupError,
        "Ray could not set up its environment: see runtime_env_setup-*.log in Ray's logs on its "
        "node",
    ),
    (
        ray.exceptions.TaskUnschedulableError,
        "no node can hold it: check data.node_labels, train.node_labels and the nodes' resources",
    ),
    (
        ray.exceptions.ActorUnschedulableError,
        "no node can hold it: check data.node_labels, train.node_labels and the nodes' resources",
    ),
    (ray.exceptions.NodeDiedError, "its node is gone: rerun the same command"),
    (
        ray.exceptions.LocalRayletDiedError,
        "Ray on this machine has ended: see Ray's logs, then rerun the same command",
    ),
    (
        ray.exceptions.RayError,
        "it may have run out of memory: rerun the same command, on a larger machine if need be",
    ),
)
"""What ends a process, and what helps; the first kind that fits counts."""
_JOB_FOLDERS = "/runtime_resources/working_dir_files/"  # where Ray unpacks ``--working-dir``


def connect(autoscaled: Sequence[Node] = ()) -> Cluster:
    """Join the cluster of ``RAY_ADDRESS``, or start Ray on this machine; twice is once.

    Args:
        autoscaled: nodes that the autoscaler may bring; empty: as far as the launcher says.

    Raises:
        ClusterError: the named cluster does not answer, or Ray does not start here.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local"
    if not ray.is_initialized():
        if alone:
            start_ray()
        else:
            join_ray(address)
    return cluster_nodes(autoscaled, ours=alone)


def check_outlives_job(option: str, uri: str) -> None:
    """Refuse to store anything in the copy of the working folder that Ray makes for a job.

    Args:
        option: what asks for the place.
        uri: the place, absolute.

    Raises:
        ClusterError: it would go with the job, or lie on a node where nobody finds it.
    """
    if _JOB_FOLDERS in uri:
        raise ClusterError(
            f"{option}={uri} lies in this job's own copy of the working folder, which Ray deletes; "
            f"give a place that all nodes share, e.g. {option}=s3://bucket/folder"
        )


def call_in_task(work: Callable[..., Any], *args: Any, share: WorkerShare, what: str = "") -> Any:
    """Call a function in a Ray task that gets a worker's share; return its result.

    Raises:
        PcdError: as `call_in_tasks`.
    """
    return call_in_tasks(work, [args], share=share, what=what)[0]


def call_in_tasks(
    work: Callable[..., Any],
    arguments: Sequence[Sequence[Any]],
    *,
    share: WorkerShare,
    what: str = "",
) -> list[Any]:
    """Call a function once for each tuple of arguments, in Ray tasks; return results in order.

    The first failure cancels what has not begun.

    Args:
        work: the function.
        arguments: of each call.
        share: what each task gets.
        what: is done, for a line every 10 s; empty: nothing is logged. A single task's own
            `progress` is part of it.

    Raises:
        PcdError: ``work`` raised it.
        ClusterError: a task's process or node died, or a device has no memory left.
    """
    threads = {"OMP_NUM_THREADS": str(share.threads)}
    task = ray.remote(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        label_selector=dict(share.labels),
        runtime_env={"env_vars": PASSIVE_THREADS | threads},
    )(_work_heard).options(name=work.__name__)  # as processes and Ray's tools show it
    mailbox = f"progress-{uuid.uuid4().hex}" if what and len(arguments) == 1 else ""
    begun = [task.remote(mailbox, work, *each) for each in arguments]
    try:
        return _watched(begun, mailbox, what) if what else fetched(begun)
    except Exception:
        for each in begun:
            ray.cancel(each)
        raise


def _work_heard(mailbox: str, work: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a task; its lines of progress go to a mailbox, once the driver has one."""

    def send(line: str) -> None:
        try:
            EventSender(mailbox).say(line)
        except ValueError:  # nobody has waited for long yet
            return

    if not mailbox:
        return work(*args)
    with progress.sending_to(send):
        return work(*args)


def _watched(begun: Sequence[Any], mailbox: str, what: str) -> list[Any]:
    """Return the results of tasks in order; log every 10 s how far they are.

    Raises:
        PcdError: as `call_in_tasks`, as soon as one fails.
    """
    counts = ("parts", len(begun)) if len(begun) > 1 else ("", 0)
    shown, next_s = progress.Progress(what, *counts), time.monotonic() + progress.EVERY_S
    receiver: EventReceiver | None = None
    results: dict[Any, Any] = {}
    try:
        while waiting := [each for each in begun if each not in results]:
            left_s = max(0.0, next_s - time.monotonic())
            for done in ray.wait(waiting, timeout=left_s)[0]:
                results[done] = fetched([done])[0]
                shown.add()
            if time.monotonic() >= next_s and len(results) < len(begun):
                next_s += progress.EVERY_S
                lines = [event.text.strip() for event in receiver.take()] if receiver else []
                progress.log(f"  {shown.text}" + (f" | {lines[-1]}" if lines else ""))
                if mailbox and receiver is None:
                    receiver = EventReceiver(mailbox)
    finally:
        if receiver is not None:
            receiver.close()
    return [results[each] for each in begun]


def fetched(begun: Sequence[Any]) -> list[Any]:
    """Return the results of calls that have begun, in order.

    Raises:
        PcdError: as `call_in_tasks`.
    """
    try:
        return list(ray.get(list(begun)))
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if isinstance(cause, PcdError):
            raise cause from None
        explained = explained_death(cause or error)
        if explained is None:
            raise
        raise explained from error


def explained_death(error: BaseException) -> ClusterError | None:
    """Return what a process died of, in words; None: the error is none of Ray's nor of memory."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ClusterError(
            f"there was not enough memory ({line}); use smaller batches or images, more workers, "
            "or a larger machine: the same command goes on from what is stored"
        )
    if isinstance(error, ray.exceptions.RayTaskError):
        return None
    for kind, fix in _DEATHS:
        if isinstance(error, kind):
            return ClusterError(f"a process that computes was lost ({line}); {fix}")
    return None


def current_reservation(owner: str) -> str:
    """Return what is reserved for this process's group of workers: its id and ``owner``, or "".

    Args:
        owner: name of an actor that lives as long as the process that runs the workers.
    """
    group = ray.util.get_current_placement_group()
    return "" if group is None else f"{group.id.hex()} {owner}"


def free_reservation(reservation: str) -> bool:
    """Give back what `current_reservation` named, once its owner is gone; return whether it is.

    Ray Train leaves it reserved when the process that runs it is ended by somebody else, unless a
    dashboard answers. While the owner lives it would only reserve anew.
    """
    if not reservation:
        return True
    group, _, owner = reservation.partition(" ")
    try:
        ray.get_actor(owner)
    except ValueError:
        _remove_placement_group(group)
        return True
    return False


def _remove_placement_group(group_id: str) -> None:
    """Remove a placement group by its id, in hex: Ray removes by handle, and finds by name only."""
    identity = ray.PlacementGroupID(bytes.fromhex(group_id))
    ray.util.remove_placement_group(PlacementGroup(identity))
