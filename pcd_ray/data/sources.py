"""Which images a URI holds: a folder tree, a bucket prefix, a list file, or packed shards."""

import csv
import functools
import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pcd_ray import storage
from pcd_ray.data.image_index import (
    INDEX_SCHEMA,
    classes_of,
    relabelled,
    repeated_keys,
    with_classes,
)
from pcd_ray.data.ranges import by_filesystem
from pcd_ray.data.shards import MANIFEST, open_shards
from pcd_ray.errors import ShardError, naming
from pcd_ray.uris import OutsideError

__all__ = ["IMAGE_SUFFIXES", "INDEX_SCHEMA", "is_list", "list_images", "list_sources", "open_index"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LIST_SUFFIXES = (".csv", ".txt")
MAX_LABEL = 1_000_000


def open_index(uri: str) -> pa.Table:
    """Return the image index of packed shards, of a folder of images or of a list file.

    Raises:
        ShardError: there is nothing, or what is there is damaged.
    """
    if not is_list(uri) and storage.exists(storage.join(uri, MANIFEST)):
        return open_shards(uri).index
    return list_images(uri)


def list_images(uri: str) -> pa.Table:
    """Return the image index of a folder tree, a bucket prefix or a list file, sorted by key.

    In a folder, first-level subfolders are classes when there are two or more and no image lies
    outside them. A list file has lines ``path`` or ``path,label`` (a name or a number), relative
    to its own folder or absolute; blank lines and lines that start with ``#`` are skipped.

    Raises:
        ShardError: nothing is there, no image is there, or the list is not as described.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise ShardError(f"{uri}: there is no such folder or list; check the path")
    if is_list(uri):
        return _from_list(uri)
    return _from_folder(uri)


def list_sources(uris: Sequence[str]) -> pa.Table:
    """Return one index of several collections, in their order, each sorted by key.

    Keys start with the name of their collection when there are several; labels are counted in the
    sorted union of all class names.

    Raises:
        ShardError: a collection is missing or empty, or a key occurs twice.
    """
    with naming("data.sources"):
        tables = [open_index(uri).select(INDEX_SCHEMA.names) for uri in uris]
    classes = sorted({name for table in tables for name in classes_of(table)})
    names = _source_names(uris)
    parts = []
    for number, table in enumerate(tables):
        if len(tables) > 1:
            table = relabelled(table, classes)
            keys = [f"{names[number]}/{key}" for key in table.column("key").to_pylist()]
            table = table.set_column(0, INDEX_SCHEMA.field("key"), pa.array(keys, pa.string()))
        else:
            classes = list(classes_of(table))
        source = pa.array(np.full(table.num_rows, number, np.int32))
        table = table.set_column(5, INDEX_SCHEMA.field("source"), source)
        parts.append(table.replace_schema_metadata(None))
    return with_classes(pa.concat_tables(parts).combine_chunks(), classes)


def is_list(uri: str) -> bool:
    """Say whether a URI names a list of images rather than a folder."""
    return storage.name_of(uri).lower().endswith(LIST_SUFFIXES)


def _source_names(uris: Sequence[str]) -> list[str]:
    """Return a name for each collection: its last path part, numbered where two agree."""
    names = [storage.name_of(uri) for uri in uris]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name}.{number}" if name in repeated else name for number, name in enumerate(names)]


def _from_folder(uri: str) -> pa.Table:
    base = storage.split_query(uri)[0].rstrip("/") + "/"
    files = {}
    for file in storage.list_files(uri):
        key = storage.split_query(file.uri)[0].removeprefix(base)
        hidden = any(part.startswith(".") for part in key.split("/"))
        if key.lower().endswith(IMAGE_SUFFIXES) and not hidden:
            files[key] = file
    if not files:
        raise ShardError(f"{uri}: holds no image ({', '.join(IMAGE_SUFFIXES)}); check the path")
    keys = sorted(files)
    folders = sorted({key.partition("/")[0] for key in keys if "/" in key})
    labelled = len(folders) >= 2 and all("/" in key for key in keys)
    classes = folders if labelled else []
    number = {name: position for position, name in enumerate(classes)}
    labels = [number.get(key.partition("/")[0], -1) for key in keys]
    listed = [(files[key].uri, files[key].size_bytes) for key in keys]
    return _table(keys, labels, listed, classes)


def _from_list(uri: str) -> pa.Table:
    folder = storage.parent(uri)
    entries = _parse_list(uri)
    entries.sort()
    uris = [_resolve(folder, path) for path, _ in entries]
    labels, classes = _numbered([label for _, label in entries], uri)
    index = _table([path for path, _ in entries], labels, _with_sizes(uri, uris), classes)
    if repeated := repeated_keys(index):
        raise ShardError(
            f"{uri}: names {repeated[0]!r} more than once ({len(repeated)} paths in all); "
            "remove the repeated lines, or give the source a weight instead"
        )
    return index


def _parse_list(uri: str) -> list[tuple[str, str]]:
    """Return (path, label) of each line; the label is "" where there is none."""
    lines = storage.read_text(uri).splitlines()
    kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if kept and kept[0].strip().lower() in ("path", "path,label"):
        del kept[0]
    entries = []
    for row in csv.reader(io.StringIO("\n".join(kept)), skipinitialspace=True):
        if len(row) > 2:
            raise ShardError(
                f"{uri}: line {','.join(row)!r} has {len(row)} fields; "
                "write path or path,label, with quotes round a path that has commas"
            )
        entries.append((row[0].strip(), row[1].strip() if len(row) == 2 else ""))
    if not entries:
        raise ShardError(f"{uri}: lists no image; write one path or path,label per line")
    return entries


def _resolve(folder: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return storage.absolute(path)
    try:
        return storage.inside(folder, path)
    except OutsideError as error:
        raise ShardError(f"{error}, or write the whole path") from error


def _numbered(labels: list[str], uri: str) -> tuple[list[int], list[str]]:
    """Return label numbers and class names: numbers stay as they are, names are sorted."""
    given = {label for label in labels if label}
    if given and all(label.isdigit() for label in given):
        largest = max(int(label) for label in given)
        if largest > MAX_LABEL:
            raise ShardError(f"{uri}: label {largest} is over {MAX_LABEL}; number classes from 0")
        return [int(label or -1) for label in labels], [str(n) for n in range(largest + 1)]
    classes = sorted(given)
    number = {name: position for position, name in enumerate(classes)}
    return [number.get(label, -1) for label in labels], classes


def _with_sizes(list_uri: str, uris: list[str]) -> list[tuple[str, int]]:
    missing, listed = [], []
    for uri, info in zip(uris, _file_infos(uris), strict=True):
        if info.type != pafs.FileType.File:
            missing.append(uri)
        listed.append((uri, int(info.size or 0)))
    if missing:
        raise ShardError(
            f"{list_uri}: {len(missing)} of its {len(uris)} images are missing, "
            f"first {missing[0]}; mend the list"
        )
    return listed


def _file_infos(uris: list[str]) -> list[pafs.FileInfo]:
    """Look files up, a whole bucket in one call."""
    infos: dict[str, pafs.FileInfo] = {}
    for fs, paths in by_filesystem(uris):
        found = storage.attempted(
            next(iter(paths)),
            "looked up",
            functools.partial(fs.get_file_info, list(paths.values())),
        )
        infos.update(zip(paths, found, strict=True))
    return [infos[uri] for uri in uris]


def _table(
    keys: list[str], labels: list[int], listed: list[tuple[str, int]], classes: Sequence[str]
) -> pa.Table:
    columns = {
        "key": keys,
        "label": labels,
        "uri": [uri for uri, _ in listed],
        "offset": [0] * len(keys),
        "size": [size for _, size in listed],
        "source": [0] * len(keys),
    }
    return with_classes(pa.table(columns, schema=INDEX_SCHEMA), classes)
