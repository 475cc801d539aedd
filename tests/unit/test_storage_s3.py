"""Object stores: names, endpoints, requests that fail, and what never gets better."""

import hashlib
import io
import json
import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import safetensors.torch
import torch
from s3_server import KEY_ID, SECRET, S3Server, any_request, s3_server, writing

from pcd_ray import patience, storage
from pcd_ray.distill.weights import read_weights
from pcd_ray.storage import GoneError, StorageError, UnavailableError
from pcd_ray.uris import SecretInUriError

BUCKET = "shop"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as served:
        served.client().create_bucket(Bucket=BUCKET)
        yield served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> Iterator[None]:
    monkeypatch.setattr(patience, "PAUSES_S", (0.001,) * 4)
    yield
    server.fail(0)


def test_all_operations_work_with_an_endpoint_in_the_uri_or_in_the_environment(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (f"s3://{BUCKET}/one{server.query}", f"s3://{BUCKET}/two"):
        uri = storage.join(root, "a b", "100% #1.txt")
        storage.write_text(uri, "hello")
        assert storage.read_text(uri) == "hello"
        assert storage.read_bytes(uri, offset=1, length=3) == b"ell"
        listed = storage.list_files(root)
        assert [(file.uri, file.size_bytes) for file in listed] == [(uri, 5)]
        assert storage.read_text(listed[0].uri) == "hello"
        assert storage.is_folder(storage.join(root, "a b"))
        assert not storage.exists(storage.join(root, "nothing"))
        storage.check_writable(root)
        storage.delete_file(uri)
        storage.write_text(uri, "again")
        storage.delete_folder(root)
        assert storage.list_files(root) == []
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")


def test_a_bucket_in_which_no_trace_may_stay_is_not_written_to(server: S3Server) -> None:
    server.client().create_bucket(Bucket="untouched")
    storage.check_writable(f"s3://untouched/runs/a{server.query}", in_buckets=False)
    assert "Contents" not in server.client().list_objects_v2(Bucket="untouched")


def test_weights_are_read_by_way_of_a_temporary_file_that_goes_again(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = f"s3://{BUCKET}/weights{server.query}"
    tensors = {"conv.weight": torch.rand(100, 100)}
    for data in (safetensors.torch.save(tensors), io_bytes(tensors)):
        storage.write_bytes(uri, data)
        server.fail(2)
        file = read_weights(uri)
        assert list(tmp_path.iterdir()) == []
        assert torch.equal(file.tensors["conv.weight"], tensors["conv.weight"])
        assert file.sha256 == hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="set TMPDIR to a folder that is writable"):
        read_weights(uri)


def io_bytes(content: object) -> bytes:
    """What torch saves of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_google_uris_are_understood_and_their_client_is_told_not_to_wait_for_long() -> None:
    for account in ("", "anonymous@"):
        uri = f"gs://{account}bucket/a b/c.pt?endpoint_override=127.0.0.1:1&scheme=http"
        fs, path = storage.filesystem(uri)
        assert isinstance(fs, pafs.GcsFileSystem)
        assert path == "bucket/a b/c.pt"


def operations(uri: str) -> dict[str, Callable[[], Any]]:
    return {
        "read": lambda: storage.read_text(uri),
        "looked up": lambda: storage.exists(uri),
        "listed": lambda: storage.list_files(storage.parent(uri)),
        "written": lambda: storage.write_text(uri, "here"),
        "deleted": lambda: storage.delete_file(uri),
    }


@pytest.mark.parametrize("failure", ["busy", "broken", "dropped"])
@pytest.mark.parametrize("action", ["read", "looked up", "listed", "written", "deleted"])
def test_what_fails_for_a_moment_is_tried_again_with_a_line_each_time(
    server: S3Server, caplog: pytest.LogCaptureFixture, action: str, failure: str
) -> None:
    uri = f"s3://{BUCKET}/flaky/file{server.query}"
    storage.write_text(uri, "here")
    expected = {"read": "here", "looked up": True}
    server.fail(3, failure)
    with caplog.at_level(logging.WARNING):
        result = operations(uri)[action]()
    assert result == expected.get(action, result)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == server.failed == 3, "nobody else tries again"
    for number, line in enumerate(lines, 1):
        assert f"cannot be {action}: " in line
        assert f"attempt {number} of 5, trying again in 0.0 s" in line
        assert "\n" not in line
    assert storage.exists(uri) == (action != "deleted")


@pytest.mark.parametrize("action", ["read", "looked up", "listed", "written", "deleted"])
def test_a_store_that_goes_on_failing_is_unavailable_and_one_that_refuses_is_not_asked_again(
    server: S3Server, caplog: pytest.LogCaptureFixture, action: str
) -> None:
    uri = f"s3://{BUCKET}/refused/file{server.query}"
    storage.write_text(uri, "here")
    server.fail(float("inf"))
    with pytest.raises(UnavailableError, match=f"cannot be {action}: .*check the storage, then"):
        operations(uri)[action]()
    assert server.failed == 5
    server.fail(float("inf"), "denied")
    caplog.clear()
    with pytest.raises(StorageError, match=r"(?s)ACCESS_DENIED.*access is denied") as refused:
        operations(uri)[action]()
    assert not isinstance(refused.value, UnavailableError)
    assert server.failed == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("failure", "fix_of_writing", "fix_of_reading"),
    [
        ("denied", "access is denied: check", "access is denied: check"),
        ("expired", "the session token has expired: renew", "the session token has expired ("),
        ("key", "the credentials are wrong: correct", "access is denied: check"),
        ("secret", "the credentials are wrong: correct", "access is denied: check"),
        ("region", "the bucket is in another region: set", "the bucket is in another region: set"),
        (
            "region in signature",
            "the bucket is in another region: set",
            "the session token has expired (renew it), or the bucket is in another region (set ",
        ),
        ("quota", "the storage is full: delete", "access is denied: check"),
    ],
)
def test_each_refusal_of_a_store_has_its_own_fix(
    server: S3Server, failure: str, fix_of_writing: str, fix_of_reading: str
) -> None:
    """A request for what is known of an object is answered without a reason, with a number."""
    uri = f"s3://{BUCKET}/refused/file{server.query}"
    server.fail(float("inf"), failure)
    with pytest.raises(StorageError) as refused:
        storage.write_text(uri, "text")
    assert f"; {fix_of_writing}" in str(refused.value)
    with pytest.raises(StorageError) as refused:
        storage.read_text(uri)
    assert f"; {fix_of_reading}" in str(refused.value)


@pytest.mark.parametrize(
    ("endpoint", "fix"),
    [
        ("127.0.0.1:1", "the endpoint does not answer: "),
        ("no-such-host.invalid:9000", "there is no such host: "),
    ],
)
@pytest.mark.parametrize("bucket", ["s3://bucket", "gs://anonymous@bucket"])
def test_an_endpoint_that_is_not_there_is_told_from_a_host_that_is_not(
    bucket: str, endpoint: str, fix: str
) -> None:
    with pytest.raises(UnavailableError) as failed:
        storage.read_text(f"{bucket}/a?endpoint_override={endpoint}&scheme=http")
    assert f"; {fix}" in str(failed.value)


def test_what_is_not_there_is_not_waited_for(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GoneError, match="nothing"):
        storage.read_bytes(f"s3://{BUCKET}/nothing{server.query}")
    with pytest.raises(StorageError, match=r"NO_SUCH_BUCKET.*; create the bucket"):
        storage.write_text(f"s3://no-bucket/a{server.query}", "x")
    with pytest.raises(StorageError, match="Unexpected query parameter"):
        storage.exists(f"s3://{BUCKET}/a{server.query}&speed=high")
    assert not caplog.records


def test_pauses_grow_and_are_drawn(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (1.0, 2.0, 4.0, 8.0))
    waited: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    server.fail(float("inf"))
    for _ in range(2):
        with pytest.raises(UnavailableError):
            storage.exists(f"s3://{BUCKET}/a{server.query}")
    for number, wait_s in enumerate(waited):
        assert 0.5 <= wait_s / 2 ** (number % 4) <= 1.5
    assert waited[:4] != waited[4:]


def test_a_refused_part_of_a_large_upload_leaves_the_old_object(server: S3Server) -> None:
    uri = f"s3://{BUCKET}/large{server.query}"
    storage.write_text(uri, "old")
    large = bytes(range(256)) * 90_000  # three parts

    def second_part(environ: dict[str, Any]) -> bool:
        return "partNumber=2" in environ["QUERY_STRING"]

    server.fail(float("inf"), which=second_part)
    with pytest.raises(UnavailableError):
        storage.write_bytes(uri, large)
    assert storage.read_text(uri) == "old"
    server.fail(2, which=second_part)
    storage.write_bytes(uri, large)
    assert storage.read_bytes(uri) == large


@pytest.fixture
def ctrl_c_counts() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt also where the tests are a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_counts")
def test_an_interruption_in_the_middle_of_an_upload_leaves_a_whole_object(
    server: S3Server,
) -> None:
    """Pyarrow would complete the upload with what was written until then: with nothing."""
    uri = f"s3://{BUCKET}/interrupted{server.query}"
    large = bytes(range(256)) * 45_000  # two parts

    def press_ctrl_c(environ: dict[str, Any]) -> bool:
        if environ["REQUEST_METHOD"] == "POST":  # the upload begins, or is completed
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    server.fail(1, which=press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(uri, large)
    server.fail(0)
    assert not storage.exists(uri) or storage.read_bytes(uri) == large


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://{KEY_ID}:{SECRET}@bucket/a",
        f"s3://{KEY_ID}@bucket/a",
        f"gs://bucket/a?access_token={SECRET}",
        f"s3://bucket/a?endpoint_override=h:1&access_key={KEY_ID}&secret_key={SECRET}",
        f"s3://bucket/a?X-Amz-Signature={SECRET}",
        f"s3://bucket/a?endpoint_override=me:{SECRET}@host",
    ],
)
def test_a_uri_that_carries_credentials_is_refused_without_repeating_them(uri: str) -> None:
    with pytest.raises(SecretInUriError, match="give it by the environment") as refused:
        storage.read_bytes(uri)
    assert SECRET not in str(refused.value)
    assert KEY_ID not in str(refused.value)
    assert refused.value.__cause__ is None


def test_credentials_stand_in_no_error_and_no_line(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"s3://{BUCKET}/a{server.query}"
    words = []
    for failure in ("busy", "dropped", "denied"):
        server.fail(float("inf"), failure, any_request)
        for operation in operations(uri).values():
            with pytest.raises(StorageError) as error:
                operation()
            words.append(str(error.value))
    text = json.dumps([*words, *(record.getMessage() for record in caplog.records)])
    assert "cannot be" in text
    assert SECRET not in text
    assert KEY_ID not in text


def test_a_local_disk_is_tried_again_only_when_it_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.write_text(f"{tmp_path}/file/a", "x")
    with pytest.raises(GoneError):
        storage.read_bytes(f"{tmp_path}/none")
    assert not caplog.records


def test_writes_alone_may_fail(server: S3Server) -> None:
    server.fail(2, which=writing)
    uri = f"s3://{BUCKET}/half{server.query}"
    assert not storage.exists(uri)
    storage.write_text(uri, "x")
    assert server.failed == 2
