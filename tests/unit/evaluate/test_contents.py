"""What a set holds is told by few listings, and only of its own folders on a disk."""

from pathlib import Path

import pytest
from s3_server import s3_server

from pcd_ray import storage
from pcd_ray.evaluate.contents import files_sha256, stored_files


def test_many_class_folders_of_a_bucket_are_listed_together() -> None:
    with s3_server() as server:
        server.client().create_bucket(Bucket="lab")
        root = f"s3://lab/photos{server.query}"
        uris = [storage.join(root, f"class_{number:02d}", "a.png") for number in range(30)]
        for uri in uris:
            storage.write_text(uri, uri)
        server.requests.clear()
        found = stored_files(uris)
        assert len(server.requests) < 10
        assert [file.size_bytes for file in found.values()] == [len(uri) for uri in uris]
        before = files_sha256(uris)
        storage.write_text(uris[3], "other")
        assert files_sha256(uris) != before


def test_on_a_disk_nothing_but_the_folders_themselves_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"disk_{number}" / "a.png" for number in range(20)]
    for path in paths:
        path.parent.mkdir()
        path.write_text("a")
    listed = []
    real = storage.list_files

    def list_files(uri: str, *, recursive: bool = True) -> list[storage.StoredFile]:
        listed.append((uri, recursive))
        return list(real(uri, recursive=recursive))

    monkeypatch.setattr("pcd_ray.evaluate.contents.storage.list_files", list_files)
    assert all(file.size_bytes == 1 for file in stored_files(map(str, paths)).values())
    assert sorted(listed) == sorted((str(path.parent), False) for path in paths)
