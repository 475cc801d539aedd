"""Files on local disks and object stores, by URI: ``/path``, ``file://``, ``s3://``, ``gs://``.

Every write is whole or absent: local files are written aside and renamed, objects appear when
their upload completes. What may pass is tried again (`patience`). All functions raise
`StorageError` naming the URI and the cause; a URI that carries credentials is refused.
"""

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from pcd_ray.errors import PcdError
from pcd_ray.local_files import path_on_disk, text_of_path, walk
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
    "Listing",
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
    "listing",
    "name_of",
    "parent",
    "parse_json",
    "read_bytes",
    "read_lines",
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
        text = text_of_path(uri)
        if text != uri:
            raise StorageError(f"{text}: its name is not UTF-8; rename it")
        return pafs.LocalFileSystem(), absolute(uri)
    return attempted(uri, "opened", lambda: _remote_filesystem(uri))


def _remote_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    base, query = split_query(uri)
    scheme, _, path = base.partition("://")
    if scheme not in BUCKETS:
        try:
            fs, path = pafs.FileSystem.from_uri(uri)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the library behind it, such as hf://'s
            raise ValueError(f"{type(error).__name__}: {error}") from error
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
    place = path if is_remote(uri) else os.fsencode(path_on_disk(path))
    return attempted(uri, "looked up", lambda: fs.get_file_info(place))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files under a folder."""

    files: list[StoredFile]
    """Sorted by URI."""
    left_out: Counter[str]
    """Kind -> how many links and special files; none on an object store."""


def list_files(uri: str, *, recursive: bool = True) -> list[StoredFile]:
    """Return the files under a folder, sorted by URI; an absent folder has none."""
    return _listing(uri, recursive=recursive, skip=None, once=False).files


def listing(uri: str, *, skip: Callable[[str], bool]) -> Listing:
    """Return the files under a folder and what was left out; each real folder is read once.

    Args:
        uri: the folder; it has no files if it is absent.
        skip: whether to leave out the files and folders of a name.
    """
    return _listing(uri, recursive=True, skip=skip, once=True)


def _listing(
    uri: str, *, recursive: bool, skip: Callable[[str], bool] | None, once: bool
) -> Listing:
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        top = path_on_disk(path)
        found, left_out = attempted(
            uri, "listed", lambda: walk(top, recursive=recursive, skip=skip, once=once)
        )
        local = [StoredFile(file, at.st_size, at.st_mtime_ns) for file, at in found]
        return Listing(sorted(local, key=lambda file: file.uri), left_out)
    base, query = split_query(uri)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    files = []
    for info in attempted(uri, "listed", lambda: fs.get_file_info(selector)):
        name = info.path[len(path.rstrip("/")) :]
        skipped = skip is not None and any(map(skip, name.split("/")))
        if info.type == pafs.FileType.File and not skipped:
            files.append(StoredFile(base.rstrip("/") + name + query, info.size, info.mtime_ns or 0))
    return Listing(sorted(files, key=lambda file: file.uri), Counter())


def read_bytes(uri: str, *, offset: int = 0, length: int | None = None) -> bytes:
    """Return a file's bytes, or ``length`` of them from ``offset``."""
    fs, path = filesystem(uri)
    place = path if is_remote(uri) else os.fsencode(path_on_disk(path))

    def read() -> bytes:
        with fs.open_input_file(place) as file:
            size = file.size() - offset if length is None else length
            return bytes(file.read_at(size, offset))

    return attempted(uri, "read", read)


def read_text(uri: str, *, errors: str = "strict") -> str:
    """Return a UTF-8 file's text, without a byte order mark.

    Args:
        uri: the file.
        errors: what to do with other bytes, as `bytes.decode` takes it.

    Raises:
        NotTextError: it is not UTF-8.
    """
    data = read_bytes(uri)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotTextError(f"{uri}: is UTF-16 or UTF-32 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotTextError(
            f"{uri}: line {line} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def read_lines(uri: str, *, errors: str = "strict") -> list[str]:
    """Return the lines of a UTF-8 file, without their ends and byte order marks.

    Arguments are those of `read_text`. Marks in the middle are left by files that were joined.

    Raises:
        NotTextError: it is not UTF-8, or a line holds a NUL character.
    """
    text = read_text(uri, errors=errors)
    lines = [line.removeprefix("\ufeff") for line in re.split(r"\r\n|\r|\n", text)]
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise NotTextError(f"{uri}: line {number} has a NUL character; save it as UTF-8 text")
    return lines


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is no JSON, gives a key twice, or is nested too deep to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a key that it gives twice, the first value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} is given twice in one object")
    return values


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


def check_writable(uri: str, *, in_buckets: bool = True) -> None:
    """Write and remove a small file in a folder, or on disks in the nearest one above it.

    Args:
        uri: the folder; it need not exist, and on disks it is not created.
        in_buckets: also try buckets, where pyarrow leaves the folder's marker object behind.

    Raises:
        StorageError: the folder cannot be written to.
    """
    if is_remote(uri) and not in_buckets:
        return
    while not is_remote(uri) and not exists(uri):
        uri = parent(uri)
    probe = join(uri, f".write_check_{uuid.uuid4().hex}")
    write_bytes(probe, b"pcd_ray")
    delete_file(probe)
