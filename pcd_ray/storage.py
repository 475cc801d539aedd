"""Files on local disks and object stores, by URI: ``/path``, ``file://``, ``s3://``, ``gs://``.

Every write is whole or absent: local files are written aside and renamed, objects appear when
their upload completes. All functions raise `StorageError` naming the URI and the cause.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from pcd_ray.errors import PcdError


class StorageError(PcdError):
    """A file or folder cannot be read or written."""


class NotTextError(PcdError):
    """A file that should be text is not."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing."""

    uri: str
    size_bytes: int
    modified_ns: int = field(default=0, compare=False)
    """When it was written last, in ns since 1970; 0: the file system does not say."""


def is_remote(uri: str) -> bool:
    """Say whether a URI names an object store rather than a path of this machine."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return a URI that means the same from any working directory."""
    if is_remote(uri):
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def split_query(uri: str) -> tuple[str, str]:
    """Return a URI without its query, and the query with its ``?``; local files have none."""
    if not is_remote(uri):  # a ? is part of a name
        return uri, ""
    base, mark, query = uri.partition("?")
    return base, mark + query


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI; query parameters (``?endpoint_override=``) stay at the end."""
    base, query = split_query(uri)
    return "/".join([base.rstrip("/"), *parts]) + query


def name_of(uri: str) -> str:
    """Return the last path part of a URI."""
    return split_query(uri)[0].rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """Return the folder that a file or folder lies in; query parameters stay at the end."""
    base, query = split_query(uri)
    return base.rstrip("/").rpartition("/")[0] + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow file system of a URI and the path inside it."""
    with _explained(uri, "opened"):
        if is_remote(uri):
            fs, path = pafs.FileSystem.from_uri(uri)
            return fs, path
        return pafs.LocalFileSystem(), absolute(uri)


def exists(uri: str) -> bool:
    """Say whether a file or folder is there."""
    fs, path = filesystem(uri)
    with _explained(uri, "looked up"):
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Say whether a URI names a folder (or a bucket prefix with something under it)."""
    fs, path = filesystem(uri)
    with _explained(uri, "looked up"):
        return bool(fs.get_file_info(path).type == pafs.FileType.Directory)


def list_files(uri: str, *, recursive: bool = True) -> list[StoredFile]:
    """Return the files under a folder, sorted by URI; an absent folder has none."""
    fs, path = filesystem(uri)
    base, query = split_query(uri)
    base = base.rstrip("/") if is_remote(uri) else path
    with _explained(uri, "listed"):
        selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
        found = [info for info in fs.get_file_info(selector) if info.type == pafs.FileType.File]
    files = [
        StoredFile(base + info.path[len(path.rstrip("/")) :] + query, info.size, info.mtime_ns or 0)
        for info in found
    ]
    return sorted(files, key=lambda file: file.uri)


def read_bytes(uri: str, *, offset: int = 0, length: int | None = None) -> bytes:
    """Return a file's bytes, or ``length`` of them from ``offset``."""
    fs, path = filesystem(uri)
    with _explained(uri, "read"), fs.open_input_file(path) as file:
        size = file.size() - offset if length is None else length
        return bytes(file.read_at(size, offset))


def read_text(uri: str) -> str:
    """Return a UTF-8 file's text."""
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise NotTextError(f"{uri} is no UTF-8 text ({error.reason}); give a text file") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all, creating its folder."""
    fs, path = filesystem(uri)
    with _explained(uri, "written"):
        if not isinstance(fs, pafs.LocalFileSystem):
            with fs.open_output_stream(path) as stream:
                stream.write(data)
            return
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


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(uri, text.encode())


def delete_file(uri: str) -> None:
    """Remove a file; an absent one is no error."""
    fs, path = filesystem(uri)
    with _explained(uri, "deleted"):
        if fs.get_file_info(path).type == pafs.FileType.File:
            fs.delete_file(path)


def delete_folder(uri: str) -> None:
    """Remove a folder and all in it; an absent one is no error."""
    fs, path = filesystem(uri)
    with _explained(uri, "deleted"):
        if fs.get_file_info(path).type == pafs.FileType.Directory:
            fs.delete_dir(path)


def check_writable(uri: str) -> None:
    """Write and remove a small file under a folder.

    Raises:
        StorageError: the folder cannot be written to.
    """
    probe = join(uri, f".write_check_{uuid.uuid4().hex}")
    write_bytes(probe, b"pcd_ray")
    delete_file(probe)


@contextmanager
def _explained(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow raises ArrowInvalid (a ValueError) for URIs
        raise StorageError(
            f"{uri} cannot be {action}: {error}; check the path, the free space and the permissions"
        ) from error
