"""Which images a URI holds: folders, lists, several sources, and the errors of each."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pcd_ray.data.decode import decode_rgb
from pcd_ray.data.image_index import classes_of, relabelled
from pcd_ray.data.shards import read_image_bytes
from pcd_ray.data.sources import INDEX_SCHEMA, is_list, list_images, list_sources, open_index
from pcd_ray.errors import PcdError, ShardError


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


def _keys(index: pa.Table) -> list[str]:
    keys: list[str] = index.column("key").to_pylist()
    return keys


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (("train/cat/a.png", "train/dog/b.png", "val/dog/c.png"), ("cat", "dog"), [0, 1, 1]),
        (("test/dog/a.png", "train/cat/a.png", "train/dog/b.png"), ("cat", "dog"), [1, 0, 1]),
        (("train/cat/a.png", "train/dog/b.png"), ("cat", "dog"), [0, 1]),
        (("train/a.png", "val/b.png"), (), [-1, -1]),
        (("train2017/a.png", "val2017/b.png"), (), [-1, -1]),
        (
            ("Train/cat/a.png", "Train/dog/b.png", "more/cat/c.png", "valid/d.png"),
            ("cat", "dog"),
            [0, 1, -1, -1],
        ),
        (
            ("train/n1/images/a.png", "train/n2/images/b.png", "val/images/c.png"),
            ("n1", "n2"),
            [0, 1, -1],
        ),
        (("bus/a.png", "cat/b.png", "train/c.png"), ("bus", "cat", "train"), [0, 1, 2]),
    ],
)
def test_splits_are_no_classes(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...], labels: list[int]
) -> None:
    """A single folder named like a split, among others, is a class: trains are photographed too."""
    notes: list[str] = []
    index = list_images(_tree(tmp_path, *names), notes)
    assert _columns(index, "key", "label") == list(zip(names, labels, strict=True))
    assert classes_of(index) == classes
    assert ["as splits and not as classes" in note for note in notes] == [True] * (
        "bus" not in classes
    )


SYSTEM = ("lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "@eaDir", ".Trash")


def test_hidden_and_system_folders_are_left_out(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "x/._c.png")
    _tree(tmp_path, *(f"{folder}/c.png" for folder in SYSTEM), "x/lost+found/d.png")
    assert _keys(list_images(str(tmp_path))) == ["a.png"]


def test_what_is_not_read_is_counted_by_suffix(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png")
    for name in ("b.jfif", "c.JPE", "d.heic", "x/e.HEIC", "f.avif", "g", ".h.heic"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"...")
    notes: list[str] = []
    assert _keys(list_images(str(tmp_path), notes)) == ["a.png", "b.jfif", "c.JPE"]
    assert notes == [f"{tmp_path}: not read: 2 .heic files, 1 .avif file, 1 no-suffix file"]
    only = _tree(tmp_path / "x")
    with pytest.raises(ShardError, match=r"holds no image .*; there are 1 \.heic file; check"):
        list_images(only)


def test_each_real_folder_is_read_once(tmp_path: Path) -> None:
    top = tmp_path / "top"
    _tree(top, "one/a.png", "two/b.png")
    _tree(tmp_path / "elsewhere", "c.png", "deep/d.png")
    links = {
        "again": "one",  # sorts before it
        "chain": "again",
        "one/up": "..",
        "one/above": "../..",  # around the folder that is listed
        "self": ".",
        "two/far": "../../elsewhere",
        "far": "../elsewhere/deep",  # reached by this link, and not again by the other
        "two/e.png": "../one/a.png",
        "broken": "nowhere",
        "broken.png": "nowhere.png",
        "endless": "endless",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    os.mkfifo(top / "pipe.png")
    notes: list[str] = []
    keys = ["far/d.png", "one/a.png", "two/b.png", "two/e.png", "two/far/c.png"]
    assert _keys(list_images(str(top), notes)) == keys
    assert notes == [f"{top}: not read: 6 duplicate folder links, 3 broken links, 1 special file"]


def test_names_that_are_not_utf8_are_escaped_and_found_again(tmp_path: Path) -> None:
    names = [b"caf\xe9/a.png", b"dog/\xff\xe9.png", b"dog/caf\\xe9.png", b"dog/\xc3\xa9.png"]
    for size, name in enumerate(names, 8):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, 8)).save(path)
    index = list_images(str(tmp_path))
    keys = ["caf\\xe9/a.png", "dog/\\xff\\xe9.png", "dog/caf\\xe9.png", "dog/\u00e9.png"]
    assert sorted(_keys(index)) == sorted(keys)
    assert classes_of(index) == ("caf\\xe9", "dog")
    columns = (index.column(name).to_pylist() for name in ("uri", "offset", "size"))
    widths = [decode_rgb(data, max_pixels=10**6).width for data in read_image_bytes(*columns)]
    assert dict(zip(_keys(index), widths, strict=True)) == dict(
        zip(keys, range(8, 12), strict=True)
    )
    for name in (b"one\xe9.png", b"one\\xe9.png"):  # the second is the first one's escaped name
        Image.new("RGB", (8, 8)).save(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/" + name))
    notes: list[str] = []
    assert _keys(list_images(str(tmp_path / "dog"), notes)).count("one\\xe9.png") == 1
    assert notes == [f"{tmp_path}/dog: not read: 1 ambiguous file name"]
    inside = str(tmp_path / "caf\\xe9")  # the escaped name is that of the folder
    assert _keys(list_images(inside)) == ["a.png"]
    with pytest.raises(PcdError, match=r"caf\\xe9: its name is not UTF-8; rename it"):
        list_images(str(tmp_path / "caf\udce9"))
    (tmp_path / "list.csv").write_bytes(names[0] + b",h\xf4tel\n" + names[2] + b",x\n")
    listed = list_images(str(tmp_path / "list.csv"))
    assert _keys(listed) == [keys[0], keys[2]]
    assert classes_of(listed) == ("h\\xf4tel", "x")
    assert set(listed.column("uri").to_pylist()) < set(index.column("uri").to_pylist())


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
        ("a.png\na.png\n", r"names .*/a\.png more than once"),
        ("a.png,cat\n./a.png,dog\n", r"names .*/a\.png more than once"),
        ("a.png\nlink/a.png\n", r"names .*/a\.png more than once"),
        ("a.png,99999999\n", "label 99999999 is over"),
        (f"a.png,{'9' * 5000}\n", "label 9{40} is over"),
        ('a.png,"cat\nb.png,dog\n', "line 1: .* is not CSV"),
        ('a.png,cat\n\nb.png,"dog\nc.png,x"\n', "line 3: .* is not CSV"),
        ('"a.png",cat"\n', "line 1: .* has an unmatched quote"),
        ('a.png,"c"at\n', "line 1: .* is not CSV"),
        ("a.png,cat\nb.png\0,dog\n", "line 2 has a NUL character"),
        ("a.png,cat\n,dog\n", "line 2: ',dog' has no path"),
        ("a.png\fb.png\n", "1 of its 1 images are missing"),
    ],
)
def test_a_wrong_list_is_explained(tmp_path: Path, text: str, message: str) -> None:
    _tree(tmp_path, "a.png", "b.png")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(PcdError, match=message):
        list_images(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path, end: str) -> None:
    _tree(tmp_path, "a.png", 'b "2".png', "c,d.png")
    lines = ["\ufeffpath,label", "a.png,ant", '"b ""2"".png",bee', '\ufeff"c,d.png","ant"']
    (tmp_path / "list.csv").write_text(end.join(lines), newline="")
    index = list_images(str(tmp_path / "list.csv"))
    assert _columns(index, "key", "label") == [("a.png", 0), ('b "2".png', 1), ("c,d.png", 0)]
    (tmp_path / "list.csv").write_text("a.png", "utf-16")
    with pytest.raises(PcdError, match=r"list\.csv: is UTF-16 or UTF-32 text; save it as UTF-8"):
        list_images(str(tmp_path / "list.csv"))


def test_comment_lines_are_counted_and_minus_one_is_no_label(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("# two of three\na.png,-1\nb.png,1\n#c.png,2\n")
    notes: list[str] = []
    index = list_images(str(tmp_path / "list.csv"), notes)
    assert _columns(index, "key", "label") == [("a.png", -1), ("b.png", 1)]
    assert notes == [f"{tmp_path}/list.csv: not read: 2 comment lines"]


def test_minus_one_is_no_label_beside_names_either(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.csv").write_text("a.png,-1\nb.png,cat\nc.png,dog\n")
    index = list_images(str(tmp_path / "list.csv"))
    assert index.column("label").to_pylist() == [-1, 0, 1]
    assert classes_of(index) == ("cat", "dog")


def test_digits_of_other_scripts_are_names(tmp_path: Path) -> None:
    _tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("a.png,\u00b2\nb.png,3\n")
    assert classes_of(list_images(str(tmp_path / "list.csv"))) == ("3", "\u00b2")


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


def test_images_of_two_sources_are_noted(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "dog/a.png", "ant/a.png", "ant/b.png")
    notes: list[str] = []
    assert list_sources([tree, f"{tree}/ant"], notes).num_rows == 5
    (note,) = notes
    assert note.startswith("data.sources: 2 images are named again by another source and count")


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
