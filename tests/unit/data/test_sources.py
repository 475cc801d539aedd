"""Which images a URI holds: folders, lists, several sources, and the errors of each."""

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pcd_ray.data.image_index import classes_of, relabelled
from pcd_ray.data.sources import INDEX_SCHEMA, is_list, list_images, list_sources, open_index
from pcd_ray.errors import ShardError


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def _tree(root: Path, *names: str) -> str:
    for name in names:
        _image(root / name)
    return str(root)


def _columns(index: pa.Table, *names: str) -> list[tuple[object, ...]]:
    return list(zip(*(index.column(name).to_pylist() for name in names), strict=True))


def test_class_folders_are_labels(tmp_path: Path) -> None:
    index = list_images(_tree(tmp_path, "dog/b.png", "cat/x/a.JPG", "dog/a.jpeg"))
    assert _columns(index, "key", "label") == [
        ("cat/x/a.JPG", 0),
        ("dog/a.jpeg", 1),
        ("dog/b.png", 1),
    ]
    assert classes_of(index) == ("cat", "dog")
    assert index.schema.equals(INDEX_SCHEMA)


def test_entries_say_where_the_bytes_are(tmp_path: Path) -> None:
    index = list_images(_tree(tmp_path, "a.png"))
    path = tmp_path / "a.png"
    assert _columns(index, "uri", "offset", "size") == [(str(path), 0, path.stat().st_size)]


@pytest.mark.parametrize(
    "names", [("a.png", "x/b.png", "y/c.png"), ("only/a.png", "only/b.png"), ("a.png", "b.png")]
)
def test_other_layouts_have_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    index = list_images(_tree(tmp_path, *names))
    assert index.column("label").to_pylist() == [-1] * len(names)
    assert classes_of(index) == ()


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "x/._c.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert list_images(str(tmp_path)).column("key").to_pylist() == ["a.png"]


def test_names_with_spaces_and_signs_are_kept(tmp_path: Path) -> None:
    names = ["a b/100% c#1.png", "who?/1.png", "who?/1.png?.png"]
    folder = _tree(tmp_path / "all?", *names)
    index = list_images(folder)
    assert index.column("key").to_pylist() == names
    assert all(Path(uri).exists() for uri in index.column("uri").to_pylist())
    (tmp_path / "all?" / "list?.txt").write_text("\n".join(names))
    listed = list_images(f"{folder}/list?.txt")
    assert _columns(listed, "key", "uri") == _columns(index, "key", "uri")


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="absent: there is no such folder"):
        list_images(str(tmp_path / "absent"))
    with pytest.raises(ShardError, match="holds no image"):
        list_images(str(tmp_path))


def test_a_list_names_paths_and_classes(tmp_path: Path) -> None:
    _tree(tmp_path, "x/b.png", "x/a.png", "c.png")
    (tmp_path / "list.csv").write_text(
        f"path,label\n# a comment\n\nx/b.png,owl\n x/a.png , ant \n{tmp_path}/c.png\n"
    )
    index = list_images(str(tmp_path / "list.csv"))
    assert _columns(index, "key", "label") == [
        (f"{tmp_path}/c.png", -1),
        ("x/a.png", 0),
        ("x/b.png", 1),
    ]
    assert classes_of(index) == ("ant", "owl")
    assert all(Path(uri).exists() for uri in index.column("uri").to_pylist())


def test_a_list_of_numbers_keeps_them(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text("b.png,7\na.png,3\n")
    index = list_images(str(tmp_path / "list.txt"))
    assert index.column("label").to_pylist() == [3, 7]
    assert len(classes_of(index)) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\nb.png\nz.png\n", "1 of its 3 images are missing, first .*z.png"),
        ("a.png,1,2\n", "'a.png,1,2' has 3 fields"),
        ("# nothing\n\n", "lists no image"),
        ("a.png\na.png\n", "names 'a.png' more than once"),
        ("a.png,99999999\n", "label 99999999 is over"),
    ],
)
def test_a_wrong_list_is_explained(tmp_path: Path, text: str, message: str) -> None:
    _tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ShardError, match=message):
        list_images(str(tmp_path / "list.txt"))


def test_several_sources_share_one_index_and_one_set_of_classes(tmp_path: Path) -> None:
    first = _tree(tmp_path / "one" / "train", "dog/a.png", "ant/a.png")
    second = _tree(tmp_path / "two", "dog/a.png", "bee/b.png")
    third = _tree(tmp_path / "three" / "train", "z.png")
    index = list_sources([first, second, third])
    assert classes_of(index) == ("ant", "bee", "dog")
    assert _columns(index, "key", "label", "source") == [
        ("train.0/ant/a.png", 0, 0),
        ("train.0/dog/a.png", 2, 0),
        ("two/bee/b.png", 1, 1),
        ("two/dog/a.png", 2, 1),
        ("train.2/z.png", -1, 2),
    ]


def test_one_source_keeps_its_keys(tmp_path: Path) -> None:
    uri = _tree(tmp_path, "dog/a.png", "ant/a.png")
    assert list_sources([uri]).equals(open_index(uri), check_metadata=True)


def test_labels_are_compared_by_name(tmp_path: Path) -> None:
    train = open_index(_tree(tmp_path / "train", "ant/a.png", "bee/b.png", "cow/c.png"))
    test = open_index(_tree(tmp_path / "test", "bee/b.png", "cow/c.png", "elk/d.png"))
    assert test.column("label").to_pylist() == [0, 1, 2]
    assert relabelled(test, classes_of(train)).column("label").to_pylist() == [1, 2, -1]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("s3://b/list.csv?region=x", True), ("/a/LIST.TXT", True), ("s3://b/img?x=.csv", False)],
)
def test_a_list_is_known_by_its_name_alone(uri: str, expected: bool) -> None:
    assert is_list(uri) is expected
