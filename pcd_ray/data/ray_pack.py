"""Ray Data: folders of images -> packed shards. Resumable, and the same bits whatever the cluster.

Each shard is one task that reads, decodes to check, writes the Parquet file and then its record.
A second run takes finished shards as they are. The manifest comes last.
"""

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from pcd_ray import storage
from pcd_ray.config import DataConfig
from pcd_ray.data.image_index import column
from pcd_ray.data.packing import (
    PackPlan,
    PartRecord,
    bad_images,
    finished_parts,
    pack_part,
    packed_index,
    plan_packing,
)
from pcd_ray.data.ray_stream import Batch, stream_chunks
from pcd_ray.data.shard_writer import publish_shards
from pcd_ray.data.shards import PackedSource, ShardFile
from pcd_ray.data.sources import list_sources
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray.errors import ShardError
from pcd_ray.ray_cluster import check_outlives_job

BAD_IMAGES = "bad_images.csv"
SUMMARY = "summary.json"
_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_SHOWN_REASONS = 3


@dataclass(frozen=True, slots=True)
class PackResult:
    """What was packed."""

    shards: str
    """Folder of the shards."""
    num_images: int
    """Images packed."""
    num_bad: int
    """Images left out as unreadable."""
    num_shards: int
    """Shard files."""
    bytes: int
    """Size of the shard files."""
    seconds: float
    """Time it took."""
    reused_shards: int
    """Parts that an earlier run had finished."""
    notes: str = ""
    """What was not read, and how folders were taken; also logged."""

    def summary(self) -> dict[str, Any]:
        """Return plain data for printing and JSON."""
        return asdict(self)


def pack(data: DataConfig, *, seed: int, ready: Callable[[], object] | None = None) -> PackResult:
    """Pack ``data.sources`` into ``data.shards``; Ray must be initialised.

    Unreadable images are left out and listed in ``bad_images.csv``. Run it again after an
    interruption: finished shards are kept. The same images and seed give the same bits.

    Args:
        data: the sources, the folder and the limits.
        seed: decides the order of images in the shards.
        ready: called before the first task, when sources and folder are found good, e.g. to wait
            for nodes.

    Raises:
        ShardError: nothing to pack, repeated keys, another packing's shards in the folder, or more
            unreadable images than ``data.max_bad_fraction``.
        InUseError: another driver packs into the folder.
        StorageError: images cannot be read, or shards written, now; finished shards are kept.
    """
    started = time.monotonic()
    if not data.sources or not data.shards:
        raise ShardError(
            f"data.sources={[s.uri for s in data.sources]} and data.shards={data.shards!r}: "
            "both are needed; say what to pack and where to"
        )
    folder = storage.absolute(data.shards)
    check_outlives_job("data.shards", folder)
    notes: list[str] = []
    listing = list_sources([source.uri for source in data.sources], notes)
    for note in notes:
        _LOG.warning(note)
    plan = plan_packing(
        listing, seed=seed, shard_bytes=data.shard_mib * _MIB, max_pixels=data.max_pixels
    )
    with driving(FolderMarks(folder, "data.shards")):
        records = finished_parts(folder, plan)
        reused = len(records)
        if ready is not None and reused < len(plan.parts):
            ready()
        with closing(_pack_missing(folder, plan, set(records), data)) as packed:
            for record in packed:
                records[record.part] = record
                _check_bad(folder, plan, list(records.values()), data.max_bad_fraction)
        files = _publish(folder, plan, [records[part] for part in sorted(records)], data)
    result = PackResult(
        shards=folder,
        num_images=sum(file.images for file in files),
        num_bad=sum(len(record.bad) for record in records.values()),
        num_shards=len(files),
        bytes=sum(file.bytes for file in files),
        seconds=round(time.monotonic() - started, 3),
        reused_shards=reused,
        notes="; ".join(notes),
    )
    text = json.dumps(result.summary(), indent=1) + "\n"
    storage.write_text(storage.join(folder, SUMMARY), text)
    return result


def _pack_missing(
    folder: str, plan: PackPlan, done: set[int], data: DataConfig
) -> Generator[PartRecord]:
    """Pack the parts that are not done, in a Ray Data task each; yield their records."""
    missing = [part for part in range(len(plan.parts)) if part not in done]
    shared = ray.put(plan)

    def make(chunk: Batch) -> Batch:
        part = missing[int(chunk["id"][0])]
        record = pack_part(folder, ray.get(shared), part, max_decode_s=data.max_decode_s)
        return {"record": np.array([json.dumps(asdict(record))])}

    for block in stream_chunks(make, len(missing), data=data, chunks_ahead=1, num_streams=1):
        yield PartRecord(**json.loads(str(block["record"][0])))


def _check_bad(
    folder: str, plan: PackPlan, records: list[PartRecord], max_bad_fraction: float
) -> None:
    """Stop as soon as more images are unreadable than all that are listed may have."""
    total = plan.listing.num_rows
    if sum(len(record.bad) for record in records) <= max_bad_fraction * total:
        return
    bad = bad_images(plan, records)
    path = _write_bad(folder, bad)
    reasons = "; ".join(f"{key}: {reason}" for key, _, reason in bad[:_SHOWN_REASONS])
    raise ShardError(
        f"{len(bad)} of {total} images are unreadable, {100 * len(bad) / total:.2f}% and over "
        f"data.max_bad_fraction={max_bad_fraction} ({reasons}); all are listed in {path}: mend or "
        "remove them, or raise the limit. Finished shards are kept"
    )


def _write_bad(folder: str, bad: list[tuple[str, str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("key", "uri", "reason"), *bad])
    path = storage.join(folder, BAD_IMAGES)
    storage.write_text(path, text.getvalue())
    return path


def _publish(
    folder: str, plan: PackPlan, records: list[PartRecord], data: DataConfig
) -> list[ShardFile]:
    """Write what stands beside the shards, the manifest last."""
    _check_bad(folder, plan, records, data.max_bad_fraction)  # reused parts count as well
    index, files = packed_index(plan, records)
    counts = np.bincount(column(index, "source"), minlength=len(data.sources)).tolist()
    sources = [
        PackedSource(source.uri, source.weight, images)
        for source, images in zip(data.sources, counts, strict=True)
    ]
    for source in sources:
        if not source.images:
            raise ShardError(f"data.sources: {source.uri} has no readable image; remove it")
    bad = bad_images(plan, records)
    _write_bad(folder, bad)
    publish_shards(
        folder,
        index=index,
        sources=sources,
        files=files,
        num_bad=len(bad),
        plan_hash=plan.plan_hash,
    )
    return files
