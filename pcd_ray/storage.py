"""Files on local disks and object stores, by URI: ``/path``, ``file://``, ``s3://``, ``gs://``.

Every write is whole or absent: local files are written aside and renamed, objects appear when
their upload completes. What may pass is tried again (`patience`). All functions raise
`StorageError` naming the URI and the cause; a URI that carries credentials is refused.
"""

import json
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from pcd_ray.errors import PcdError
from pcd_ray.patience import fix_for, may_pass, patiently
from pcd_ray.uris import (
    BUCKETS,
    absolute,
    inside,
    is_remote,
    join,
    name_of,
    parent,
    refuse_secrets,
    split_query,
)

__all__ = [
    "GoneError",
    "NotTextError",
    "StorageError",
    "StoredFile",
    "UnavailableError",
    "absolute",
    "attempted",
    "check_writable",
    "delete_file",
    "delete_folder",
    "exists",
    "filesystem",
    "inside",
    "is_folder",
    "is_remote",
    "join",
    "list_files",
    "name_of",
    "parent",
    "parse_json",
    "read_bytes",
    "read_text",
    "split_query",
    "write_bytes",
    "write_text",
]

_Result = TypeVar("_Result")
_S3_OPTIONS = (
    "region",
    "endpoint_override",
    "scheme",
    "allow_bucket_creation",
    "allow_bucket_deletion",
    "force_virtual_addressing",
    "tls_ca_file_path",
)
"""What a URI can say of S3; credentials it cannot."""
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class StorageError(PcdError):
    """A file or folder cannot be read or written."""


class GoneError(StorageError):
    """It is not there, or a folder is where a file should be."""


class UnavailableError(StorageError):
    """The storage has gone on failing; it may be better another time."""


class NotTextError(PcdError):
    """A file that should be text is not."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing."""

    uri: str
    size_bytes: int
    modified_ns: int = field(default=0, compare=False)
    """When it was written last, in ns since 1970; 0: the file system does not say."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow file system of a URI and the path inside it.

    It does not try again by itself, or hardly: that is left to `attempted`. Small objects of S3 are
    written in one request.

    Raises:
        SecretInUriError: the URI carries credentials.
        StorageError: it is no URI of a known file system.
    """
    refuse_secrets(uri)
    if not is_remote(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    return attempted(uri, "opened", lambda: _remote_filesystem(uri))


def _remote_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    base, query = split_query(uri)
    scheme, _, path = base.partition("://")
    if scheme not in BUCKETS:
        fs, path = pafs.FileSystem.from_uri(uri)
        return fs, path
    if scheme != "s3" and "retry_limit_seconds=" not in query:
        query += f"{'&' if query else '?'}retry_limit_seconds=1"  # it would go on for 15 minutes
    # of the bucket alone: keys may hold spaces, % and #, which are no URI
    fs, _ = pafs.FileSystem.from_uri(f"{scheme}://{path.partition('/')[0]}{query}")
    if scheme == "s3":
        _, (options,) = fs.__reduce__()  # what the URI, the environment and the bucket say
        once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
        named = {name: options[name] for name in _S3_OPTIONS}
        fs = pafs.S3FileSystem(**named, retry_strategy=once, allow_delayed_open=True)
    return fs, path.rpartition("@")[2] if path.startswith("anonymous@") else path


def attempted(uri: str, action: str, operation: Callable[[], _Result]) -> _Result:
    """Return what an operation on a file does, tried again while its error may pass.

    Args:
        uri: the file or folder.
        action: what is done to it, for messages: ``read``, ``written``.
        operation: has the same effect when it is done twice.

    Raises:
        GoneError: what should be there is not.
        UnavailableError: the storage went on failing.
        StorageError: it failed for another reason.
    """
    remote = is_remote(uri)
    try:
        return patiently(f"{uri} cannot be {action}", operation, remote=remote)
    except (OSError, ValueError) as error:  # pyarrow raises ArrowInvalid (a ValueError) for URIs
        kind = StorageError
        if isinstance(error, _GONE):
            kind = GoneError
        elif may_pass(error, remote=remote):
            kind = UnavailableError
        fix = fix_for(error, remote=remote)
        raise kind(f"{uri} cannot be {action}: {error}; {fix}") from error


def exists(uri: str) -> bool:
    """Say whether a file or folder is there."""
    return bool(_info(uri).type != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Say whether a URI names a folder (or a bucket prefix with something under it)."""
    return bool(_info(uri).type == pafs.FileType.Directory)


def _info(uri: str) -> pafs.FileInfo:
    fs, path = filesystem(uri)
    return attempted(uri, "looked up", lambda: fs.get_file_info(path))


def list_files(uri: str, *, recursive: bool = True) -> list[StoredFile]:
    """Return the files under a folder, sorted by URI; an absent folder has none."""
    fs, path = filesystem(uri)
    base, query = split_query(uri)
    base = base.rstrip("/") if is_remote(uri) else path
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    infos = attempted(uri, "listed", lambda: fs.get_file_info(selector))
    files = [
        StoredFile(base + info.path[len(path.rstrip("/")) :] + query, info.size, info.mtime_ns or 0)
        for info in infos
        if info.type == pafs.FileType.File
    ]
    return sorted(files, key=lambda file: file.uri)


def read_bytes(uri: str, *, offset: int = 0, length: int | None = None) -> bytes:
    """Return a file's bytes, or ``length`` of them from ``offset``."""
    fs, path = filesystem(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            size = file.size() - offset if length is None else length
            return bytes(file.read_at(size, offset))

    return attempted(uri, "read", read)


def read_text(uri: str) -> str:
    """Return a UTF-8 file's text."""
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise NotTextError(f"{uri} is no UTF-8 text ({error.reason}); give a text file") from error


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is no JSON, or is nested too deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all, creating its folder."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        attempted(uri, "written", lambda: _write_local(path, data))
    else:
        attempted(uri, "written", lambda: _upload(fs, path, data))


def _write_local(path: str, data: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(aside, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def _upload(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write an object on a thread of its own, where nothing can interrupt it, and wait for it.

    pyarrow completes an upload that a Python exception leaves open: a Ctrl-C at the wrong moment
    would put an empty or shortened object in the place of a whole one. Where the store refuses a
    part, pyarrow does not complete it, and the old object stays.
    """

    def upload() -> None:
        with fs.open_output_stream(path) as stream:
            stream.write(data)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(upload).result()


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(uri, text.encode())


def delete_file(uri: str) -> None:
    """Remove a file; an absent one is no error."""
    fs, path = filesystem(uri)

    def delete() -> None:
        if fs.get_file_info(path).type == pafs.FileType.File:
            fs.delete_file(path)

    attempted(uri, "deleted", delete)


def delete_folder(uri: str) -> None:
    """Remove a folder and all in it; an absent one is no error."""
    fs, path = filesystem(uri)

    def delete() -> None:
        if fs.get_file_info(path).type == pafs.FileType.Directory:
            fs.delete_dir(path)

    attempted(uri, "deleted", delete)


def check_writable(uri: str) -> None:
    """Write and remove a small file under a folder.

    Raises:
        StorageError: the folder cannot be written to.
    """
    probe = join(uri, f".write_check_{uuid.uuid4().hex}")
    write_bytes(probe, b"pcd_ray")
    delete_file(probe)
