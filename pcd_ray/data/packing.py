"""What packing does without Ray: the cut of a listing into shards, one shard's work, its record.

A *part* is the work of one shard. Its record says what became of it, so that an interrupted
packing goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pcd_ray import storage
from pcd_ray.data.decode import MAX_DECODE_S, UnreadableImage, decode_rgb
from pcd_ray.data.image_index import classes_of, column, repeated_keys, with_classes
from pcd_ray.data.shard_writer import ROW_GROUP_IMAGES, ShardWriter
from pcd_ray.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_INDEX_SCHEMA,
    SHARD_SCHEMA,
    ShardFile,
    read_image_bytes,
    read_manifest,
)
from pcd_ray.errors import ShardError
from pcd_ray.seeds import derive_seed

_PARTS = "parts"


@dataclass(frozen=True, slots=True)
class PackPlan:
    """The images in the order in which they are packed, and the rows [start, stop) of each part."""

    listing: pa.Table
    parts: tuple[tuple[int, int], ...]
    max_pixels: int
    plan_hash: str
    """Identity of what the shards will hold; where the sources lie does not matter."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What became of one part."""

    plan_hash: str
    part: int
    file: str
    """Name of its shard; empty when no image of it could be read."""
    bytes: int
    sha256: str
    images: list[list[int]]
    """[place in the part, width, height, offset, size] of each image kept."""
    bad: list[tuple[int, str]]
    """(place in the part, reason) of each image left out."""


def plan_packing(listing: pa.Table, *, seed: int, shard_bytes: int, max_pixels: int) -> PackPlan:
    """Permute a listing inside each source and cut it into parts of about ``shard_bytes``.

    A part never mixes sources, and is a random sample of its own.

    Raises:
        ShardError: a key occurs twice.
    """
    if repeated := repeated_keys(listing):
        raise ShardError(
            f"{len(repeated)} keys occur more than once, first {repeated[0]!r}; "
            "list each image in one source only"
        )
    sources = column(listing, "source")
    order = [
        np.random.default_rng(derive_seed(seed, "pack", int(source))).permutation(
            np.flatnonzero(sources == source)
        )
        for source in np.unique(sources)
    ]
    listing = listing.take(pa.array(np.concatenate(order))).combine_chunks()
    digest = hashlib.sha256(
        json.dumps([FORMAT_VERSION, shard_bytes, max_pixels, classes_of(listing)]).encode()
    )
    for name in ("key", "label", "size", "source"):
        digest.update(json.dumps(listing.column(name).to_pylist()).encode())
    return PackPlan(listing, _cut(listing, shard_bytes), max_pixels, digest.hexdigest())


def _cut(listing: pa.Table, shard_bytes: int) -> tuple[tuple[int, int], ...]:
    sizes, sources = column(listing, "size").tolist(), column(listing, "source").tolist()
    cuts, start, filled = [], 0, 0
    for row, size in enumerate(sizes):
        if row > start and (filled >= shard_bytes or sources[row] != sources[start]):
            cuts.append((start, row))
            start, filled = row, 0
        filled += size
    return (*cuts, (start, len(sizes)))


def finished_parts(folder: str, plan: PackPlan) -> dict[int, PartRecord]:
    """Return the records of parts whose shard lies in the folder in full.

    Raises:
        ShardError: the folder holds shards of other images, seed or settings.
    """
    records = {}
    sizes = {file.uri: file.size_bytes for file in storage.list_files(folder)}
    hashes = {read_manifest(folder).get("plan_hash")} if _has_manifest(folder) else set()
    for part in range(len(plan.parts)):
        uri = _record_uri(folder, part)
        if uri not in sizes:
            continue
        record = _read_record(uri)
        hashes.add(record.plan_hash)
        if not record.file or sizes.get(storage.join(folder, record.file)) == record.bytes:
            records[part] = record
    if hashes - {plan.plan_hash}:
        raise ShardError(
            f"data.shards={folder} holds shards packed from other images, seed or settings; "
            "choose another folder, or delete this one"
        )
    return records


def _has_manifest(folder: str) -> bool:
    return storage.exists(storage.join(folder, MANIFEST))


def _record_uri(folder: str, part: int) -> str:
    return storage.join(folder, _PARTS, f"shard-{part:05d}.json")


def _read_record(uri: str) -> PartRecord:
    try:
        return PartRecord(**storage.parse_json(storage.read_text(uri)))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{uri}: is damaged ({error}); delete it and pack again") from error


def pack_part(
    folder: str, plan: PackPlan, part: int, *, max_decode_s: float = MAX_DECODE_S
) -> PartRecord:
    """Read, check and write one shard, then its record; each file whole or not at all.

    Raises:
        StorageError: the storage goes on failing; nothing is recorded.
    """
    start, stop = plan.parts[part]
    writer = ShardWriter()
    kept: list[list[int]] = []
    bad: list[tuple[int, str]] = []
    for first in range(start, stop, ROW_GROUP_IMAGES):
        rows = plan.listing.slice(first, min(ROW_GROUP_IMAGES, stop - first))
        good, failures = _checked(rows, plan.max_pixels, max_decode_s)
        if good:
            writer.add(pa.Table.from_pylist([row for _, row in good], schema=SHARD_SCHEMA))
        kept += [[first - start + at, row["width"], row["height"]] for at, row in good]
        bad += [(first - start + at, reason) for at, reason in failures]
    content, ranges = writer.finish()
    name = f"shard-{part:05d}.parquet" if kept else ""
    record = PartRecord(
        plan_hash=plan.plan_hash,
        part=part,
        file=name,
        bytes=content.size if kept else 0,
        sha256=hashlib.sha256(content).hexdigest() if kept else "",
        images=[[*image, *where] for image, where in zip(kept, ranges, strict=True)],
        bad=bad,
    )
    if kept:
        storage.write_bytes(storage.join(folder, name), content.to_pybytes())
    storage.write_text(_record_uri(folder, part), json.dumps(asdict(record)))
    return record


def _checked(
    rows: pa.Table, max_pixels: int, max_decode_s: float
) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    """Return (place, shard row) of the images that decode, (place, reason) of the others."""
    good, bad = [], []
    entries = rows.to_pylist()
    for place, (entry, content) in enumerate(zip(entries, _contents(entries), strict=True)):
        try:
            if isinstance(content, ShardError):
                raise UnreadableImage(str(content))
            image = decode_rgb(content, max_pixels=max_pixels, max_decode_s=max_decode_s)
        except UnreadableImage as error:
            bad.append((place, str(error)))
            continue
        width, height = image.size
        own = {"key": entry["key"], "image": content, "label": entry["label"]}
        good.append((place, {**own, "width": width, "height": height}))
    return good, bad


def _contents(entries: Sequence[Mapping[str, Any]]) -> list[bytes | ShardError]:
    """Return each image's bytes, or that its file is gone or cut; one such file costs one image.

    Storage that fails is no image's fault, and is not recorded as one.
    """

    def read(some: Sequence[Mapping[str, Any]]) -> list[bytes]:
        columns = ([entry[name] for entry in some] for name in ("uri", "offset", "size"))
        return read_image_bytes(*columns)

    try:
        return [*read(entries)]
    except ShardError:
        contents: list[bytes | ShardError] = []
        for entry in entries:
            try:
                contents += read([entry])
            except ShardError as error:
                contents.append(error)
        return contents


def packed_index(plan: PackPlan, records: Sequence[PartRecord]) -> tuple[pa.Table, list[ShardFile]]:
    """Return the index of finished parts, ``uri`` relative to the folder, and their files."""
    files = [
        ShardFile(record.file, len(record.images), record.bytes, record.sha256)
        for record in records
        if record.file
    ]
    numbers = np.array(
        [(plan.parts[r.part][0] + place, *rest) for r in records for place, *rest in r.images],
        np.int64,
    ).reshape(-1, 5)
    names = [record.file for record in records for _ in record.images]
    rows, width, height, offset, size = numbers.T
    kept = plan.listing.take(pa.array(rows))
    columns = {
        **{name: kept.column(name) for name in ("key", "label", "source")},
        "uri": pa.array(names, pa.string()),
        "offset": pa.array(offset),
        "size": pa.array(size),
        "width": pa.array(width.astype(np.int32)),
        "height": pa.array(height.astype(np.int32)),
    }
    ordered = [columns[name] for name in SHARD_INDEX_SCHEMA.names]
    index = pa.table(ordered, schema=SHARD_INDEX_SCHEMA)
    return with_classes(index, classes_of(plan.listing)), files


def bad_images(plan: PackPlan, records: Sequence[PartRecord]) -> list[tuple[str, str, str]]:
    """Return (key, uri, reason) of each image that was left out."""
    rows = [(plan.parts[r.part][0] + place, reason) for r in records for place, reason in r.bad]
    if not rows:
        return []
    listed = plan.listing.take(pa.array([row for row, _ in rows])).to_pylist()
    return [
        (entry["key"], entry["uri"], reason)
        for entry, (_, reason) in zip(listed, rows, strict=True)
    ]
