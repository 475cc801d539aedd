"""The image index: one table that says where every image's bytes lie, for folders and shards alike.

N images. Columns of an index: ``key`` (unique), ``label`` (-1: none), ``uri``, ``offset`` and
``size`` (a byte range of the file), ``source`` (number of the collection). Class names lie in the
schema's metadata.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
    ]
)

_CLASSES = b"classes"


def classes_of(index: pa.Table) -> tuple[str, ...]:
    """Return the names that labels stand for; empty when the images have none."""
    return tuple(json.loads((index.schema.metadata or {}).get(_CLASSES, b"[]")))


def with_classes(index: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return the same index under these class names; labels are left as they are."""
    return index.replace_schema_metadata({_CLASSES: json.dumps(list(classes)).encode()})


def relabelled(index: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return the index with its labels counted in ``classes``; names not among them become -1.

    Two folders number their classes each on its own: relabel one by the other's names before their
    labels are compared.
    """
    number = {name: position for position, name in enumerate(classes)}
    table = np.array([*(number.get(name, -1) for name in classes_of(index)), -1], np.int32)
    labels = table[column(index, "label")]  # -1 picks the last entry, which is -1
    position = index.schema.get_field_index("label")
    field = index.schema.field(position)
    return with_classes(index.set_column(position, field, pa.array(labels)), classes)


def column(index: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """Return a numeric column as (N,) numpy values."""
    values: np.ndarray[Any, Any] = index.column(name).to_numpy()
    return values


def repeated_keys(index: pa.Table) -> list[str]:
    """Return the keys that occur more than once, sorted."""
    counts = pc.value_counts(index.column("key"))
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    return sorted(repeated.to_pylist())
