"""Object stores for Ray Train, which asks them itself for its own small files.

A bucket that fails for a moment would end its controller, and the run. This file system does what
Ray asks through `storage`, which tries again. It travels to other processes as a URI and holds no
credentials.
"""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pcd_ray import storage

_Result = TypeVar("_Result")


def patient_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return a file system and the path in it, as `storage.filesystem` does, for Ray to use."""
    fs, path = storage.filesystem(uri)
    if not storage.is_remote(uri):
        return fs, path
    base, query = storage.split_query(uri)
    return pafs.PyFileSystem(_Patient(base.removesuffix(path), query)), path


class _Patient(pafs.FileSystemHandler):  # type: ignore[misc]
    """What pyarrow calls for each operation; paths begin with the bucket."""

    def __init__(self, start: str, query: str) -> None:
        self.place = (start, query)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Patient) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def get_type_name(self) -> str:
        return f"patient+{self.place[0].partition(':')[0]}"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [info for path in paths for info in self._do(path, "looked up", _info_of(path))]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._do(selector.base_dir, "listed", lambda fs: list(fs.get_file_info(selector)))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do(path, "made", lambda fs: fs.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        storage.delete_folder(self._uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._do(
            path,
            "emptied",
            lambda fs: fs.delete_dir_contents(path, missing_dir_ok=missing_dir_ok),
        )

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody empties all buckets")

    def delete_file(self, path: str) -> None:
        storage.delete_file(self._uri(path))

    def move(self, src: str, dest: str) -> None:
        self._do(src, "moved", lambda fs: fs.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._do(src, "copied", lambda fs: fs.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(storage.read_bytes(self._uri(path)))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(storage.read_bytes(self._uri(path)))

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        del metadata
        return pa.PythonFile(_Upload(self._uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("object stores cannot append")

    def _uri(self, path: str) -> str:
        start, query = self.place
        return start + path + query

    def _do(
        self, path: str, action: str, operation: Callable[[pafs.FileSystem], _Result]
    ) -> _Result:
        uri = self._uri(path)
        fs, _ = storage.filesystem(uri)
        return storage.attempted(uri, action, lambda: operation(fs))


def _info_of(path: str) -> Callable[[pafs.FileSystem], list[pafs.FileInfo]]:
    return lambda fs: list(fs.get_file_info([path]))


class _Upload(io.BytesIO):
    """A file that is written whole when it is closed."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            storage.write_bytes(self._uri, data)
