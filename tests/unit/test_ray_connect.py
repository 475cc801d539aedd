import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

import pcd_ray
from pcd_ray import ray_connect
from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import connect


@pytest.fixture(autouse=True)
def no_ray_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before in this process
    monkeypatch.setattr(ray_connect, "WAIT_S", 0.0)


def refused_at(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as refused:
        connect()
    return str(refused.value)


def test_the_address_that_takes_jobs_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused_at("http://127.0.0.1:8265", monkeypatch)
    assert "submit --address http://127.0.0.1:8265 " in told


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://AKIA1:hunter2@host:8265", "https://***"),
        ("http://host:8265/?token=hunter2", "http://host:8265/"),
        ("ray://AKIA1:hun/ter2@host:10001", "ray://***"),
        ("AKIA1:hunter2@host:6379", "***"),
    ],
)
def test_a_password_in_an_address_is_not_repeated(
    address: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refused_at(address, monkeypatch)
    assert f"RAY_ADDRESS={shown!r} " in told
    for secret in ("AKIA1", "hun", "ter2"):
        assert secret not in told


@pytest.mark.parametrize(
    "address",
    [
        "host",
        "host:abc",
        ":",
        "ray://host",
        "foo://a:1",
        "a b:1",
        "host:65536",
        "ray://[::1]:99999",
    ],
)
def test_what_is_no_address_is_refused_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_connect, "WAIT_S", 1e6)
    told = refused_at(address, monkeypatch)
    assert f"RAY_ADDRESS={address!r} is not HOST:PORT, ray://HOST:PORT or auto" in told


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "nothing listens there"),
        ("localhost:1", "nothing listens there"),
        ("[::1]:1", "nothing listens there"),
        ("ray://127.0.0.1:1", "nothing listens there"),
        ("no-such-host.invalid:6379", "its host name cannot be resolved"),
        ("127.0.0.1:SILENT", "what listens there is not the head of a Ray cluster"),
        ("ray://127.0.0.1:SILENT", "what listens there is not a Ray client server"),
    ],
)
def test_a_cluster_that_does_not_answer_is_waited_for_in_words_and_then_given_up(
    address: str,
    why: str,
    silent_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray_connect, "WAIT_S", 0.01)
    monkeypatch.setattr(ray_connect, "_PROBE_S", 0.3)
    address = address.replace("SILENT", str(silent_port))
    told = refused_at(address, monkeypatch)
    assert f"RAY_ADDRESS={address!r} does not answer: {why}" in told
    lines = [record for record in caplog.records if record.name == "pcd_ray.ray_connect"]
    assert all(line.levelno == logging.WARNING for line in lines)
    assert all(f"waiting for the Ray cluster at {address}: {why}" in line.message for line in lines)


class Head(NodeInfoGcsServiceServicer):  # type: ignore[misc]
    """What a head answers, with or without asking for a token."""

    asks_for_token = False

    def CheckAlive(self, request: object, context: grpc.ServicerContext) -> object:  # noqa: N802
        del request
        if self.asks_for_token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Missing authentication token")
        return CheckAliveReply()


@pytest.fixture
def head() -> Iterator[tuple[Head, str]]:
    served, server = Head(), grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(served, server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    yield served, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_head_that_answers_is_joined_and_one_that_asks_for_a_token_is_told_so(
    head: tuple[Head, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = []
    monkeypatch.setattr("ray.init", lambda **options: joined.append(options["address"]))
    ray_connect.join_ray(head[1])
    assert joined == [head[1]]
    head[0].asks_for_token = True
    assert "asks for a token: export RAY_AUTH_MODE=token" in refused_at(head[1], monkeypatch)
    assert joined == [head[1]]


def test_a_head_that_answers_and_refuses_is_told_with_its_reason(
    head: tuple[Head, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("Version mismatch: 2.9")

    monkeypatch.setattr("ray.init", fails)
    told = refused_at(head[1], monkeypatch)
    assert "answers but cannot be joined (Version mismatch: 2.9)" in told


def test_a_folder_that_ray_can_use_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert ray_connect._temporary_folder() is None


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("FOLDER/" + "long" * 20, "the path is longer than 41 bytes, too long for the sockets"),
        ("FOLDER/" + "\u00fc" * 20, "the path is longer than 41 bytes, too long for the sockets"),
        ("/dev/null", "Not a directory; a file is where a folder is needed"),
        ("relative", "the path is relative; make it absolute"),
    ],
)
def test_another_folder_is_used_where_ray_could_not_use_its_own(
    folder: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder.replace("FOLDER", "/tmp")
    at_exit: list[str] = []
    monkeypatch.setattr(ray_connect.atexit, "register", lambda _, made: at_exit.append(made))
    monkeypatch.setattr(ray_connect, "_SHORT_FOLDERS", (str(tmp_path / ("x" * 99)), "/tmp"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    made = ray_connect._temporary_folder()
    try:
        assert made is not None
        assert os.path.dirname(made) == "/tmp"
        assert os.stat(made).st_mode & 0o777 == 0o700
        assert at_exit == [made]
    finally:
        os.rmdir(str(made))
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ClusterError, match=f"Ray cannot keep its files in {folder}/ray: {why}"):
        ray_connect._temporary_folder()


def test_a_full_disk_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ray_connect.tempfile, "TemporaryFile", full)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with pytest.raises(ClusterError, match=r"/tmp/ray: No space left on device; free space or ino"):
        ray_connect._temporary_folder()


def test_workers_get_the_package_folder_only_where_they_would_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(pcd_ray.__file__).parents[1])
    others = [entry for entry in sys.path if not (Path(entry) / "pcd_ray").is_dir()]
    monkeypatch.setattr(sys, "path", ["/script", root, *others])
    assert ray_connect._package_folder() == []
    for leads_there in ([root, *others], ["/script", "", *others]):  # of the script, or of -m
        monkeypatch.setattr(sys, "path", leads_there)
        assert ray_connect._package_folder() == [root]
    (tmp_path / "pcd_ray").mkdir()
    (tmp_path / "pcd_ray" / "__init__.py").touch()  # installed, but not what runs
    monkeypatch.setattr(sys, "path", [root, str(tmp_path), *others])
    assert ray_connect._package_folder() == [root]


def test_ray_keeps_folders_off_its_workers_path_for_a_job_with_a_working_folder() -> None:
    """What `_PackagesAlone` relies on; else Ray puts the working folder first."""
    assert ray_connect._PackagesAlone()._runtime_env_has_working_dir()
    assert not ray_connect.JobConfig()._runtime_env_has_working_dir()
