"""Features on storage: what is read is what was written, and nothing else is taken for it."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stored_shards import write_images
from torch import Tensor

from pcd_ray.data.sources import open_index
from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.classify.feature_store import (
    MANIFEST,
    FeatureFolder,
    FeatureRequest,
    StoredPart,
    read_features,
    set_sha256,
)

FEATURES = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def index(tmp_path: Path) -> pa.Table:
    return open_index(write_images(tmp_path / "images"))


def folder_of(tmp_path: Path, index: pa.Table) -> FeatureFolder:
    request = FeatureRequest(
        network="a",
        network_sha256="b",
        set_sha256=set_sha256(index),
        num_images=3,
        size_px=32,
        images_per_part=2,
    )
    return FeatureFolder(str(tmp_path / "features"), request)


def written(
    folder: FeatureFolder, index: pa.Table, features: Tensor = FEATURES
) -> dict[int, StoredPart]:
    parts = {
        part: folder.write_part(part, index, features[list(folder.rows(part))]) for part in (0, 1)
    }
    folder.write_manifest(parts)
    return parts


def test_what_is_read_is_what_was_written(tmp_path: Path, index: pa.Table) -> None:
    folder = folder_of(tmp_path, index)
    assert not folder.is_whole()
    parts = written(folder, index)
    assert folder.is_whole()
    read = read_features(folder.uri)
    assert torch.equal(read.features, FEATURES)
    assert read.labels.tolist() == [0, 0, 1]
    assert folder.kept_parts(index) == parts
    table = pq.read_table(f"{folder.uri}/part-00000.parquet")
    assert table.column("key").to_pylist() == ["left/0.png", "left/1.jpg"]
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 5)


def test_parts_of_other_images_or_labels_or_with_bad_numbers_are_not_kept(
    tmp_path: Path, index: pa.Table
) -> None:
    folder = folder_of(tmp_path, index)
    written(folder, index)
    other = index.set_column(1, index.schema.field("label"), pa.array([0, 0, 2], pa.int32()))
    assert list(folder.kept_parts(other)) == [0]
    assert list(folder.kept_parts(index.take([1, 0, 2]))) == [1]
    written(folder, index, torch.where(FEATURES[2, 1] == FEATURES, torch.nan, FEATURES))
    assert list(folder.kept_parts(index)) == [0]
    with pytest.raises(EvaluationError, match="1 of 3 images have infinite or NaN"):
        read_features(folder.uri)


def test_a_part_that_changed_is_told_by_its_size_or_when_it_is_read(
    tmp_path: Path, index: pa.Table
) -> None:
    folder = folder_of(tmp_path, index)
    written(folder, index)
    path = Path(folder.uri) / "part-00001.parquet"
    good = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in good))
    with pytest.raises(ShardError, match=r"part-00001\.parquet has changed .*; delete it and give"):
        read_features(folder.uri)
    path.write_bytes(good[:-1])
    assert not folder.is_whole()
    assert list(folder.kept_parts(index)) == [0]
    path.unlink()
    with pytest.raises(ShardError, match=r"part-00001\.parquet is missing; give the same command"):
        read_features(folder.uri)


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 1, "parts": [{}]}', "[1]"])
def test_a_manifest_that_is_none_is_as_if_it_were_not_there(
    text: str, tmp_path: Path, index: pa.Table
) -> None:
    folder = folder_of(tmp_path, index)
    written(folder, index)
    (Path(folder.uri) / MANIFEST).write_text(text)
    assert not folder.is_whole()
    assert list(folder.kept_parts(index)) == [0, 1]
    with pytest.raises(ShardError, match=r"holds no readable manifest\.json"):
        read_features(folder.uri)


def test_whatever_features_follow_from_has_its_own_folder(tmp_path: Path, index: pa.Table) -> None:
    folder = folder_of(tmp_path, index)
    changes = (
        {"network": "c"},
        {"network_sha256": "c"},
        {"set_sha256": "c"},
        {"size_px": 40},
        {"transform": "another"},
    )
    requests = [folder.request, *(replace(folder.request, **change) for change in changes)]
    assert len({replace(folder, request=request).uri for request in requests}) == len(requests)


def test_the_hash_of_a_set_is_of_its_images_and_their_order(index: pa.Table) -> None:
    def changed(name: str, values: list[object]) -> pa.Table:
        place = index.schema.get_field_index(name)
        field = index.schema.field(place)
        return index.set_column(place, field, pa.array(values, field.type))

    assert set_sha256(index) == set_sha256(index.slice(0))
    sizes = index.column("size").to_pylist()
    others = [
        index.take([1, 0, 2]),
        index.slice(0, 2),
        changed("label", [0, 1, 1]),
        changed("size", [sizes[0] + 1, *sizes[1:]]),
        changed("key", ["x", "y", "z"]),
        changed("uri", ["x", "y", "z"]),
    ]
    assert len({set_sha256(table) for table in [index, *others]}) == 1 + len(others)


def test_an_image_that_was_written_anew_is_another_set(index: pa.Table) -> None:
    """Same name, same size: what it shows may be another."""
    before = set_sha256(index)
    assert set_sha256(index) == before
    file = Path(index.column("uri")[0].as_py())
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    assert set_sha256(index) != before
