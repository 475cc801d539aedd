"""Writes packed shards: builds a shard's bytes, finds its images' byte ranges, publishes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pcd_ray import storage
from pcd_ray.data.image_index import classes_of
from pcd_ray.data.shards import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SHARD_SCHEMA,
    PackedSource,
    ShardFile,
)
from pcd_ray.errors import ShardError

ROW_GROUP_IMAGES = 64
_HEAD = 64  # bytes of an image that are searched for before its digest is compared


class ShardWriter:
    """Builds one shard's bytes, a row group at a time, and finds each image's byte range."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink,
            SHARD_SCHEMA,
            compression="none",  # images are compressed already, and ranges need them verbatim
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
        )
        self._marks: list[tuple[int, bytes, bytes]] = []  # size, first bytes, digest

    def add(self, rows: pa.Table) -> None:
        """Append rows of `SHARD_SCHEMA` as one row group."""
        self._writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        for value in rows.column("image"):
            image = value.as_buffer()
            self._marks.append((image.size, bytes(image[:_HEAD]), _digest(image)))

    def finish(self) -> tuple[pa.Buffer, list[tuple[int, int]]]:
        """Return the file's bytes and the (offset, size) of each image in it.

        Raises:
            ShardError: an image is not in the file byte for byte.
        """
        self._writer.close()
        data = self._sink.getvalue()
        return data, _ranges(data, self._marks)


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _ranges(data: pa.Buffer, marks: Iterable[tuple[int, bytes, bytes]]) -> list[tuple[int, int]]:
    """Find each value in turn: Parquet's PLAIN encoding writes it after its 4-byte length."""
    content, view = memoryview(data), data.to_pybytes()
    ranges: list[tuple[int, int]] = []
    cursor = 0
    for size, head, digest in marks:
        needle = size.to_bytes(4, "little") + head
        while (found := view.find(needle, cursor)) >= 0:
            start = found + 4
            if _digest(content[start : start + size]) == digest:
                break
            cursor = found + 1
        if found < 0:
            raise ShardError(
                f"image {len(ranges)} of a shard is not stored verbatim by pyarrow "
                f"{pa.__version__}; install the version that constraints.txt names"
            )
        ranges.append((start, size))
        cursor = start + size
    return ranges


def content_hash(files: Sequence[ShardFile], sources: Sequence[PackedSource]) -> str:
    """Return the identity of packed data: shard hashes in order, and how sources are weighted."""
    text = json.dumps([[f.sha256 for f in files], [[s.images, s.weight] for s in sources]])
    return hashlib.sha256(text.encode()).hexdigest()


def publish_shards(
    uri: str,
    *,
    index: pa.Table,
    sources: Sequence[PackedSource],
    files: Sequence[ShardFile],
    num_bad: int,
    plan_hash: str,
) -> None:
    """Write index.parquet, then manifest.json: from then on the folder is packed shards.

    Args:
        uri: folder that holds the shard files.
        index: `SHARD_INDEX_SCHEMA` rows ordered by source, ``uri`` relative to the folder; its
            metadata names the classes.
        sources: the collections, in index order.
        files: the shard files.
        num_bad: images left out as unreadable.
        plan_hash: identity of the listing and settings that the shards were packed from.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(uri, INDEX), data)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_images": index.num_rows,
        "num_bad": num_bad,
        "content_hash": content_hash(files, sources),
        "plan_hash": plan_hash,
        "index_sha256": hashlib.sha256(data).hexdigest(),
        "sources": [asdict(source) for source in sources],
        "classes": list(classes_of(index)),
        "shards": [asdict(file) for file in files],
    }
    storage.write_text(storage.join(uri, MANIFEST), json.dumps(manifest, indent=1) + "\n")
