"""Byte ranges of many files, local or on object stores, read side by side."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs

from pcd_ray import storage
from pcd_ray.errors import ShardError
from pcd_ray.local_files import path_on_disk

REMOTE_READS = 16  # requests in flight: object stores answer slowly but side by side


def by_filesystem(uris: Iterable[str]) -> list[tuple[pafs.FileSystem, dict[str, str]]]:
    """Group URIs by the file system they share: (file system, {URI: path in it})."""
    groups: dict[tuple[str, str], tuple[pafs.FileSystem, dict[str, str]]] = {}
    for uri in dict.fromkeys(uris):
        if not storage.is_remote(uri):
            local = groups.setdefault(("", ""), (pafs.LocalFileSystem(), {}))[1]
            local[uri] = path_on_disk(storage.absolute(uri))
            continue
        base, query = storage.split_query(uri)
        scheme, _, path = base.partition("://")
        place = (f"{scheme}://{path.partition('/')[0]}", query)
        if place not in groups:
            groups[place] = (storage.filesystem(place[0] + query)[0], {})
        groups[place][1][uri] = path
    return list(groups.values())


def read_ranges(
    uris: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], *, mend: str
) -> list[bytes]:
    """Return byte ranges of files, in the order asked for.

    Each file is opened once; object stores are asked for several ranges at a time.

    Args:
        uris: the file of each range.
        offsets: where each begins.
        sizes: bytes of each.
        mend: what to do about a file that ends too early, for the message.

    Raises:
        ShardError: a file is missing or shorter than its range.
        StorageError: the storage goes on failing; it may be better another time.
    """
    wanted: dict[str, list[int]] = {}
    for place, uri in enumerate(uris):
        wanted.setdefault(uri, []).append(place)
    found: list[bytes] = [b""] * len(uris)
    for fs, paths in by_filesystem(wanted):

        def read(uri: str, fs: pafs.FileSystem = fs, paths: dict[str, str] = paths) -> None:
            ranges = [(int(offsets[place]), int(sizes[place])) for place in wanted[uri]]
            parts = _ranges_of(uri, fs, paths[uri], ranges, mend)
            for place, data in zip(wanted[uri], parts, strict=True):
                found[place] = data

        if isinstance(fs, pafs.LocalFileSystem):
            for uri in paths:
                read(uri)
        else:
            with ThreadPoolExecutor(min(REMOTE_READS, len(paths))) as pool:
                list(pool.map(read, paths))
    return found


def _ranges_of(
    uri: str, fs: pafs.FileSystem, path: str, ranges: Sequence[tuple[int, int]], mend: str
) -> list[bytes]:
    try:
        parts = storage.attempted(uri, "read", lambda: _read_once(fs, path, ranges))
    except storage.StorageError as error:
        if not isinstance(error, storage.GoneError) and not _is_refused(error):
            raise
        raise ShardError(
            f"{uri}: cannot be read ({error.__cause__}); check that it is still there and can be "
            "read"
        ) from error
    for (offset, size), part in zip(ranges, parts, strict=True):
        if len(part) != size:
            raise ShardError(f"{uri}: ends before byte {offset + size:,}; {mend}")
    return parts


def _is_refused(error: storage.StorageError) -> bool:
    """Say whether one file of a local disk may not be read."""
    return isinstance(error.__cause__, PermissionError)


def _read_once(fs: pafs.FileSystem, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return each range's bytes, fewer where the file ends before."""
    if isinstance(fs, pafs.LocalFileSystem):
        return _pread(path, ranges)
    with fs.open_input_file(path) as file:
        end = file.size()  # object stores fail when asked for what lies behind it
        return [bytes(file.read_at(size, min(offset, end))) for offset, size in ranges]


def _pread(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    file = os.open(path, os.O_RDONLY)
    try:
        return [os.pread(file, size, offset) for offset, size in ranges]
    finally:
        os.close(file)
