"""Which images vote and which are classified."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from stored_shards import write_images
from tiny import tiny_config

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.eval_sets import KnnImages, open_knn_images


def labelled_list(file: Path, labels: Mapping[str, str]) -> str:
    """Write images and a list of them with their labels; "" is none."""
    file.parent.mkdir()
    for name in labels:
        Image.new("RGB", (4, 4)).save(file.parent / name)
    file.write_text("".join(f"{name},{label}\n" for name, label in labels.items()))
    return str(file)


def opened(
    root: Path, train: Mapping[str, str], test: Mapping[str, str], **options: int
) -> KnnImages:
    lists = {
        f"knn_{name}": labelled_list(root / name / "list.csv", labels)
        for name, labels in (("train", train), ("test", test))
    }
    images = open_knn_images(tiny_config(eval=lists | options))
    assert images is not None
    return images


def rows(images: KnnImages, part: str) -> list[tuple[str, int]]:
    index = getattr(images, part)
    return list(
        zip(index.column("key").to_pylist(), index.column("label").to_pylist(), strict=True)
    )


def test_images_without_a_label_do_not_vote_and_those_of_unknown_classes_are_not_asked(
    tmp_path: Path,
) -> None:
    images = opened(
        tmp_path,
        {"a.png": "cat", "b.png": "", "c.png": "dog", "d.png": ""},
        {"e.png": "dog", "f.png": "", "g.png": "elk", "h.png": "ant", "i.png": "cat"},
    )
    assert rows(images, "train") == [("a.png", 0), ("c.png", 1)]
    assert rows(images, "test") == [("e.png", 1), ("i.png", 0)]
    train, unlabelled, unknown = images.left_out
    assert "2 of 4 images of eval.knn_train" in train
    assert "1 of 5 images of eval.knn_test" in unlabelled
    assert "no label" in train
    assert "no label" in unlabelled
    assert "2 of 4 labelled images of eval.knn_test" in unknown
    assert "no image in eval.knn_train has their class" in unknown


def test_a_class_that_is_named_but_has_no_image_is_unknown(tmp_path: Path) -> None:
    images = opened(tmp_path, {"a.png": "0", "b.png": "2"}, {"c.png": "1", "d.png": "2"})
    assert rows(images, "test") == [("d.png", 2)]  # 0 to 2 are names; no image is a 1


def test_files_that_are_not_read_are_said(tmp_path: Path) -> None:
    folder = write_images(tmp_path)
    (tmp_path / "left" / "3.heic").write_bytes(b"...")
    images = open_knn_images(tiny_config(eval={"knn_train": folder, "knn_test": folder}))
    assert images is not None
    assert images.left_out == (f"eval.knn_train={folder}: not read: 1 .heic file",)


def test_nothing_is_said_when_nothing_is_left_out(tmp_path: Path) -> None:
    images = opened(tmp_path, {"a.png": "x", "b.png": "y"}, {"c.png": "y"})
    assert images.left_out == ()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"a.png": ""}, {"b.png": "x"}, r"train/list\.csv has no labels; give class subfolders"),
        ({"a.png": "x"}, {"b.png": ""}, r"test/list\.csv has no labels; give class subfolders"),
        ({"a.png": "x"}, {"b.png": "y", "c.png": ""}, r"test/list\.csv shares no class with"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(
    train: dict[str, str], test: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=message):
        opened(tmp_path, train, test)
