"""How this process gets its Ray: it joins a cluster that answers, or starts Ray on this machine.

Ray itself tries an address that nobody answers for a quarter of an hour, in C++ code that lets no
signal through, so the head is asked first; and it says little about a folder that it cannot use.
"""

import atexit
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.job_config import JobConfig

import pcd_ray
from pcd_ray.errors import ClusterError
from pcd_ray.patience import fix_for
from pcd_ray.uris import without_secrets

WAIT_S = 60.0
"""How long a cluster is waited for that does not answer."""
_SAY_EVERY_S = 15.0
_PROBE_S = 5.0  # for one connection, and for one answer
_OBJECT_STORE_SHARE = 0.2  # of this machine's memory, when we start Ray ourselves
_SOCKET_BYTES = 107  # of a path, at most: Linux
_SESSION_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.9")
_SCRATCH_BYTES = 2**20  # written for a trial
_ADDRESS = re.compile(r"auto|(ray://)?(\[[^\[\]\s]+\]|[^\[\]\s:/@]+):\d{1,5}")
_LAST_PORT = 2**16 - 1
_AUTH_MODE = "RAY_AUTH_MODE"
_SHORT_FOLDERS = ("/tmp", "/var/tmp")


class _PackagesAlone(JobConfig):
    """Keeps what lies beside the user, such as a ``random.py``, off the workers' import path.

    Ray puts the script's folder and the working folder first on it, unless a job brings a working
    folder of its own, which this says.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def join_ray(address: str) -> None:
    """Join the cluster at an address, once it answers.

    Args:
        address: ``HOST:PORT`` of the head, ``ray://HOST:PORT`` or ``auto``.

    Raises:
        ClusterError: it has not answered within `WAIT_S`, or it refuses.
    """
    shown = _shown(address)
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={shown!r} is a dashboard's: it takes jobs (ray job submit "
            f"--address {shown} --working-dir . -- python jobs/train.py ...); unset "
            "RAY_ADDRESS to run on this machine"
        )
    if not _ADDRESS.fullmatch(address) or _port_of(address) > _LAST_PORT:
        raise ClusterError(
            f"RAY_ADDRESS={shown!r} is not HOST:PORT, ray://HOST:PORT or auto; correct it, or "
            "unset it to run on this machine"
        )
    _wait_for_head(address, shown)
    try:
        _init(address, is_client=address.startswith("ray://"))
    except Exception as error:  # Ray's own kinds, and bare ones
        why = error if shown == address else type(error).__name__  # its words may hold the address
        raise ClusterError(
            f"the Ray cluster at RAY_ADDRESS={shown!r} answers but cannot be joined ({why}); run "
            "this on one of its nodes, with its versions of Ray and Python"
        ) from error


def start_ray() -> None:
    """Start Ray on this machine; it ends with this process.

    Raises:
        ClusterError: there is no folder for its files, or it does not start.
    """
    # a cluster of one machine that dies with this process needs no token
    no_token = {} if _AUTH_MODE in os.environ else {_AUTH_MODE: "disabled"}
    folder = _temporary_folder()
    try:
        with environment(no_token):
            _init(
                "local",
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                _temp_dir=folder,
            )
    except OSError as error:
        raise ClusterError(f"Ray cannot be started here: {error}; {fix_for(error)}") from error
    except Exception as error:  # Ray's own kinds, and bare ones when it starts too slowly
        raise ClusterError(
            f"Ray cannot be started on this machine ({error}); its logs are in "
            f"{folder or _usual_folder()}/session_latest/logs. If it timed out, the "
            "machine is too busy or short of memory: end other processes, then rerun the same "
            "command"
        ) from error


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


def _init(address: str, *, is_client: bool = False, **options: Any) -> None:
    if not is_client:
        options["job_config"] = _PackagesAlone(_py_driver_sys_path=_package_folder())
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
    if threading.current_thread() is threading.main_thread():
        # Ray's C++ core has meanwhile put a handler before Ray's own in Python: it prints a stack
        # trace, and ends with SIGABRT a process that is not gone 3 s after SIGTERM
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _package_folder() -> list[str]:
    """Return the folder of this package if it is importable from the script's folder alone."""
    path = [entry for entry in sys.path[not sys.flags.safe_path :] if entry]
    found: ModuleSpec | None = None
    for finder in sys.meta_path:
        found = found or finder.find_spec(pcd_ray.__name__, path)
    if found is not None and found.origin == pcd_ray.__file__:
        return []
    return [str(Path(pcd_ray.__file__).parents[1])]


def _port_of(address: str) -> int:
    return 0 if address == "auto" else int(address.rpartition(":")[2])


def _wait_for_head(address: str, shown: str) -> None:
    begun, due = time.monotonic(), 0.0
    while problem := _problem(address, shown):
        waited = time.monotonic() - begun
        if waited >= WAIT_S:
            raise ClusterError(
                f"the Ray cluster at RAY_ADDRESS={shown!r} does not answer: {problem} after "
                f"{waited:.0f} s; start it or correct the address, or unset RAY_ADDRESS to run on "
                "this machine"
            )
        if waited >= due:
            logging.getLogger(__name__).warning(
                "waiting for the Ray cluster at %s: %s; %.0f s", shown, problem, waited
            )
            due = waited + _SAY_EVERY_S
        time.sleep(1.0)


def _problem(address: str, shown: str) -> str:
    """Return why a cluster cannot be joined now; empty: it can.

    Raises:
        ClusterError: it never can.
    """
    scheme, _, place = address.rpartition("://")
    try:
        place = place if scheme else str(canonicalize_bootstrap_address(address))
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except socket.gaierror:
        return "its host name cannot be resolved"
    except TimeoutError:
        return "its host does not respond (is it up, and is the port open in the firewall?)"
    except ConnectionRefusedError:
        return "nothing listens there"
    except ConnectionError as error:  # of auto
        if address != "auto":
            return error.strerror or type(error).__name__
        raise ClusterError(
            "RAY_ADDRESS=auto: no Ray runs on this machine; start it (ray start --head), or unset "
            "RAY_ADDRESS"
        ) from error
    except OSError as error:
        return error.strerror or type(error).__name__
    return _refusal(place, shown, is_client=bool(scheme))


def _refusal(place: str, shown: str, *, is_client: bool) -> str:
    """Return why what listens at a place is no head of Ray that can be joined; empty: it is."""
    channel = init_grpc_channel(place, options=[("grpc.enable_http_proxy", 0)])
    try:
        if is_client:
            grpc.channel_ready_future(channel).result(timeout=_PROBE_S)
        else:
            head: Any = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            head.CheckAlive(CheckAliveRequest(), timeout=_PROBE_S)
    except grpc.FutureTimeoutError:
        return "what listens there is not a Ray client server (its port is usually 10001)"
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(
                f"the Ray cluster at RAY_ADDRESS={shown!r} asks for a token: export "
                "RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token (ray "
                "get-auth-token prints it there)"
            ) from error
        return "what listens there is not the head of a Ray cluster (its port is usually 6379)"
    finally:
        channel.close()
    return ""


def _shown(address: str) -> str:
    if "://" in address:
        return without_secrets(address)
    return without_secrets(f"ray://{address}").removeprefix("ray://")


def _temporary_folder() -> str | None:
    """Return a short folder for Ray's files, deleted at exit; None: where Ray puts them by itself.

    Raises:
        ClusterError: there is no room anywhere, or ``RAY_TMPDIR`` cannot be used.
    """
    usual = _usual_folder()
    problem = _unusable(usual)
    if not problem:
        return None
    if "RAY_TMPDIR" not in os.environ:
        for parent in _SHORT_FOLDERS:
            if not _unusable(parent):
                folder = tempfile.mkdtemp(prefix="ray_", dir=parent)
                atexit.register(_end_with, folder)
                return folder
    raise ClusterError(
        f"Ray cannot keep its files in {usual}: {problem}, or set RAY_TMPDIR to a short path on a "
        "local disk"
    )


def _usual_folder() -> str:
    folder: str = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]
    return folder


def _end_with(folder: str) -> None:
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _unusable(folder: str) -> str:
    """Return why Ray cannot keep its files in a folder, and what helps; empty: it can."""
    if not os.path.isabs(folder):
        return "the path is relative; make it absolute"
    room = _SOCKET_BYTES - _SESSION_BYTES
    if len(os.fsencode(folder)) > room:
        return f"the path is longer than {room} bytes, too long for the sockets in it; shorten it"
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_SCRATCH_BYTES))
    except OSError as error:
        return f"{error.strerror or error}; {fix_for(error)}"
    return ""


def _object_store_bytes() -> int:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(min(8 * 2**30, _OBJECT_STORE_SHARE * pages * page))
