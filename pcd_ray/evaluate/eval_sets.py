"""The labelled sets that a run is judged on: opened, and looked through before it trains."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pcd_ray import storage
from pcd_ray.config import Config, DataConfig
from pcd_ray.data.decode import UnreadableImage, decode_rgb, unreadable
from pcd_ray.data.image_index import classes_of, column, relabelled
from pcd_ray.data.ranges import REMOTE_READS
from pcd_ray.data.shards import read_image_bytes
from pcd_ray.data.sources import open_index
from pcd_ray.errors import ShardError, naming
from pcd_ray.evaluate.segment.segmentation_data import SegmentationData
from pcd_ray.evaluate.segment.segmentation_layouts import open_layout
from pcd_ray.progress import counted

KNN_SAMPLE = 500
"""Images of each kNN set that are decoded before training."""
PROBE_SAMPLE = 1000
"""Images and masks of a segmentation set that are decoded before training."""
_NO_PIXELS = np.zeros(256, np.int64)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KnnImages:
    """The images that vote and those that are classified, labels counted alike."""

    train: pa.Table
    test: pa.Table
    left_out: tuple[str, ...] = ()
    """A line for each reason why some of the images given take no part."""
    leave_one_out: bool = False
    """The two are the same images, none of which votes for itself."""


def crop_size_px(config: Config) -> int:
    """Return the side of the centre crops that whole images are judged on."""
    return config.eval.image_size_px or config.augment.image_size_px


def open_knn_images(config: Config) -> KnnImages | None:
    """Return the images of ``eval.knn_train`` and ``eval.knn_test``; None when they are not set.

    Images without a label take no part, nor do test images of a class that none of train's has.

    Raises:
        ShardError: a collection has no labels, or the two share no class.
    """
    if not config.eval.knn_train:
        return None
    left_out: list[str] = []
    train = _labelled("eval.knn_train", config.eval.knn_train, left_out)
    if _place(config.eval.knn_test) == _place(config.eval.knn_train):
        return KnnImages(train, train, tuple(left_out), leave_one_out=True)
    test = _labelled("eval.knn_test", config.eval.knn_test, left_out)
    test = relabelled(test, classes_of(train))
    known = np.isin(column(test, "label"), column(train, "label"))
    if not known.any():
        raise ShardError(
            f"eval.knn_test={config.eval.knn_test} shares no class with eval.knn_train="
            f"{config.eval.knn_train}; give two parts of one data set"
        )
    if not known.all():
        left_out.append(
            f"{np.count_nonzero(~known):,} of {known.size:,} labelled images of eval.knn_test are "
            "left out: no image in eval.knn_train has their class"
        )
    return KnnImages(train, test.filter(pa.array(known)), tuple(left_out))


def _place(uri: str) -> str:
    """Return a set's place, the same however it is spelt."""
    if not storage.is_remote(uri):
        return os.path.realpath(storage.absolute(uri))
    base, query = storage.split_query(uri)
    return base.rstrip("/") + query


def open_probe(config: Config) -> SegmentationData | None:
    """Return the set of ``eval.segmentation``; None when it is not set.

    Raises:
        ShardError: a list or a file is missing.
    """
    if not config.eval.segmentation:
        return None
    with naming("eval.segmentation"):
        data = open_layout(
            config.eval.segmentation,
            preset=config.eval.segment.preset,
            size_px=config.eval.segmentation_size_px,
        )
    return replace(data, max_decode_s=config.data.max_decode_s)


def look_through(config: Config) -> dict[str, str]:
    """Decode the evaluation sets, evenly spread samples of large ones; return how much was read.

    Raises:
        ShardError: an image or a mask is damaged, a mask does not fit its image or classes, or a
            split has fewer than two classes.
    """
    read: dict[str, str] = {}
    knn, probe = open_knn_images(config), open_probe(config)
    if knn is not None:
        for option, index in (("eval.knn_train", knn.train), ("eval.knn_test", knn.test)):
            rows = spread(index.num_rows, KNN_SAMPLE)
            entries = index.take(pa.array(rows)).to_pylist()
            decode_all(option, lambda entry: _decode(entry, config.data), entries)
            read[option] = f"{_share(len(rows), index.num_rows)} images"
    if probe is not None:
        read["eval.segmentation"] = f"{_look_through_masks(probe)} images and masks"
    return read


def _look_through_masks(data: SegmentationData) -> str:
    """Decode a sample of a segmentation set, and all of a split whose sample looks wrong."""
    option = "eval.segmentation"
    names = [(split, name) for split in data.splits for name in data.names(split)]
    tried = [names[row] for row in spread(len(names), PROBE_SAMPLE)]
    pixels = decode_all(option, lambda one: data.pixels_by_label(one[1]), tried)
    for split in data.splits:
        mine = [found for (of, _), found in zip(tried, pixels, strict=True) if of == split]
        try:
            data.check_labels(split, np.sum([_NO_PIXELS, *mine], axis=0))
        except ShardError:  # the classes that the sample lacks may be rare
            mine = decode_all(option, data.pixels_by_label, data.names(split))
            with naming(option):
                data.check_labels(split, np.sum(mine, axis=0))
    return _share(len(tried), len(names))


def spread(count: int, most: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return all of ``count`` rows, or ``most`` of them, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def decode_all(option: str, decode: Callable[[Any], _T], items: Sequence[Any]) -> list[_T]:
    """Return what ``decode`` makes of all items, several at once.

    Raises:
        PcdError: what ``decode`` raises first, after the option's name.
    """
    with naming(option), ThreadPoolExecutor(REMOTE_READS) as pool:
        found = pool.map(decode, items)
        return list(counted(found, f"decoding {option}", "images", len(items)))


def _labelled(option: str, uri: str, left_out: list[str]) -> pa.Table:
    """Return the index of a collection's labelled images; note what is left out."""
    with naming(option):
        notes: list[str] = []
        index = open_index(uri, notes)
        labelled = column(index, "label") >= 0
        if not labelled.any():
            raise ShardError(
                f"{uri} has no labels; give class subfolders or shards packed from them"
            )
    left_out += [f"{option}={note}" for note in notes]
    if not labelled.all():
        left_out.append(
            f"{np.count_nonzero(~labelled):,} of {labelled.size:,} images of {option} are left "
            "out: they have no label"
        )
    return index.filter(pa.array(labelled))


def _share(read: int, of: int) -> str:
    return f"all {of:,}" if read == of else f"{read:,} of {of:,}"


def _decode(entry: dict[str, Any], data: DataConfig) -> None:
    (content,) = read_image_bytes([entry["uri"]], [entry["offset"]], [entry["size"]])
    try:
        decode_rgb(content, max_pixels=data.max_pixels, max_decode_s=data.max_decode_s)
    except UnreadableImage as error:
        raise unreadable(entry["key"], entry["uri"], str(error)) from error
