"""A segmentation set is looked through once, and all that is wrong is told in one message."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_folder import painted, random_mask, write_set
from tiny import tiny_config

from pcd_ray.errors import ConfigError, ShardError
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
    for file in (folder / "masks").glob("val_*"):
        Image.fromarray(np.zeros((32, 48), np.uint8)).save(file)
    (note,) = looked_through(open_segmentation(str(folder))).notes
    assert note == "no pixel of val has class road, tree"


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
