"""Packed shards: byte ranges are exact, a damaged or hostile folder is refused with its cause."""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pcd_ray import patience, storage
from pcd_ray.data.packing import finished_parts, pack_part, packed_index, plan_packing
from pcd_ray.data.ranges import _ranges_of, by_filesystem
from pcd_ray.data.shard_writer import ShardWriter, publish_shards
from pcd_ray.data.shards import (
    SHARD_SCHEMA,
    PackedSource,
    Shards,
    open_shards,
    read_image_bytes,
    verify_shards,
)
from pcd_ray.data.sources import list_sources, open_index
from pcd_ray.errors import ShardError
from pcd_ray.storage import StorageError


def _folder(root: Path, num_images: int = 12) -> str:
    rng = np.random.default_rng(0)
    for number in range(num_images):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8 + number, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(root)


def _packed(root: Path, *, shard_bytes: int = 1500) -> Shards:
    """Pack a small folder without Ray."""
    source = _folder(root / "images")
    plan = plan_packing(list_sources([source]), seed=0, shard_bytes=shard_bytes, max_pixels=10**6)
    folder = str(root / "packed")
    records = [pack_part(folder, plan, part) for part in range(len(plan.parts))]
    index, files = packed_index(plan, records)
    publish_shards(
        folder,
        index=index,
        sources=[PackedSource(source, 1.0, index.num_rows)],
        files=files,
        num_bad=0,
        plan_hash=plan.plan_hash,
    )
    return open_shards(folder)


def _bytes_of(index: pa.Table) -> dict[str, bytes]:
    columns = [index.column(name).to_pylist() for name in ("uri", "offset", "size")]
    return dict(zip(index.column("key").to_pylist(), read_image_bytes(*columns), strict=True))


def test_every_range_holds_its_images_bytes(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    assert len(shards.files) > 2
    original = open_index(str(tmp_path / "images"))
    assert _bytes_of(shards.index) == _bytes_of(original)
    stored = {
        row["key"]: (row["image"], row["label"], row["width"], row["height"])
        for file in shards.files
        for row in pq.read_table(tmp_path / "packed" / file.file).to_pylist()
    }
    listed = {row["key"]: row for row in shards.index.to_pylist()}
    for key, content in _bytes_of(original).items():
        with Image.open(io.BytesIO(content)) as image:
            assert stored[key] == (content, listed[key]["label"], *image.size)
            assert (listed[key]["width"], listed[key]["height"]) == image.size


def test_shards_are_an_index_like_any_folder(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    index, folder = open_index(shards.uri), open_index(str(tmp_path / "images"))
    assert shards.classes == ("even", "odd")
    names = ["key", "label"]
    assert index.select(names).sort_by("key").equals(folder.select(names))
    assert shards.plan_sources == ((12, 1.0),)


def test_ranges_are_found_among_repeated_and_nested_values() -> None:
    # an image inside another, one repeated, an empty one, and one that looks like a page header
    small = b"\x10\x00\x00\x00" + bytes(range(64)) * 2
    images = [small, b"x" * 9 + small + b"y" * 9, small, b"", small[4:], small, b"\x00" * 400]
    writer = ShardWriter()
    for start in range(0, len(images), 3):
        group = images[start : start + 3]
        count = len(group)
        columns = {
            "key": [str(start + i) for i in range(count)],
            "image": group,
            "label": [0] * count,
            "width": [1] * count,
            "height": [1] * count,
        }
        writer.add(pa.table(columns, schema=SHARD_SCHEMA))
    data, ranges = writer.finish()
    content = data.to_pybytes()
    assert [content[offset : offset + size] for offset, size in ranges] == images
    assert sorted(ranges) == ranges
    assert pq.read_table(pa.BufferReader(data)).column("image").to_pylist() == images


def test_values_of_megabytes_are_found() -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(3_000_000), rng.bytes(10), rng.bytes(1_200_000)]
    columns = {"key": ["a", "b", "c"], "image": images}
    numbers = {name: [1, 2, 3] for name in ("label", "width", "height")}
    writer = ShardWriter()
    writer.add(pa.table({**columns, **numbers}, schema=SHARD_SCHEMA))
    data, ranges = writer.finish()
    content = data.to_pybytes()
    assert [content[offset : offset + size] for offset, size in ranges] == images


def test_the_same_listing_and_seed_give_the_same_bits(tmp_path: Path) -> None:
    one, two = _packed(tmp_path / "one"), _packed(tmp_path / "two")
    assert one.content_hash == two.content_hash
    assert one.files == two.files


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    listing = list_sources([_folder(tmp_path)])
    plans = [plan_packing(listing, seed=s, shard_bytes=10**6, max_pixels=1) for s in (0, 1)]
    keys = [plan.listing.column("key").to_pylist() for plan in plans]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert plans[0].plan_hash != plans[1].plan_hash


def test_parts_never_mix_sources(tmp_path: Path) -> None:
    listing = list_sources([_folder(tmp_path / "a", 5), _folder(tmp_path / "b", 4)])
    plan = plan_packing(listing, seed=0, shard_bytes=10**9, max_pixels=1)
    assert plan.parts == ((0, 5), (5, 9))
    assert plan.listing.column("source").to_pylist() == [0] * 5 + [1] * 4


def test_finished_parts_of_another_plan_are_refused(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    listing = list_sources([str(tmp_path / "images")])
    plan = plan_packing(listing, seed=1, shard_bytes=1500, max_pixels=10**6)
    with pytest.raises(ShardError, match="packed from other images, seed or settings"):
        finished_parts(shards.uri, plan)


def test_an_image_that_cannot_be_read_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _folder(tmp_path / "images")
    listing = list_sources([source])
    (tmp_path / "images" / "odd" / "003.png").unlink()  # gone after it was listed
    (tmp_path / "images" / "even" / "004.png").write_bytes(b"shorter than it was")
    plan = plan_packing(listing, seed=0, shard_bytes=10**6, max_pixels=10**6)
    refused = str(tmp_path / "images" / "odd" / "005.png")
    open_file = os.open

    def opened(path: str, *args: int) -> int:
        if path == refused:  # root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_file(path, *args)

    monkeypatch.setattr(os, "open", opened)
    record = pack_part(str(tmp_path / "packed"), plan, 0)
    assert len(record.images) == 9
    assert sorted(reason.split(" ")[1] for _, reason in record.bad) == ["cannot", "cannot", "ends"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", None, "holds no manifest.json, so it is not packed"),
        ("manifest.json", b"{", "manifest.json: is damaged"),
        ("index.parquet", None, "index.parquet is missing"),
        ("index.parquet", b"PAR1", "index.parquet is not what the manifest says"),
        ("shard-00001.parquet", None, "shard-00001.parquet is missing"),
        ("shard-00001.parquet", b"PAR1", "shard-00001.parquet has 4 bytes"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, damage: bytes | None, message: str) -> None:
    shards = _packed(tmp_path)
    path = Path(shards.uri) / name
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(ShardError, match=message):
        open_shards(shards.uri)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="absent: there is no such folder"):
        open_shards(str(tmp_path / "absent"))


def test_one_changed_bit_is_found_by_verify(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    assert verify_shards(shards.uri).files == shards.files
    path = Path(shards.uri) / shards.files[1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ShardError, match=r"shard-00001\.parquet has changed since it was packed"):
        verify_shards(shards.uri)


def _edit(packed: Shards, **changes: Any) -> None:
    path = Path(packed.uri) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "a/b.parquet", "..", ""])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    shards = _packed(tmp_path)
    _edit(shards, shards=[{"file": name, "images": 12, "bytes": 1, "sha256": ""}])
    with pytest.raises(ShardError, match="outside its folder"):
        open_shards(shards.uri)


def test_an_index_cannot_name_files_outside_the_manifest(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    path = Path(shards.uri) / "index.parquet"
    index = pq.read_table(path)
    names = pa.array(["../secret"] * index.num_rows, pa.string())
    pq.write_table(index.set_column(2, index.schema.field("uri"), names), path)
    _edit(shards, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ShardError, match="names files outside the manifest"):
        open_shards(shards.uri)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99, this package reads 1"),
        ({"num_images": 11}, "the manifest says 11 images"),
        ({"sources": [{"uri": "x"}]}, "is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shards = _packed(tmp_path)
    _edit(shards, **changes)
    with pytest.raises(ShardError, match=message):
        open_shards(shards.uri)


def test_a_weight_is_part_of_the_datas_identity(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    source = shards.sources[0]
    index = pq.read_table(Path(shards.uri) / "index.parquet")
    publish_shards(
        shards.uri,
        index=index,
        sources=[PackedSource(source.uri, 2.0, source.images)],
        files=shards.files,
        num_bad=0,
        plan_hash="",
    )
    assert open_shards(shards.uri).content_hash != shards.content_hash


def test_images_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"abcdef")
    a, b = str(tmp_path / "a"), f"file://{tmp_path / 'b'}"
    read = read_image_bytes([a, b, a, a], [8, 2, 0, 3], [2, 3, 1, 4])
    assert read == [b"89", b"cde", b"0", b"3456"]


def test_a_file_that_is_gone_or_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with pytest.raises(ShardError, match="a: ends before byte 12"):
        read_image_bytes([str(tmp_path / "a")], [8], [4])
    with pytest.raises(ShardError, match="gone: cannot be read"):
        read_image_bytes([str(tmp_path / "gone")], [0], [4])


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (0.0, 0.0))


def _failing(times: int, calls: list[str]) -> Callable[..., bytes]:
    """Return an ``os.pread`` that fails as a flaky disk or network does, ``times`` times."""
    pread = os.pread

    def read(*args: int) -> bytes:
        calls.append("read")
        if len(calls) <= times:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(*args)

    return read


@pytest.mark.usefixtures("quick_retries")
def test_a_read_that_fails_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    monkeypatch.setattr(os, "pread", _failing(2, calls := []))
    assert read_image_bytes([str(tmp_path / "a")], [2], [3]) == [b"234"]
    assert len(calls) == 3


@pytest.mark.usefixtures("quick_retries")
def test_a_read_that_goes_on_failing_is_the_storages_error_and_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _folder(tmp_path / "images")
    plan = plan_packing(list_sources([source]), seed=0, shard_bytes=10**6, max_pixels=10**6)
    folder = tmp_path / "packed"
    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", _failing(3, calls := []))
        with pytest.raises(StorageError, match=r"\.png cannot be read: .*Input/output error"):
            pack_part(str(folder), plan, 0)
    assert len(calls) == 3
    assert not folder.exists()  # no record that a later packing would believe
    record = pack_part(str(folder), plan, 0)
    assert (len(record.images), record.bad) == (12, [])


def test_a_file_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (1e9,))
    (tmp_path / "a").write_bytes(b"in the way of a folder")
    for uri in (f"{tmp_path}/gone", f"{tmp_path}/a/b", str(tmp_path)):
        with pytest.raises(ShardError, match="check that it is still there"):
            read_image_bytes([uri], [0], [4])


def test_nothing_half_written_is_left_behind(tmp_path: Path) -> None:
    shards = _packed(tmp_path)
    names = {storage.name_of(file.uri) for file in storage.list_files(shards.uri)}
    assert not [name for name in names if name.endswith(".part")]


def test_files_of_one_bucket_share_a_connection_whatever_their_names() -> None:
    query = "?region=us-east-1&endpoint_override=127.0.0.1:1&scheme=http"
    uris = [f"s3://bucket/{name}{query}" for name in ("a b.jpg", "x/100%.jpg", "#1.jpg")]
    groups = by_filesystem([*uris, "/local/c.jpg", f"s3://other/d.jpg{query}", uris[0]])
    assert [list(paths.values()) for _, paths in groups] == [
        ["bucket/a b.jpg", "bucket/x/100%.jpg", "bucket/#1.jpg"],
        ["/local/c.jpg"],
        ["other/d.jpg"],
    ]
    assert list(groups[0][1]) == uris


def test_object_stores_are_read_by_range_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # not a LocalFileSystem
    assert _ranges_of("s3://b/a", store, "a", [(8, 2), (0, 3)], "mend it") == [b"89", b"012"]
    for wanted in ((8, 4), (11, 1)):
        with pytest.raises(ShardError, match="a: ends before byte 12"):
            _ranges_of("s3://b/a", store, "a", [wanted], "mend it")
    with pytest.raises(ShardError, match="gone: cannot be read"):
        _ranges_of("s3://b/gone", store, "gone", [(8, 4)], "mend it")
