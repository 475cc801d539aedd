"""Stored maps: ranges are exact, what is whole is said, what is damaged is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from pcd_ray.data.map_store import Maps, StoredMaps
from pcd_ray.errors import ShardError

SHAPE, NUM_IMAGES, VIEWS, PER_PART = (3, 2, 5), 7, 4, 6  # 28 records: 4 parts of 6 and one of 4


def maps_at(folder: Path, *, key: str = "k", views: int = VIEWS) -> StoredMaps:
    return StoredMaps(
        uri=str(folder / "maps"),
        key=key,
        shape=SHAPE,
        num_images=NUM_IMAGES,
        views=views,
        records_per_part=PER_PART,
    )


def values() -> Maps:
    random = np.random.default_rng(0)
    return random.normal(size=(VIEWS * NUM_IMAGES, *SHAPE)).astype(np.float16)


def written(folder: Path) -> StoredMaps:
    maps = maps_at(folder)
    for part in range(maps.num_parts):
        records = maps.records(part)
        maps.write_part(part, values()[records.start : records.stop])
    maps.write_manifest(made_of={"seed": 3}, teacher={"sha256": "s", "licence": "MIT"})
    return maps


def test_numpy_reads_the_parts_and_a_range_is_what_it_reads(tmp_path: Path) -> None:
    maps = written(tmp_path)
    files = sorted(Path(maps.uri).glob("*.npy"))
    assert [file.name for file in files] == [f"part-0000{part}.npy" for part in range(5)]
    loaded = np.concatenate([np.load(file) for file in files])
    assert loaded.dtype == np.float16
    assert np.array_equal(loaded, values())
    views = np.array([3, 0, 3, 1, 2, 0])
    rows = np.array([6, 0, 6, 5, 1, 2])  # the last record, the first, one twice
    read = maps.read(views, rows)
    assert np.array_equal(read, loaded.reshape(VIEWS, NUM_IMAGES, *SHAPE)[views, rows])


def test_the_bytes_are_known_before_anything_is_written(tmp_path: Path) -> None:
    maps = maps_at(tmp_path)
    planned = maps.total_bytes
    written(tmp_path)
    sizes = [file.stat().st_size for file in sorted(Path(maps.uri).glob("*.npy"))]
    assert [maps.part_bytes(part) for part in range(5)] == sizes
    assert planned == sum(sizes)


def test_maps_are_whole_with_their_manifest_alone(tmp_path: Path) -> None:
    maps = maps_at(tmp_path)
    assert (maps.manifest(), maps.finished_parts()) == (None, set())
    maps.write_part(2, values()[12:18])
    assert (maps.manifest(), maps.finished_parts()) == (None, {2})
    written(tmp_path)
    manifest = maps.manifest()
    assert manifest is not None
    assert manifest["made_of"] == {"seed": 3}
    assert (manifest["bytes"], manifest["teacher"]["licence"]) == (maps.total_bytes, "MIT")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("part-00001.npy", b"short", r"part-00001\.npy: has 5 bytes instead of 488; delete the"),
        ("part-00001.npy", None, r"part-00001\.npy is missing; delete the folder"),
        ("part-00005.npy", b"", r"part-00005\.npy: is no part of these maps; delete the folder"),
        ("manifest.json", b"{", r"manifest\.json: is damaged .*; delete the folder"),
        ("manifest.json", b"[1]", r"manifest\.json: is damaged .*; delete the folder"),
        ("manifest.json", b"\xff", r"manifest\.json: is damaged .*; delete the folder"),
        ("manifest.json", b"{}", r"says format_version=None, the maps that are wanted have 1; del"),
    ],
)
def test_what_is_damaged_is_refused_with_the_fix(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    maps = written(tmp_path)
    path = Path(maps.uri) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ShardError, match=message):
        maps.manifest()


def test_other_maps_in_the_same_place_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ShardError, match="says key='k', the maps that are wanted have 'other'"):
        maps_at(tmp_path, key="other").manifest()
    with pytest.raises(ShardError, match="says views=4, the maps that are wanted have 3"):
        maps_at(tmp_path, views=3).manifest()


def test_a_part_that_goes_or_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    maps = written(tmp_path)
    last = Path(maps.uri) / "part-00004.npy"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"part-00004\.npy: ends before .* delete the folder"):
        maps.read(np.array([3]), np.array([6]))
    last.unlink()
    with pytest.raises(ShardError, match=r"part-00004\.npy: cannot be read"):
        maps.read(np.array([3]), np.array([6]))


def test_what_a_killed_writer_left_aside_is_no_part(tmp_path: Path) -> None:
    maps = written(tmp_path)
    (Path(maps.uri) / "part-00001.npy.1f.part").write_bytes(b"half")
    (Path(maps.uri) / "head.safetensors").write_bytes(b"a head lies here too")
    assert maps.finished_parts() == set(range(5))
    assert json.dumps(maps.manifest())
