"""Maps of a fixed set of views on storage: float16 parts, and a manifest that is written last.

Records are numbered n = view * N + row of the image index. Part p holds the p-th
`StoredMaps.records_per_part` of them in ``part-00012.npy``, an array (count, D, H, W) that numpy
reads; a record is read by its byte range. ``manifest.json`` says what the maps were made of: a
folder without it is not whole. Parts are whole or absent, so that an interrupted build goes on.

Shapes: N images, B records, D channels, H x W positions.
"""

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcd_ray import __version__, storage
from pcd_ray.data.ranges import read_ranges
from pcd_ray.errors import ShardError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RECORDS_PER_PART = 256
"""Maps of one file at most: what a task makes views for, and what an interruption may lose."""
Maps = np.ndarray[Any, np.dtype[np.float16]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_TYPE = np.dtype("<f2")
_AGAIN = "delete the folder and give the same command again, which makes the maps anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMaps:
    """The place of one set of maps, whole or not, and what it should hold."""

    uri: str
    """Its own folder."""
    key: str
    """Hash of all that the maps follow from."""
    shape: tuple[int, int, int]
    """D, H, W."""
    num_images: int
    """N."""
    views: int
    """Views of each image."""
    records_per_part: int = RECORDS_PER_PART

    @property
    def num_records(self) -> int:
        """How many maps there are."""
        return self.views * self.num_images

    @property
    def num_parts(self) -> int:
        """How many files a whole set has besides the manifest."""
        return -(-self.num_records // self.records_per_part)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.part_bytes(part) for part in range(self.num_parts))

    def records(self, part: int) -> range:
        """Return the numbers of the records that a part holds."""
        start = part * self.records_per_part
        return range(start, min(start + self.records_per_part, self.num_records))

    def part_bytes(self, part: int) -> int:
        """Return the exact size of a part's file."""
        return len(self._header(part)) + len(self.records(part)) * self._record_bytes

    def write_part(self, part: int, maps: Maps) -> int:
        """Write the maps (count, D, H, W) of a part's records; return the bytes.

        Raises:
            StorageError: no space or no permission.
        """
        assert maps.shape == (len(self.records(part)), *self.shape)
        data = self._header(part) + np.ascontiguousarray(maps, _TYPE).tobytes()
        storage.write_bytes(storage.join(self.uri, _name(part)), data)
        return len(data)

    def write_manifest(self, *, made_of: dict[str, Any], teacher: dict[str, Any]) -> None:
        """Declare the maps whole.

        Args:
            made_of: what the key is a hash of.
            teacher: whose maps they are: source, licence, hash.
        """
        content = {
            "format_version": FORMAT_VERSION,
            **self._facts(),
            "bytes": self.total_bytes,
            "teacher": teacher,
            "made_of": made_of,
            "pcd_ray_version": __version__,
        }
        storage.write_text(storage.join(self.uri, MANIFEST), json.dumps(content, indent=1) + "\n")

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of a whole set, each part's size checked; None: it is not whole.

        Raises:
            ShardError: it is damaged, of other maps, or a part is missing or of another size.
        """
        found = _read_manifest(self.uri)
        if found is None:
            return None
        wanted = {"format_version": FORMAT_VERSION, **self._facts()}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ShardError(
                    f"{self.uri}: its {MANIFEST} says {name}={found.get(name)!r}, the maps that "
                    f"are wanted have {value!r}; {_AGAIN}"
                )
        missing = sorted(set(range(self.num_parts)) - self.finished_parts())
        if missing:
            raise ShardError(f"{self.uri}: {_name(missing[0])} is missing; {_AGAIN}")
        return found

    def finished_parts(self) -> set[int]:
        """Return the numbers of the parts that are there.

        Raises:
            ShardError: a file is not what a part of these maps is, by its size.
        """
        found = set()
        names = {_name(part): part for part in range(self.num_parts)}
        for file in storage.list_files(self.uri, recursive=False):
            name = storage.name_of(file.uri)
            if not name.endswith(".npy"):
                continue
            if name not in names:
                raise ShardError(f"{file.uri}: is no part of these maps; {_AGAIN}")
            if file.size_bytes != self.part_bytes(names[name]):
                raise ShardError(
                    f"{file.uri}: has {file.size_bytes:,} bytes instead of "
                    f"{self.part_bytes(names[name]):,}; {_AGAIN}"
                )
            found.add(names[name])
        return found

    def read(self, views: Ints, rows: Ints) -> Maps:
        """Return the maps (B, D, H, W) of some views, (B,), of some rows, (B,).

        Raises:
            ShardError: a part is missing or damaged.
            StorageError: the storage fails.
        """
        parts, places = np.divmod(views * self.num_images + rows, self.records_per_part)
        headers = {part: len(self._header(part)) for part in set(parts.tolist())}
        pairs = list(zip(parts.tolist(), places.tolist(), strict=True))
        read = read_ranges(
            [storage.join(self.uri, _name(part)) for part, _ in pairs],
            [headers[part] + place * self._record_bytes for part, place in pairs],
            [self._record_bytes] * len(pairs),
            mend=f"it is damaged: {_AGAIN}",
        )
        return np.frombuffer(b"".join(read), _TYPE).reshape(-1, *self.shape)

    @property
    def _record_bytes(self) -> int:
        return math.prod(self.shape) * _TYPE.itemsize

    def _facts(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "shape": list(self.shape),
            "num_images": self.num_images,
            "views": self.views,
            "records_per_part": self.records_per_part,
        }

    def _header(self, part: int) -> bytes:
        """Return what numpy writes before a part's numbers."""
        shape = (len(self.records(part)), *self.shape)
        about = {"descr": _TYPE.str, "fortran_order": False, "shape": shape}
        sink = io.BytesIO()
        np.lib.format.write_array_header_1_0(sink, about)
        return sink.getvalue()


def _name(part: int) -> str:
    return f"part-{part:05d}.npy"


def _read_manifest(uri: str) -> dict[str, Any] | None:
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        return dict(storage.parse_json(storage.read_text(path)))
    except (ValueError, TypeError, storage.NotTextError) as error:
        raise ShardError(f"{path}: is damaged ({error}); {_AGAIN}") from error
