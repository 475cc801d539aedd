import errno
import os
from pathlib import Path

import pytest

from pcd_ray import storage
from pcd_ray.storage import StorageError, StoredFile


def test_what_is_written_is_read(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "new", "folder", "a.bin")
    storage.write_bytes(uri, bytes(range(200)))
    assert storage.read_bytes(uri) == bytes(range(200))
    assert storage.read_bytes(uri, offset=10, length=5) == bytes(range(10, 15))
    assert storage.read_bytes(uri, offset=190) == bytes(range(190, 200))
    storage.write_text(uri, "caf\u00e9\n")
    assert storage.read_text(uri) == "caf\u00e9\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.txt")
    storage.write_text(uri, "old")

    def no_space(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(
        StorageError, match=r"a.txt cannot be written: .*No space left.*; free space"
    ):
        storage.write_text(uri, "new, and longer")
    assert storage.read_text(uri) == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_write_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, replace = str(tmp_path / "a.txt"), os.replace
    storage.write_text(uri, "old")

    def looked_at(source: str, target: str) -> None:
        assert Path(source).read_text() == "new" * 1000  # whole before it takes the name
        assert Path(uri).read_text() == "old"
        replace(source, target)

    monkeypatch.setattr(os, "replace", looked_at)
    storage.write_text(uri, "new" * 1000)
    assert storage.read_text(uri) == "new" * 1000


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / "file" / "run")
    with pytest.raises(StorageError, match=r"file/\S+ cannot be written.*; a file is where a"):
        storage.check_writable(folder)
    storage.check_writable(str(tmp_path / "runs" / "run"))
    assert os.listdir(tmp_path) == ["file"]


def test_each_cause_on_a_local_disk_has_its_own_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to("loop")
    written, read = storage.check_writable, storage.read_bytes
    for name, operation, fix in (
        ("missing/file", read, "correct the path"),
        (".", read, "a folder is where a file is needed: move it, or use another path"),
        ("file/below", read, "a file is where a folder is needed: move it, or use another path"),
        ("file/below", written, "a file is where a folder is needed: move it, or use another path"),
        ("n" * 300, read, "use a shorter name"),
        ("n" * 300, written, "use a shorter name"),
        ("loop", read, "its symbolic links form a loop: correct them"),
    ):
        with pytest.raises(StorageError) as refused:
            operation(str(tmp_path / name))
        assert str(refused.value).rpartition("; ")[2] == fix, name


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EACCES, "change its permissions or owner, or use another path"),
        (errno.EROFS, "the file system is read-only: use another path"),
        (errno.EDQUOT, "the disk quota is used up: delete files, or use another path"),
        (errno.EMFILE, "too many files are open: raise the limit (ulimit -n)"),
    ],
)
def test_causes_that_a_test_cannot_make_are_told_by_their_number(
    number: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StorageError) as refused:
        storage.write_text(str(tmp_path / "a.txt"), "text")
    assert str(refused.value).endswith(f"{os.strerror(number)}; {fix}")


def test_what_is_missing_is_no_error_where_nothing_is_asked_of_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert not storage.exists(missing)
    assert not storage.is_folder(missing)
    assert storage.list_files(missing) == []
    storage.delete_file(missing)
    storage.delete_folder(missing)
    with pytest.raises(StorageError, match="missing cannot be read"):
        storage.read_bytes(missing)


def test_files_are_listed_below_a_folder_and_deleted_with_it(tmp_path: Path) -> None:
    for name, size in [("b", 2), ("sub/a", 1), ("sub/deep/c", 3)]:
        storage.write_bytes(str(tmp_path / "top" / name), b"x" * size)
    top = str(tmp_path / "top")
    assert storage.is_folder(top)
    expected = [
        StoredFile(f"{top}/b", 2),
        StoredFile(f"{top}/sub/a", 1),
        StoredFile(f"{top}/sub/deep/c", 3),
    ]
    assert storage.list_files(top + "/") == storage.list_files(f"file://{top}") == expected
    assert storage.list_files(top, recursive=False) == expected[:1]
    storage.delete_file(f"{top}/sub")  # no file
    assert storage.list_files(top) == expected
    storage.delete_folder(f"{top}/sub")
    storage.delete_folder(f"{top}/b")  # no folder
    assert storage.list_files(top) == expected[:1]


def test_a_listing_follows_each_link_but_not_back(tmp_path: Path) -> None:
    for name in ("all/a", "one/b", "two/c"):
        storage.write_bytes(str(tmp_path / name), b"1")
    links = {"train": "all", "val": "all", "one/to": "../two", "two/fro": "../one", "up": "../.."}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    names = [file.uri.removeprefix(f"{tmp_path}/") for file in storage.list_files(str(tmp_path))]
    assert names == ["all/a", "one/b", "one/to/c", "train/a", "two/c", "two/fro/b", "val/a"]


def test_a_listing_says_when_files_were_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (file,) = storage.list_files(str(tmp_path))
    assert file.modified_ns == (tmp_path / "a").stat().st_mtime_ns


def test_local_uris_mean_the_same_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_text("a/b.txt", "here")
    for uri in ("a/b.txt", f"{tmp_path}/a/b.txt", f"file://{tmp_path}/a/b.txt", "~/a/b.txt"):
        assert storage.absolute(uri) == f"{tmp_path}/a/b.txt"
        assert storage.read_text(uri) == "here"
        assert not storage.is_remote(uri)


def test_remote_uris_keep_their_query_at_the_end() -> None:
    bucket = "s3://bucket/runs?endpoint_override=host:9000&scheme=http"
    joined = storage.join(bucket, "a", "b.pt")
    assert joined == "s3://bucket/runs/a/b.pt?endpoint_override=host:9000&scheme=http"
    assert storage.name_of(joined) == "b.pt"
    assert storage.parent(joined) == storage.join(bucket, "a")
    assert storage.parent(storage.parent(joined)) == bucket
    assert storage.parent("s3://bucket/a/b/") == "s3://bucket/a"
    assert storage.join("s3://bucket/", "a") == "s3://bucket/a"
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert storage.is_remote(bucket)
    assert storage.name_of("runs/a/") == "a"


def test_a_question_mark_in_a_local_name_is_part_of_it(tmp_path: Path) -> None:
    folder = storage.join(str(tmp_path), "what?", "now?")
    assert folder == f"{tmp_path}/what?/now?"
    assert storage.parent(folder) == f"{tmp_path}/what?"
    assert storage.name_of(f"file://{folder}/") == "now?"
    storage.write_text(storage.join(folder, "a?b.txt"), "here")
    for uri in (str(tmp_path), f"{tmp_path}/what?", f"file://{tmp_path}/what?"):
        assert storage.list_files(uri) == [StoredFile(f"{folder}/a?b.txt", 4)]


def test_an_unknown_scheme_is_refused_in_words() -> None:
    with pytest.raises(StorageError, match=r"ftp2://host/a cannot be opened.*; give a path, s3:"):
        storage.exists("ftp2://host/a")


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[{"x": {"a": [], "a": [1]}}]'])
def test_json_that_gives_a_key_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the key 'a' is given twice"):
        storage.parse_json(text)


def test_a_library_that_cannot_open_a_uri_is_an_error_of_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hub:
        @staticmethod
        def from_uri(uri: str) -> None:
            raise RuntimeError(f"no connection for {uri}")  # as hf:// without a network

    monkeypatch.setattr("pyarrow.fs.FileSystem", Hub)
    with pytest.raises(StorageError, match=r"hf://a/b cannot be opened: RuntimeError: no connect"):
        storage.exists("hf://a/b")
