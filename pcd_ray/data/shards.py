"""What a packed shard is: encoded images in Parquet, each at a known byte range of its file.

A folder of shards holds ``shard-00000.parquet`` ..., one ``index.parquet`` (a row per image, with
the byte range of its encoded bytes inside the shard) and ``manifest.json``. A single image is read
by its range alone, so that training can shuffle over all images without reading more than it uses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pcd_ray import storage
from pcd_ray.data.image_index import INDEX_SCHEMA, classes_of
from pcd_ray.data.ranges import read_ranges
from pcd_ray.errors import ShardError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
SHARD_INDEX_SCHEMA = pa.schema(
    [*INDEX_SCHEMA, SHARD_SCHEMA.field("width"), SHARD_SCHEMA.field("height")]
)


@dataclass(frozen=True, slots=True)
class PackedSource:
    """One collection in the shards: its URI, its weight and how many of its images are packed."""

    uri: str
    weight: float
    images: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard: file name inside the folder, images, size in bytes, SHA-256."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shards:
    """Packed shards, checked: what the manifest says, and the image index (N rows).

    Rows of the index are ordered by source; ``content_hash`` is the identity of the data.
    """

    uri: str
    sources: tuple[PackedSource, ...]
    classes: tuple[str, ...]
    num_images: int
    num_bad: int
    files: tuple[ShardFile, ...]
    index_sha256: str
    content_hash: str
    index: pa.Table

    @property
    def plan_sources(self) -> tuple[tuple[int, float], ...]:
        """(images, weight) of each source in index order: what `EpochPlan` takes."""
        return tuple((source.images, source.weight) for source in self.sources)


def read_manifest(uri: str) -> dict[str, Any]:
    """Return a folder's manifest as plain data, its version and file names checked.

    Raises:
        ShardError: the folder is missing, is not packed, or its manifest is damaged.
    """
    if not storage.exists(uri):
        raise ShardError(
            f"{uri}: there is no such folder; pack the images first, or check the path"
        )
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        raise ShardError(f"{uri}: holds no {MANIFEST}, so it is not packed; pack the images first")
    try:
        manifest = dict(storage.parse_json(storage.read_text(path)))
        version, names = manifest["format_version"], [s["file"] for s in manifest["shards"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path}: is damaged ({error!r}); pack the images again") from error
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: has format version {version!r}, this package reads {FORMAT_VERSION}; "
            "pack the images again"
        )
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ShardError(
                f"{path}: names {name!r} outside its folder; do not trust these shards"
            )
    return manifest


def open_shards(uri: str) -> Shards:
    """Return packed shards after a check of the manifest, the index and each shard's size.

    Raises:
        ShardError: the folder is missing, not packed, of another version, or damaged.
    """
    uri = storage.absolute(uri)
    manifest = read_manifest(uri)
    try:
        sources = tuple(PackedSource(**source) for source in manifest["sources"])
        files = tuple(ShardFile(**file) for file in manifest["shards"])
        shards = Shards(
            uri=uri,
            sources=sources,
            classes=tuple(manifest["classes"]),
            num_images=manifest["num_images"],
            num_bad=manifest["num_bad"],
            files=files,
            index_sha256=manifest["index_sha256"],
            content_hash=manifest["content_hash"],
            index=_read_index(uri, manifest["index_sha256"], [file.file for file in files]),
        )
    except (TypeError, KeyError) as error:
        raise ShardError(
            f"{storage.join(uri, MANIFEST)}: is damaged ({error!r}); pack the images again"
        ) from error
    _check_whole(shards)
    return shards


def verify_shards(uri: str) -> Shards:
    """Return packed shards after reading every byte of them against its SHA-256.

    Raises:
        ShardError: as `open_shards`, or a shard's bytes have changed.
    """
    shards = open_shards(uri)
    for file in shards.files:
        data = storage.read_bytes(storage.join(shards.uri, file.file))
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ShardError(f"{shards.uri}: {file.file} has changed since it was packed; {_AGAIN}")
    return shards


_AGAIN = "delete it and run pack again, which makes just what is missing"


def _read_index(uri: str, sha256: str, files: list[str]) -> pa.Table:
    """Return index.parquet with absolute URIs."""
    path = storage.join(uri, INDEX)
    if not storage.exists(path):
        raise ShardError(f"{uri}: {INDEX} is missing; {_AGAIN}")
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(f"{uri}: {INDEX} is not what the manifest says; {_AGAIN}")
    try:
        index = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()
        index.validate(full=True)
        classes_of(index)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ShardError(f"{path}: is damaged ({error}); {_AGAIN}") from error
    if not index.schema.equals(SHARD_INDEX_SCHEMA):
        raise ShardError(f"{path}: has other columns than an index; {_AGAIN}")
    position = index.schema.get_field_index("uri")
    names = pc.unique(index.column("uri"))
    if not set(names.to_pylist()) <= set(files):
        raise ShardError(f"{uri}: {INDEX} names files outside the manifest; {_AGAIN}")
    absolute = pa.array([storage.join(uri, name) for name in names.to_pylist()], pa.string())
    uris = absolute.take(pc.index_in(index.column("uri"), names))
    return index.set_column(position, INDEX_SCHEMA.field("uri"), uris)


def _check_whole(shards: Shards) -> None:
    sizes = {
        storage.name_of(file.uri): file.size_bytes
        for file in storage.list_files(shards.uri, recursive=False)
    }
    for file in shards.files:
        if file.file not in sizes:
            raise ShardError(f"{shards.uri}: {file.file} is missing; run pack again")
        if sizes[file.file] != file.bytes:
            raise ShardError(
                f"{shards.uri}: {file.file} has {sizes[file.file]:,} bytes, the manifest says "
                f"{file.bytes:,}; {_AGAIN}"
            )
    counted = (
        shards.index.num_rows,
        sum(file.images for file in shards.files),
        sum(source.images for source in shards.sources),
    )
    if set(counted) != {shards.num_images}:
        raise ShardError(
            f"{shards.uri}: the manifest says {shards.num_images} images, but index, shards and "
            f"sources have {counted}; pack the images again"
        )


def read_image_bytes(
    uris: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]
) -> list[bytes]:
    """Return the encoded bytes of images, each a byte range of a plain file or of a shard.

    Raises:
        ShardError: a file is missing or shorter than its range.
        StorageError: the storage goes on failing; it may be better another time.
    """
    return read_ranges(uris, offsets, sizes, mend="it has changed, pack the images again")
