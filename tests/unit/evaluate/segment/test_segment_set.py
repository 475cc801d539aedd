"""A segmentation set is looked through once, and all that is wrong is told in one message."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_folder import painted, random_mask, write_set
from tiny import tiny_config

from pcd_ray.errors import ConfigError, ShardError
from pcd_ray.evaluate import eval_sets
from pcd_ray.evaluate.eval_sets import look_through
from pcd_ray.evaluate.segment.segment_set import looked_through, open_segment_set
from pcd_ray.evaluate.segment.segmentation_data import open_segmentation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    masks = [random_mask(seed, height=32, width=48, block=16) for seed in range(5)]
    pairs = [(painted(mask), mask) for mask in masks]
    return Path(write_set(tmp_path / "set", {"train": pairs[:3], "val": pairs[3:]}))


def sha256(folder: Path, size_px: int = 0) -> str:
    return looked_through(open_segmentation(str(folder), size_px=size_px)).sha256


def test_sizes_and_classes_without_a_pixel_are_known(folder: Path) -> None:
    opened = looked_through(open_segmentation(str(folder), size_px=16))
    assert opened.sizes == ((16, 24),)
    assert opened.notes == ()
    mask = np.zeros((32, 48), np.uint8)
    mask[0], mask[1:13] = 1, 255
    for file in (folder / "masks").glob("val_*"):
        Image.fromarray(mask).save(file)
    (note,) = looked_through(open_segmentation(str(folder))).notes
    assert note == "no pixel of val has class tree, and 38% are 255 = void"


def test_images_of_train_in_another_split_are_noted(folder: Path) -> None:
    (folder / "val.txt").write_text("val_00\ntrain_00\n")
    (note,) = looked_through(open_segmentation(str(folder))).notes
    assert note.startswith("1 of 2 images of val are in train too: scores on them do not show")


ONE_CLASS: dict[str, tuple[dict[int, int], list[str], str]] = {
    "objects marked with 255": (
        {1: 255, 2: 255},
        ["sky", "road"],
        r"no pixel of SPLIT has label 1, and \d+% are 255 = void: are objects marked with 255\? A "
        r"split with one class cannot be scored; masks hold 0 for the first class",
    ),
    "the same, of three classes": (
        {1: 255, 2: 255},
        ["sky", "road", "tree"],
        r"no pixel of SPLIT has label 1, 2, and \d+% are 255 = void: are objects marked with 255\?",
    ),
    "the background marked with 255": (
        {0: 255, 1: 0, 2: 0},
        ["sky", "road"],
        r"no pixel of SPLIT has label 1, and \d+% are 255 = void: are objects marked with 255\?",
    ),
    "labels that begin at 1": (
        {0: 255, 2: 1},
        ["sky", "road"],
        r"no pixel of SPLIT has label 0, and \d+% are 255 = void",
    ),
    "nothing but background": (
        {1: 0, 2: 0},
        ["sky", "road"],
        r"no pixel of SPLIT has label 1; a split with one class cannot be scored",
    ),
    "a list of one class": (
        {1: 0, 2: 0},
        ["sky"],
        r"it lists one class; a split with one class cannot be scored",
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ONE_CLASS)
def test_a_split_of_one_class_is_refused_wherever_it_is_opened(
    kind: str, split: str, folder: Path
) -> None:
    """Any network would score 100 on it."""
    to, classes, message = ONE_CLASS[kind]
    (folder / "classes.txt").write_text("\n".join(classes))
    for file in (folder / "masks").iterdir():
        given = np.array(Image.open(file)).astype(int)
        mask = np.minimum(given, len(classes) - 1)
        if file.name.startswith(split):
            mask = np.select([given == old for old in to], list(to.values()), given)
        Image.fromarray(mask.astype(np.uint8)).save(file)
    config = tiny_config(eval={"segmentation": str(folder)})
    expected = "eval.segmentation: .*: " + message
    if len(classes) > 1:
        expected = expected.replace("SPLIT", split)
    for opened in (open_segment_set, look_through):
        with pytest.raises(ShardError, match=expected):
            opened(config)


def test_classes_that_a_sample_lacks_are_looked_for_in_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_sets, "PROBE_SAMPLE", 2)
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(folder / "masks" / "train_00.png")
    config = tiny_config(eval={"segmentation": str(folder)})
    assert look_through(config) == {"eval.segmentation": "2 of 5 images and masks"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_labels_is_refused_before_any_network_is_tried(
    split: str, folder: Path
) -> None:
    for file in (folder / "masks").glob(f"{split}_*"):
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(file)
    with pytest.raises(ShardError, match=rf"{split} has 0 labelled pixels; label some"):
        looked_through(open_segmentation(str(folder)))


@pytest.mark.parametrize("change", ["mask", "image", "list", "classes"])
def test_what_it_holds_is_known_by_content(change: str, folder: Path) -> None:
    """A mask or list of the same length and name is another set."""
    before = sha256(folder)
    assert sha256(folder) == before
    if change == "mask":
        mask = np.array(Image.open(folder / "masks" / "val_00.png"))
        Image.fromarray(255 - (255 - mask) * (mask != mask[0, 0])).save(
            folder / "masks" / "val_00.png"
        )
    elif change == "image":
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(folder / "images" / "val_00.png")
    elif change == "list":
        lines = (folder / "train.txt").read_text().split()
        (folder / "train.txt").write_text("\n".join(reversed(lines)))
    else:
        (folder / "classes.txt").write_text("sky\nroad\nbush\n")
    assert sha256(folder) != before


def test_a_copy_is_the_same_set(folder: Path, tmp_path: Path) -> None:
    before = sha256(folder)
    assert sha256(folder.rename(tmp_path / "elsewhere")) == before


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    Image.fromarray(np.full((32, 48), 9, np.uint8)).save(folder / "masks" / "train_01.png")
    (folder / "images" / "val_00.png").write_bytes(
        (folder / "images" / "val_00.png").read_bytes()[:-200]  # cut off: its header is whole
    )
    config = tiny_config(eval={"segmentation": str(folder)})
    with pytest.raises(ShardError) as caught:
        open_segment_set(config)
    text = str(caught.value)
    assert text.startswith("eval.segmentation: 2 of 5 images with their masks cannot be used: ")
    assert "train_01.png: labels [9]" in text
    assert "val_00.png: cannot be decoded" in text
    with pytest.raises(ConfigError, match=r"eval\.segmentation is empty"):
        open_segment_set(tiny_config())
