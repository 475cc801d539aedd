"""Tiny trees in the exact layouts of VOC 2012 and Cityscapes."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.segment.segmentation_layouts import (
    CITYSCAPES_LABELS,
    PROTOCOLS,
    VOC_CLASSES,
    open_layout,
)

# colours of the published masks: label bits spread over the three channels
VOC_PALETTE = [
    sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
    for label in range(256)
    for channel in range(3)
]


def labels(seed: int, values: list[int], shape: tuple[int, int] = (8, 12)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).choice(values, size=shape).astype(np.uint8)


def write_voc(root: Path, *, augmented: bool, listed: bool = True) -> Path:
    """VOCdevkit/VOC2012 with two images in train, one in val, and two more in the augmented set."""
    voc = root / "VOCdevkit" / "VOC2012"
    folders = ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"]
    for folder in [*folders, *(["SegmentationClassAug"] if augmented else [])]:
        (voc / folder).mkdir(parents=True)
    lists = {
        "train": ["2007_000032", "2007_000039"],
        "val": ["2007_000033"],
        "trainval": ["2007_000032", "2007_000033", "2007_000039"],
    }
    more = ["2008_000001", "2008_000002"]
    if augmented and listed:
        lists["trainaug"] = [*lists["train"], *more]
    for name, ids in lists.items():
        (voc / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    for seed, name in enumerate([*lists["trainval"], *more]):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(voc / "JPEGImages" / f"{name}.jpg")
        found = labels(seed, [0, 1, 15, 20, 255])
        if name not in more:
            mask = Image.fromarray(found)
            mask.putpalette(VOC_PALETTE)
            mask.save(voc / "SegmentationClass" / f"{name}.png")
        if augmented:
            Image.fromarray(found).save(voc / "SegmentationClassAug" / f"{name}.png")
    (voc / "JPEGImages" / "2012_004331.jpg").write_bytes(b"of another task, never opened")
    return voc


@pytest.mark.parametrize("above", [".", "..", "../.."])
def test_voc_as_downloaded(tmp_path: Path, above: str) -> None:
    voc = write_voc(tmp_path, augmented=False)
    data = open_layout(str((voc / above).resolve()), preset="voc12")
    assert data.classes == VOC_CLASSES
    assert (len(VOC_CLASSES), VOC_CLASSES[1], VOC_CLASSES[15]) == (21, "aeroplane", "person")
    assert data.splits == {"train": ("2007_000032", "2007_000039"), "val": ("2007_000033",)}
    image, mask = data.example("2007_000033")
    assert image.shape == (8, 12, 3)
    np.testing.assert_array_equal(mask, labels(1, [0, 1, 15, 20, 255]))


def test_voc_trains_on_the_augmented_masks_where_they_are(tmp_path: Path) -> None:
    data = open_layout(str(write_voc(tmp_path / "listed", augmented=True)), preset="voc12")
    assert len(data.names("train")) == 4
    assert "SegmentationClassAug" in data.masks["2008_000001"]
    assert "SegmentationClass/" in data.masks["2007_000033"]  # val stays as published
    np.testing.assert_array_equal(data.decoded("2008_000002")[1], labels(4, [0, 1, 15, 20, 255]))
    bare = open_layout(
        str(write_voc(tmp_path / "bare", augmented=True, listed=False)), preset="voc12"
    )
    assert set(bare.names("train")) == set(data.names("train"))  # all but val's


def test_other_folders_are_no_voc(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no ImageSets/Segmentation/val\.txt; give"):
        open_layout(str(tmp_path), preset="voc12")
    voc = write_voc(tmp_path, augmented=False)
    (voc / "SegmentationClass" / "2007_000039.png").unlink()
    with pytest.raises(ShardError, match=r"1 of 2 ids in train.txt have no mask in SegmentationCl"):
        open_layout(str(voc), preset="voc12")


def write_cityscapes(root: Path) -> Path:
    """Two cities in train, one in val, one in test, with the files that come along."""
    cities = {"train": ["aachen", "ulm"], "val": ["munster"], "test": ["berlin"]}
    for split, names in cities.items():
        for seed, city in enumerate(names):
            images, fine = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
            images.mkdir(parents=True)
            fine.mkdir(parents=True)
            name = f"{city}_000000_000019"
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(images / f"{name}_leftImg8bit.png")
            raw = labels(seed, [*range(34), 255])
            Image.fromarray(raw).save(fine / f"{name}_gtFine_labelIds.png")
            Image.fromarray(raw).save(fine / f"{name}_gtFine_instanceIds.png")
            Image.fromarray(pixels).save(fine / f"{name}_gtFine_color.png")
            (fine / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


def test_cityscapes_as_downloaded_has_19_classes(tmp_path: Path) -> None:
    data = open_layout(str(write_cityscapes(tmp_path)), preset="cityscapes")
    assert data.splits == {
        "train": ("aachen/aachen_000000_000019", "ulm/ulm_000000_000019"),
        "val": ("munster/munster_000000_000019",),
    }
    assert (len(data.classes), data.classes[0], data.classes[18]) == (19, "road", "bicycle")
    raw = labels(1, [*range(34), 255])
    mask = data.decoded("ulm/ulm_000000_000019")[1]
    for value in np.unique(raw):
        wanted = list(CITYSCAPES_LABELS).index(value) if value in CITYSCAPES_LABELS else 255
        assert set(mask[raw == value].tolist()) == {wanted}
    known = {7: 0, 11: 2, 17: 5, 23: 10, 24: 11, 26: 13, 28: 15, 31: 16, 33: 18, 0: 255, 29: 255}
    assert {value: data.relabel[value] for value in known} == known


def test_missing_parts_of_cityscapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has no images in leftImg8bit/train/; give the folder"):
        open_layout(str(tmp_path), preset="cityscapes")
    write_cityscapes(tmp_path)
    (tmp_path / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ShardError, match=r"1 of 1 ids in val.txt have no gtFine/"):
        open_layout(str(tmp_path), preset="cityscapes")


def test_every_preset_has_a_protocol() -> None:
    from typing import get_args, get_type_hints

    from pcd_ray.config import SegmentConfig

    assert set(PROTOCOLS) == set(get_args(get_type_hints(SegmentConfig)["preset"]))
