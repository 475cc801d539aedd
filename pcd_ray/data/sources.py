"""Which images a URI holds: a folder tree, a bucket prefix, a list file, or packed shards."""

import csv
import functools
import os
import re
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
    with_classes,
)
from pcd_ray.data.ranges import by_filesystem
from pcd_ray.data.shards import MANIFEST, open_shards
from pcd_ray.errors import ShardError, naming
from pcd_ray.uris import OutsideError

__all__ = ["IMAGE_SUFFIXES", "INDEX_SCHEMA", "is_list", "list_images", "list_sources", "open_index"]

_JPEG_SUFFIXES = (".jfif", ".jpe", ".jpeg", ".jpg")
IMAGE_SUFFIXES = (".bmp", ".gif", *_JPEG_SUFFIXES, ".png", ".tif", ".tiff", ".webp")
LIST_SUFFIXES = (".csv", ".txt")
MAX_LABEL = 1_000_000
_OF_THE_SYSTEM = (
    *("$recycle.bin", "recycler", "#recycle", "@recycle", "lost+found", "found.000"),
    *("system volume information", "__macosx", "@eadir", "#snapshot"),
)
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|unlabell?ed)"
    r"([-_ ]?(set|split|data|images|\d+))*",
    re.IGNORECASE,
)
"""Names of folders that are splits of a data set where several of them lie side by side."""
_SHOWN_SUFFIXES = 8
_SHOWN_LINE = 80  # characters
_MAX_DIGITS = 20


def open_index(uri: str, notes: list[str] | None = None) -> pa.Table:
    """Return the image index of packed shards, of a folder of images or of a list file.

    Args:
        uri: the shards, the folder or the list.
        notes: gets a line for each thing worth knowing, e.g. how many files were not read.

    Raises:
        ShardError: there is nothing, or what is there is damaged.
    """
    if not is_list(uri) and storage.exists(storage.join(uri, MANIFEST)):
        return open_shards(uri).index
    return list_images(uri, notes)


def list_images(uri: str, notes: list[str] | None = None) -> pa.Table:
    """Return the image index of a folder tree, a bucket prefix or a list file, sorted by key.

    In a folder, first-level subfolders are classes when there are two or more and no image lies
    outside them. If they are splits (``train``, ``val`` ...), the classes are the subfolders of
    these. Hidden files and folders and those of the system (``lost+found`` ...) are skipped.

    A list file has lines ``path`` or ``path,label`` (a name or a number; ``-1`` is no label),
    relative to its own folder or absolute; blank lines and lines that start with ``#`` are skipped.

    Args:
        uri: the folder or the list.
        notes: gets a line for each thing worth knowing, e.g. how many files were not read.

    Raises:
        ShardError: nothing is there, no image is there, or the list is not as described.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise ShardError(f"{uri}: there is no such folder or list; check the path")
    make = _from_list if is_list(uri) else _from_folder
    return make(uri, [] if notes is None else notes)


def list_sources(uris: Sequence[str], notes: list[str] | None = None) -> pa.Table:
    """Return one index of several collections, in their order, each sorted by key.

    Keys start with the name of their collection when there are several; labels are counted in the
    sorted union of all class names.

    Args:
        uris: folders, lists and packed shards.
        notes: as of `list_images`.

    Raises:
        ShardError: a collection is missing or empty, or a key occurs twice.
    """
    with naming("data.sources"):
        tables = [open_index(uri, notes).select(INDEX_SCHEMA.names) for uri in uris]
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
    index = pa.concat_tables(parts).combine_chunks()
    places = index.select(["uri", "offset"]).group_by(["uri", "offset"]).aggregate([]).num_rows
    if notes is not None and places < index.num_rows:
        notes.append(
            f"data.sources: {index.num_rows - places:,} images are named again by another source "
            "and count again; a source's weight does the same without copies"
        )
    return with_classes(index, classes)


def is_list(uri: str) -> bool:
    """Say whether a URI names a list of images rather than a folder."""
    return storage.name_of(uri).lower().endswith(LIST_SUFFIXES)


def _source_names(uris: Sequence[str]) -> list[str]:
    """Return a name for each collection: its last path part, numbered where two agree."""
    names = [storage.name_of(uri) for uri in uris]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name}.{number}" if name in repeated else name for number, name in enumerate(names)]


def _from_folder(uri: str, notes: list[str]) -> pa.Table:
    base = storage.split_query(uri)[0].rstrip("/") + "/"
    listing = storage.listing(uri, skip=_is_hidden)
    files: list[tuple[str, storage.StoredFile]] = []
    other: Counter[str] = Counter()
    for file in listing.files:
        key = storage.split_query(file.uri)[0].removeprefix(base)
        suffix = os.path.splitext(key)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            files.append((key, file))
        else:
            other[f"{suffix or 'no-suffix'} file"] += 1
    left_out = _counted(other, _SHOWN_SUFFIXES) + _counted(listing.left_out)
    if left_out:
        notes.append(f"{uri}: not read: {', '.join(left_out)}")
    if not files:
        there = f"; there are {', '.join(left_out)}" if left_out else ""
        raise ShardError(
            f"{uri}: holds no image ({', '.join(IMAGE_SUFFIXES)}){there}; check the path"
        )
    files.sort(key=lambda pair: pair[0])
    keys = [key for key, _ in files]
    labels, classes = _folder_labels(uri, keys, notes)
    return _table(keys, labels, [(file.uri, file.size_bytes) for _, file in files], classes)


def _is_hidden(name: str) -> bool:
    """Say whether a file or folder is hidden or the system's."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _counted(counts: Counter[str], most: int | None = None) -> list[str]:
    """Return ``12 .heic files`` of each kind, the most common first."""
    shown = counts.most_common(most)
    rest = counts.total() - sum(count for _, count in shown)
    shown += [("other file", rest)] if rest else []
    return [f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in shown]


def _folder_labels(uri: str, keys: list[str], notes: list[str]) -> tuple[list[int], list[str]]:
    """Return the label of each key and the class names, by the folders that images lie in."""
    top = {key.partition("/")[0] for key in keys if "/" in key}
    splits = sorted(filter(_SPLIT.fullmatch, top))
    depth = 1 if len(splits) > 1 or (splits and len(top) == 1) else 0
    if depth:
        parts = [[key.partition("/")[2] for key in keys if key.startswith(f"{s}/")] for s in splits]
        classes = sorted({name for part in parts for name in _class_folders(part)})
        labels_are = f"the {len(classes)} classes are the folders in them"
        notes.append(
            f"{uri}: read as splits and not as classes: {', '.join(splits)}; "
            + (labels_are if classes else "there are no labels")
        )
    else:
        classes = _class_folders(keys)
    number = {name: position for position, name in enumerate(classes)}
    labels = []
    for key in keys:
        *folders, _ = key.split("/")
        inside = len(folders) > depth and (not depth or folders[0] in splits)
        labels.append(number.get(folders[depth], -1) if inside else -1)
    return labels, classes


def _class_folders(keys: list[str]) -> list[str]:
    """Return the first-level folders if they are classes: two or more, and no image outside."""
    folders = sorted({key.partition("/")[0] for key in keys})
    return folders if len(folders) > 1 and all("/" in key for key in keys) else []


def _from_list(uri: str, notes: list[str]) -> pa.Table:
    folder = storage.parent(uri)
    entries = _parse_list(uri, notes)
    entries.sort()
    uris = [_resolve(folder, path) for path, _ in entries]
    labels, classes = _numbered([label for _, label in entries], uri)
    index = _table([path for path, _ in entries], labels, _with_sizes(uri, uris), classes)
    counts = Counter(_real_files(uris))
    if repeated := [file for file, count in counts.items() if count > 1]:
        raise ShardError(
            f"{uri}: names {repeated[0]} more than once ({len(repeated)} files in all); "
            "remove the repeated lines, or give the source a weight instead"
        )
    return index


def _real_files(uris: Sequence[str]) -> list[str]:
    """Return each file in its real folder, whatever spelling or folder link leads there.

    A link to a file counts as a file of its own, as in a folder.
    """
    real_folder = functools.cache(os.path.realpath)
    return [
        uri
        if storage.is_remote(uri)
        else os.path.join(real_folder(os.path.dirname(uri)), os.path.basename(uri))
        for uri in uris
    ]


def _parse_list(uri: str, notes: list[str]) -> list[tuple[str, str]]:
    """Return (path, label) of each line; the label is "" where there is none.

    Each line stands for itself: a quote that is not closed cannot take the next lines with it.
    """
    lines = storage.read_lines(uri, errors="backslashreplace")
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    data = [(number, line) for number, line in kept if not line.lstrip().startswith("#")]
    rows = [_fields(f"{uri}: line {number}", line) for number, line in data]
    if rows and [field.lower() for field in rows[0]] in (["path"], ["path", "label"]):
        del rows[0]
    if not rows:
        raise ShardError(f"{uri}: lists no image; write one path or path,label per line")
    if comments := Counter(["comment line"] * (len(kept) - len(data))):
        notes.append(f"{uri}: not read: {', '.join(_counted(comments))}")
    return [(row[0], row[1] if len(row) == 2 else "") for row in rows]


def _fields(place: str, line: str) -> list[str]:
    """Return the fields of a line, one or two; ``place`` says where it is, for messages."""
    form = "write path or path,label, with quotes around a path that has commas or quotes"
    shown = repr(line if len(line) <= _SHOWN_LINE else line[:_SHOWN_LINE] + "...")
    try:
        (row,) = csv.reader([line], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise ShardError(f"{place}: {shown} is not CSV ({error}); {form}") from error
    if line.count('"') % 2:
        raise ShardError(f"{place}: {shown} has an unmatched quote; {form}")
    if len(row) > 2:
        raise ShardError(f"{place}: {shown} has {len(row)} fields; {form}")
    if not row[0].strip():
        raise ShardError(f"{place}: {shown} has no path; {form}")
    return [field.strip() for field in row]


def _resolve(folder: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return storage.absolute(path)
    try:
        return storage.inside(folder, path)
    except OutsideError as error:
        raise ShardError(f"{error}, or write the whole path") from error


def _numbered(labels: list[str], uri: str) -> tuple[list[int], list[str]]:
    """Return label numbers and class names: numbers stay as they are, names are sorted."""
    labels = ["" if label == "-1" else label for label in labels]
    given = set(labels) - {""}
    if given and all(re.fullmatch("[0-9]+", label) for label in given):
        long = max(given, key=len)
        largest = max(int(label) for label in given) if len(long) <= _MAX_DIGITS else MAX_LABEL + 1
        if largest > MAX_LABEL:
            raise ShardError(f"{uri}: label {long:.40} is over {MAX_LABEL}; number classes from 0")
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
        names: list[str | bytes] = list(paths.values())
        if isinstance(fs, pafs.LocalFileSystem):  # their bytes need not be UTF-8
            names = [os.fsencode(name) for name in names]
        found = storage.attempted(
            next(iter(paths)), "looked up", functools.partial(fs.get_file_info, names)
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
