"""Published segmentation sets in the folders that they are downloaded in.

VOCdevkit/VOC2012/   JPEGImages/ID.jpg  SegmentationClass/ID.png  SegmentationClassAug/ID.png
ImageSets/Segmentation/{train,val,trainaug}.txt
cityscapes/          leftImg8bit/{train,val}/CITY/ID_leftImg8bit.png
gtFine/{train,val}/CITY/ID_gtFine_labelIds.png
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pcd_ray import storage
from pcd_ray.errors import ShardError
from pcd_ray.evaluate.segment.segmentation_data import (
    VOID,
    SegmentationData,
    check_present,
    files_by_id,
    lines_of,
    open_segmentation,
)

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
    *("sheep", "sofa", "train", "tv monitor"),
)
CITYSCAPES_LABELS: Mapping[int, str] = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole"},
    **{19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky"},
    **{24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train"},
    **{32: "motorcycle", 33: "bicycle"},
}
"""Id in the files -> class, of those that are judged; their order is that of the train ids."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What fine-tuning on a set usually means."""

    crop_px: int
    """0: the shorter side of the first training image, at most 512."""
    steps: int
    """0: 100 passes over train."""
    window_px: int
    """0: whole images."""


PROTOCOLS = {
    # crops and numbers of steps with which self-supervised networks are commonly compared, with
    # 16 images per step: not the paper's, which says nothing of them
    "voc12": Protocol(crop_px=513, steps=30_000, window_px=0),
    "cityscapes": Protocol(crop_px=769, steps=90_000, window_px=769),
    "folder": Protocol(crop_px=0, steps=0, window_px=0),
}
"""Preset -> what its options are where they are 0."""

_VOC_LISTS = ("ImageSets", "Segmentation")
_AUGMENTED = "SegmentationClassAug"


def open_layout(uri: str, *, preset: str, size_px: int = 0) -> SegmentationData:
    """Open a segmentation set in one of the layouts of ``eval.segment.preset``.

    Args:
        uri: its folder; of VOC also one or two above ``VOC2012``.
        preset: ``folder``, ``voc12`` or ``cityscapes``.
        size_px: height that images are resized to; 0 keeps theirs.

    Raises:
        ShardError: it is not laid out so, or files are missing.
        StorageError: it cannot be read.
    """
    if preset == "voc12":
        return _open_voc12(uri, size_px)
    if preset == "cityscapes":
        return _open_cityscapes(uri, size_px)
    return open_segmentation(uri, size_px=size_px)


def _open_voc12(uri: str, size_px: int) -> SegmentationData:
    root = _voc_root(uri)
    masks = files_by_id(root, "SegmentationClass", suffixes=(".png",))
    val = _voc_list(root, "val")
    augmented = files_by_id(root, _AUGMENTED, suffixes=(".png",))
    if not augmented:
        train = _voc_list(root, "train")
    elif storage.exists(storage.join(root, *_VOC_LISTS, "trainaug.txt")):
        train = _voc_list(root, "trainaug")
    else:
        train = tuple(sorted(augmented.keys() - set(val)))
    if augmented:  # val stays as it was published
        masks = augmented | {name: masks[name] for name in val if name in masks}
    images = files_by_id(root, "JPEGImages", suffixes=(".jpg",))
    splits = {"train": train, "val": val}
    of_train = f"mask in {_AUGMENTED if augmented else 'SegmentationClass'}/"
    check_present(root, splits, {"image in JPEGImages/": images, of_train: masks})
    return SegmentationData(root, VOC_CLASSES, splits, images, masks, size_px)


def _voc_root(uri: str) -> str:
    for parts in ((), ("VOC2012",), ("VOCdevkit", "VOC2012")):
        root = storage.join(uri, *parts) if parts else uri
        if storage.exists(storage.join(root, *_VOC_LISTS, "val.txt")):
            return root
    raise ShardError(
        f"{uri} holds no ImageSets/Segmentation/val.txt; give the folder VOCdevkit/VOC2012, or "
        "another eval.segment.preset"
    )


def _voc_list(root: str, name: str) -> tuple[str, ...]:
    # some copies of the lists have further columns
    layout = "VOC2012 has train.txt and val.txt in ImageSets/Segmentation"
    lines = lines_of(storage.join(root, *_VOC_LISTS), f"{name}.txt", layout=layout)
    return tuple(line.split()[0] for line in lines)


def _open_cityscapes(uri: str, size_px: int) -> SegmentationData:
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    splits: dict[str, tuple[str, ...]] = {}
    for split in ("train", "val"):  # the labels of test are not published
        found = _ending(uri, f"leftImg8bit/{split}", "_leftImg8bit")
        if not found:
            raise ShardError(
                f"{uri} has no images in leftImg8bit/{split}/; give the folder that holds "
                "leftImg8bit/ and gtFine/, or another eval.segment.preset"
            )
        images |= found
        masks |= _ending(uri, f"gtFine/{split}", "_gtFine_labelIds")
        splits[split] = tuple(sorted(found))
    check_present(uri, splits, {"gtFine/*_gtFine_labelIds.png": masks})
    train_ids = {label: number for number, label in enumerate(CITYSCAPES_LABELS)}
    relabel = tuple(train_ids.get(value, VOID) for value in range(256))
    return SegmentationData(
        uri, tuple(CITYSCAPES_LABELS.values()), splits, images, masks, size_px, relabel
    )


def _ending(uri: str, folder: str, ending: str) -> dict[str, str]:
    """Return id -> URI of the files of a folder whose names end so; the id stands before."""
    found = files_by_id(uri, folder, suffixes=(".png",))
    return {
        name.removesuffix(ending): place for name, place in found.items() if name.endswith(ending)
    }
