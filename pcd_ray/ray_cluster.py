"""The cluster: join the one that the environment names, or start one on this machine.

Work runs there in tasks, and what kills it is told in words; who gets how much is in `ray_shares`.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.util
from ray.util.placement_group import PlacementGroup

from pcd_ray.errors import ClusterError, PcdError
from pcd_ray.ray_nodes import Cluster, Node, cluster_nodes
from pcd_ray.ray_shares import WorkerShare
from pcd_ray.uris import without_secrets

_OBJECT_STORE_SHARE = 0.2  # of this machine's memory, when we start Ray ourselves
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process that computes on CPUs. Torch's threads otherwise spin while they
wait for each other, which costs several times the work itself as soon as cores are shared with
data tasks; read once, when torch is loaded."""
_AUTH_MODE = "RAY_AUTH_MODE"
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
        if address.startswith(("http://", "https://")):
            shown = _shown(address)
            raise ClusterError(
                f"RAY_ADDRESS={shown!r} is a dashboard's: it takes jobs (ray job submit "
                f"--address {shown} --working-dir . -- python jobs/train.py ...); unset "
                "RAY_ADDRESS to run on this machine"
            )
        # a cluster of one machine that dies with this process needs no token
        open_to_all = {} if not alone or _AUTH_MODE in os.environ else {_AUTH_MODE: "disabled"}
        try:
            with environment(open_to_all):
                ray.init(
                    address=address,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                    include_dashboard=False if alone else None,
                    object_store_memory=_object_store_bytes() if alone else None,
                )
        except Exception as error:  # Ray's own kinds, and bare ones when it starts too slowly
            raise _no_cluster(address, error) from error
    return cluster_nodes(autoscaled, ours=alone)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process while a call of Ray's runs that has no arguments for them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _no_cluster(address: str, error: Exception) -> ClusterError:
    """Say why there is no cluster; a password in its address is not repeated."""
    if address == "local":
        return ClusterError(
            f"Ray cannot be started on this machine ({error}); it may be too busy or short of "
            "memory or disk: free some and try again"
        )
    shown = _shown(address)
    why = error if shown == address else type(error).__name__  # its words may hold the address
    return ClusterError(
        f"the Ray cluster at RAY_ADDRESS={shown!r} does not answer ({why}); check the address, "
        "export RAY_AUTH_MODE=token if it asks for one (~/.ray/auth_token must hold the "
        "cluster's), or unset RAY_ADDRESS"
    )


def _shown(address: str) -> str:
    if "://" in address:
        return without_secrets(address)
    return without_secrets(f"ray://{address}").removeprefix("ray://")


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


def call_in_task(work: Callable[..., Any], *args: Any, share: WorkerShare) -> Any:
    """Call a function in a Ray task that gets a worker's share; return its result.

    Raises:
        PcdError: as `call_in_tasks`.
    """
    return call_in_tasks(work, [args], share=share)[0]


def call_in_tasks(
    work: Callable[..., Any], arguments: Sequence[Sequence[Any]], *, share: WorkerShare
) -> list[Any]:
    """Call a function once for each tuple of arguments, in Ray tasks; return results in order.

    The first failure cancels what has not begun.

    Args:
        work: the function.
        arguments: of each call.
        share: what each task gets.

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
    )(work)
    begun = [task.remote(*each) for each in arguments]
    try:
        return fetched(begun)
    except Exception:
        for each in begun:
            ray.cancel(each)
        raise


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
    if isinstance(error, ray.exceptions.RayError) and not isinstance(
        error, ray.exceptions.RayTaskError
    ):
        return ClusterError(
            f"a process that computes died ({line}); it may have run out of memory: give the same "
            "command again, on a larger machine if need be"
        )
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


def _object_store_bytes() -> int:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(min(8 * 2**30, _OBJECT_STORE_SHARE * pages * page))
