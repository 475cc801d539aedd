"""Features of labelled images on storage: Parquet parts, and a manifest that is written last.

Each set of features has a folder of its own, named by a hash of all that the features follow from:
``part-00000.parquet`` ... (``key``, ``label``, ``feature``), in the order of the image index, and
``manifest.json``. Parts are whole or absent, so that those of an interrupted run are kept.

Shapes: N images, C channels.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pcd_ray import storage
from pcd_ray.data.image_index import column
from pcd_ray.errors import PcdError, ShardError
from pcd_ray.evaluate.contents import files_sha256
from pcd_ray.evaluate.features import check_finite

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IMAGES_PER_PART = 1024
"""Images whose features are lost at most when a run is interrupted."""
TRANSFORM = "centre crop of 224/256 of the short side, bicubic; mean over the map"
_AGAIN = "delete it and give the same command again, which computes just what is missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRequest:
    """All that the features of a set follow from."""

    network: str
    """Hash of the network: its weights, its architecture, its normalisation."""
    network_sha256: str
    """Of the weights alone."""
    set_sha256: str
    """From `set_sha256`."""
    num_images: int
    """N."""
    size_px: int
    """Side of the crops."""
    images_per_part: int = IMAGES_PER_PART
    transform: str = TRANSFORM

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        text = json.dumps({"format": FORMAT_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One part: its file's name, images, size in bytes, SHA-256."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """Features (N, C) float32 and labels (N,) int64, on the CPU."""

    features: Tensor
    labels: Tensor


def set_sha256(index: pa.Table) -> str:
    """Return a hash of the images of an index: keys, labels, where their bytes lie, since when."""
    found = hashlib.sha256()
    for name in ("key", "uri"):
        found.update("\0".join(index.column(name).to_pylist()).encode())
    found.update(files_sha256(index.column("uri").to_pylist()).encode())
    for name in ("label", "offset", "size"):
        found.update(column(index, name).tobytes())
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class FeatureFolder:
    """The place of one set of features, under a folder that may hold several."""

    parent: str
    request: FeatureRequest

    @property
    def uri(self) -> str:
        """Its URI."""
        return storage.join(self.parent, f"features-{self.request.digest[:16]}")

    @property
    def num_parts(self) -> int:
        """How many parts a whole set has."""
        return -(-self.request.num_images // self.request.images_per_part)

    def rows(self, part: int) -> range:
        """Return the rows of the index whose features a part holds."""
        size = self.request.images_per_part
        return range(part * size, min((part + 1) * size, self.request.num_images))

    def is_whole(self) -> bool:
        """Say whether the manifest is there, says what is asked, and all parts have their sizes."""
        stored = _manifest(self.uri)
        if stored is None or stored["request"] != asdict(self.request):
            return False
        sizes = {storage.name_of(f.uri): f.size_bytes for f in storage.list_files(self.uri)}
        return all(sizes.get(part.file) == part.bytes for part in stored["parts"])

    def kept_parts(self, index: pa.Table) -> dict[int, StoredPart]:
        """Return the parts that are there and hold what they should, by number."""
        names = {storage.name_of(file.uri) for file in storage.list_files(self.uri)}
        kept = {}
        for part in range(self.num_parts):
            if (name := _name(part)) in names:
                data = storage.read_bytes(storage.join(self.uri, name))
                if _holds(data, index, self.rows(part)):
                    kept[part] = _record(name, len(self.rows(part)), data)
        return kept

    def write_part(self, part: int, index: pa.Table, features: Tensor) -> StoredPart:
        """Write the features (n, C) of a part's rows.

        Raises:
            StorageError: no space or no permission.
        """
        rows = self.rows(part)
        mine = index.slice(rows.start, len(rows))
        values = pa.array(features.float().contiguous().numpy().reshape(-1))
        table = pa.table(
            {
                "key": mine.column("key"),
                "label": mine.column("label"),
                "feature": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
            }
        ).replace_schema_metadata(None)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        storage.write_bytes(storage.join(self.uri, _name(part)), sink.getvalue())
        return _record(_name(part), len(rows), sink.getvalue())

    def write_manifest(self, parts: Mapping[int, StoredPart]) -> None:
        """Declare the features whole; ``parts`` are all of them, by number."""
        content = {
            "format_version": FORMAT_VERSION,
            "request": asdict(self.request),
            "parts": [asdict(parts[part]) for part in sorted(parts)],
        }
        storage.write_text(storage.join(self.uri, MANIFEST), json.dumps(content, indent=1) + "\n")


def read_features(uri: str) -> LabelledFeatures:
    """Return the features of a folder whose manifest is there, each part checked by its hash.

    Raises:
        ShardError: there is no manifest, or a part is missing or has changed.
        EvaluationError: a feature is infinite or NaN.
    """
    stored = _manifest(uri)
    if stored is None:
        raise ShardError(f"{uri}: holds no readable {MANIFEST}; give the same command again")
    tables = []
    for part in stored["parts"]:
        path = storage.inside(uri, part.file)
        if not storage.exists(path):
            raise ShardError(f"{path} is missing; give the same command again")
        data = storage.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise ShardError(f"{path} has changed since it was written; {_AGAIN}")
        tables.append(_table(data))
    whole = pa.concat_tables(tables)
    features = torch.from_numpy(np.concatenate([_features(table) for table in tables]))
    check_finite(features)
    return LabelledFeatures(features, torch.from_numpy(column(whole, "label").astype(np.int64)))


def _name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _record(name: str, images: int, data: bytes) -> StoredPart:
    return StoredPart(name, images, len(data), hashlib.sha256(data).hexdigest())


def _manifest(uri: str) -> dict[str, Any] | None:
    """Return a folder's manifest; None: absent, damaged or of another format."""
    try:
        stored = dict(storage.parse_json(storage.read_text(storage.join(uri, MANIFEST))))
        if stored["format_version"] != FORMAT_VERSION:
            return None
        return {**stored, "parts": [StoredPart(**part) for part in stored["parts"]]}
    except (PcdError, ValueError, TypeError, KeyError):
        return None


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def _features(table: pa.Table) -> "np.ndarray[Any, np.dtype[np.float32]]":
    lists = table.column("feature").combine_chunks()
    values: np.ndarray[Any, np.dtype[np.float32]] = lists.flatten().to_numpy()
    return values.reshape(len(lists), -1)


def _holds(data: bytes, index: pa.Table, rows: range) -> bool:
    """Say whether a part is readable and holds the features of these rows."""
    try:
        table = _table(data)
        keys, labels = table.column("key").to_pylist(), table.column("label").to_pylist()
        finite = bool(np.isfinite(_features(table)).all())
    except (OSError, ValueError, KeyError):  # pyarrow's errors are kinds of these
        return False
    mine = index.slice(rows.start, len(rows))
    return finite and (keys, labels) == (
        mine.column("key").to_pylist(),
        mine.column("label").to_pylist(),
    )
