"""A segmentation set that has been looked through, once, before anything is judged on it.

Shapes: L classes, H x W pixels of the network's input.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pcd_ray.config import Config
from pcd_ray.errors import ConfigError, ShardError, naming
from pcd_ray.evaluate.contents import hash_of
from pcd_ray.evaluate.eval_sets import open_probe
from pcd_ray.evaluate.segment.segmentation_data import VOID, SegmentationData
from pcd_ray.progress import counted

_READS = 8  # at once
_SHOWN = 5  # damaged files that are named


@dataclass(frozen=True, slots=True)
class SegmentSet:
    """A set all of whose images and masks can be read."""

    data: SegmentationData
    notes: tuple[str, ...]
    """What is worth knowing, such as classes without a pixel."""
    sizes: tuple[tuple[int, int], ...]
    """(H, W) of its images, each once, ascending."""
    sha256: str
    """Of its splits, classes, and all pixels of images and masks."""


def open_segment_set(config: Config) -> SegmentSet:
    """Return the set of ``eval.segmentation``, every image and mask of it decoded once.

    Raises:
        ConfigError: the option is empty.
        ShardError: files are missing, damaged or do not fit each other: all are counted at once;
            or a split has fewer than two classes.
    """
    data = open_probe(config)
    if data is None:
        raise ConfigError(
            "eval.segmentation is empty; give the folder of a labelled segmentation set"
        )
    with naming("eval.segmentation"):
        return looked_through(data)


def looked_through(data: SegmentationData) -> SegmentSet:
    """Decode all images and masks of a set.

    Raises:
        ShardError: some of them cannot be used, or a split has fewer than two classes.
    """
    names = list(dict.fromkeys(name for split in data.splits for name in data.names(split)))
    seen = dict(zip(names, _all_seen(lambda name: _seen(data, name), names), strict=True))
    facts = [
        list(data.classes),
        {split: list(ids) for split, ids in data.splits.items()},
        [[name, found.image_sha256, found.labels_sha256] for name, found in seen.items()],
    ]
    notes: list[str] = []
    for split in data.splits:
        notes += data.check_labels(
            split, np.sum([seen[name].pixels for name in data.names(split)], axis=0)
        )
        shared = set(data.names(split)) & set(data.names("train")) if split != "train" else ()
        if shared:
            notes.append(
                f"{len(shared)} of {len(data.names(split))} images of {split} are in train too: "
                "scores on them do not show how well new images are segmented"
            )
    sizes = tuple(sorted({found.size for found in seen.values()}))
    return SegmentSet(data, tuple(notes), sizes, hash_of(facts))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an image and its mask hold."""

    size: tuple[int, int]
    """(H, W) of the image, resized."""
    pixels: NDArray[np.int64]
    """(256,) pixels of each label."""
    image_sha256: str
    labels_sha256: str


def _seen(data: SegmentationData, name: str) -> _Seen:
    image, labels = data.decoded(name)
    width, height = data.resized_size(image)
    return _Seen(
        size=(height, width),
        pixels=np.bincount(labels.ravel(), minlength=VOID + 1),
        image_sha256=hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(),
        labels_sha256=hashlib.sha256(f"{labels.shape}".encode() + labels.tobytes()).hexdigest(),
    )


def _all_seen(see: Callable[[str], _Seen], names: Sequence[str]) -> list[_Seen]:
    """Look at all of them, and only then tell what is wrong.

    Raises:
        ShardError: with one: its own words; with several: how many, and those of a few.
    """
    found: list[_Seen] = []
    wrong: list[str] = []

    def try_one(name: str) -> _Seen | ShardError:
        try:
            return see(name)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(_READS) as pool:
        seen = pool.map(try_one, names)
        for result in counted(seen, "decoding eval.segmentation", "images", len(names)):
            if isinstance(result, ShardError):
                wrong.append(str(result))
            else:
                found.append(result)
    if len(wrong) == 1:
        raise ShardError(wrong[0])
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ShardError(
            f"{len(wrong)} of {len(names)} images with their masks cannot be used: "
            + "; ".join(wrong[:_SHOWN])
            + more
        )
    return found
