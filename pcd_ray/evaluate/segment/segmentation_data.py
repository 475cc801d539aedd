"""A labelled segmentation set in a folder: images, index masks, classes, splits.

    classes.txt                    one name per line; line number = label
    train.txt val.txt [test.txt]   ids, one per line
    images/ID.jpg|.jpeg|.png       RGB; upright, as viewers show it
    masks/ID.png                   1 to 8 bits, one channel: a label, or 255 = void (not scored)

Shapes: B images, L classes, H x W pixels of the network's input, Y x X pixels of the mask.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pcd_ray import storage
from pcd_ray.data.decode import MAX_DECODE_S, finish_rgb, open_image
from pcd_ray.errors import ShardError, naming
from pcd_ray.evaluate.scores import distinct_names
from pcd_ray.evaluate.segment.segmentation_masks import stored_labels

VOID = 255
"""Label of pixels that are not judged."""

_MAX_ENLARGED_PIXELS = 2**23
"""Of an enlarged image: only thin strips exceed it; networks need over 100 bytes per pixel."""
_SPLITS = ("train", "val", "test")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LAYOUT = "a segmentation set has images/, masks/, classes.txt, train.txt and val.txt"


@dataclass(frozen=True, slots=True)
class SegmentationData:
    """An opened set: every id of every split has an image and a mask."""

    uri: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    """Ids of ``train``, ``val`` and, where it is there, ``test``."""
    images: Mapping[str, str]
    """Id -> URI of its image."""
    masks: Mapping[str, str]
    """Id -> URI of its mask."""
    size_px: int
    """Height that images are resized to, their shape kept; 0 keeps theirs. Masks stay whole."""
    relabel: tuple[int, ...] = ()
    """Label of each value 0 to 255 of the mask files; empty: they are labels."""
    max_decode_s: float = field(default=MAX_DECODE_S, compare=False)
    """Seconds of processor time that decoding a file may take."""

    def example(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return an id's image (H, W, 3), resized, and its mask (Y, X) in full size.

        Raises:
            ShardError: a file is damaged, the two differ in size, or a label is out of range.
        """
        image, mask = self.decoded(name)
        if self.resized_size(image) != image.size:
            image = image.resize(self.resized_size(image), Image.Resampling.BILINEAR)
        return np.asarray(image), mask

    def resized_size(self, image: Image.Image) -> tuple[int, int]:
        """Return width and height that an image is judged in."""
        if not self.size_px or self.size_px == image.height:
            return image.width, image.height
        return max(1, round(image.width * self.size_px / image.height)), self.size_px

    def decoded(self, name: str) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return an id's image in full size, upright, in RGB, and its labels of the same size.

        Raises:
            ShardError: as for `example`.
        """
        data = storage.read_bytes(self.images[name])
        with _readable(self.images[name]):
            image = finish_rgb(self._opened(data))
        width, height = self.resized_size(image)
        enlarged = width * height > image.width * image.height
        if width * height > (_MAX_ENLARGED_PIXELS if enlarged else _max_pixels()):
            raise ShardError(
                f"{self.images[name]}: its {image.width} x {image.height} px become {width:,} x "
                f"{height:,} at eval.segmentation_size_px={self.size_px}; leave this image out"
            )
        return image, self._labels(name, image.size)

    def pixels_by_label(self, name: str) -> NDArray[np.int64]:
        """Return how many pixels of an id's mask have each label 0 to 255, (256,).

        Raises:
            ShardError: as for `example`.
        """
        return np.bincount(self.decoded(name)[1].ravel(), minlength=VOID + 1)

    def _labels(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the labels of an id's mask, whose image has this width and height."""
        uri = self.masks[name]
        data = storage.read_bytes(uri)
        known = range(VOID + 1) if self.relabel else (*range(len(self.classes)), VOID)
        with _readable(uri):
            labels = stored_labels(self._opened(data), data, known=known)
        if labels.shape != size[::-1]:
            raise ShardError(
                f"{uri}: the mask is {labels.shape[1]} x {labels.shape[0]} px, its image "
                f"{size[0]} x {size[1]} (upright, as its EXIF orientation says); make them equal"
            )
        if self.relabel:
            labels = np.array(self.relabel, np.uint8)[labels]
        beyond = [int(label) for label in np.unique(labels) if len(self.classes) <= label < VOID]
        if beyond:
            raise ShardError(
                f"{uri}: labels {beyond} are beyond the {len(self.classes)} classes "
                f"of the set (classes.txt, where it has one); fix the mask, list the classes, or "
                f"mark void pixels {VOID}"
            )
        return labels

    def check_labels(self, split: str, pixels: NDArray[np.int64]) -> list[str]:
        """Return what is worth knowing of the labels of a split, such as classes without a pixel.

        Args:
            split: its name.
            pixels: of its masks, by label 0 to 255, (256,).

        Raises:
            ShardError: fewer than two classes have pixels, so that any network would score 100.
        """
        labelled = pixels[: len(self.classes)]
        if not labelled.any():
            raise ShardError(
                f"{self.uri}: {split} has 0 labelled pixels; label some that are not void ({VOID})"
            )
        absent = np.flatnonzero(labelled == 0)
        void = 100 * int(pixels[VOID]) / int(pixels.sum())
        also = f", and {void:.2g}% are {VOID} = void" if void and not self.relabel else ""
        if np.count_nonzero(labelled) == 1:
            missing = f"no pixel of {split} has label {_some([str(label) for label in absent])}"
            asked = f": are objects marked with {VOID}? A" if also else "; a"
            raise ShardError(
                f"{self.uri}: {missing if len(absent) else 'it lists one class'}{also}{asked} "
                "split with one class cannot be scored; masks hold 0 for the first class that is "
                "listed, 1 for the second and so on"
            )
        if not len(absent):
            return []
        names = ", ".join(self.classes[label] for label in absent)
        learned = ": it cannot be learned" if split == "train" else ""
        return [f"no pixel of {split} has class {names}{also}{learned}"]

    def batches(self, split: str, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images (B, H, W, 3) and masks (B, Y, X) of a split, in its order.

        A batch ends early where the next image has another size.

        Raises:
            ShardError: the set has no such split, or as for `example`.
        """
        images: list[NDArray[np.uint8]] = []
        masks: list[NDArray[np.uint8]] = []
        for name in self.names(split):
            image, mask = self.example(name)
            other = bool(images) and (image.shape, mask.shape) != (images[0].shape, masks[0].shape)
            if other or len(images) == batch_size:
                yield _stacked(images), _stacked(masks)
                images, masks = [], []
            images.append(image)
            masks.append(mask)
        yield _stacked(images), _stacked(masks)

    def names(self, split: str) -> tuple[str, ...]:
        """Return the ids of a split.

        Raises:
            ShardError: the set has no such split.
        """
        if split not in self.splits:
            raise ShardError(
                f"{self.uri}: there is no split {split!r}; it has {', '.join(self.splits)}: "
                f"choose one of these or write {split}.txt"
            )
        return self.splits[split]

    def _opened(self, data: bytes) -> Image.Image:
        return open_image(data, max_pixels=_max_pixels(), max_decode_s=self.max_decode_s)


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Explain what is wrong with a file."""
    with naming(uri):
        try:
            yield
        except ShardError:
            raise
        except Exception as error:  # Pillow's parsers raise any kind of error on damaged bytes
            raise ShardError(f"cannot be decoded ({error}); replace the file") from error


def open_segmentation(uri: str, *, size_px: int = 0) -> SegmentationData:
    """Open a folder or bucket prefix laid out as at the top of this module.

    Args:
        uri: the folder.
        size_px: height that images are resized to; 0 keeps theirs.

    Raises:
        ShardError: a list is missing or empty, or an id has no image or no mask.
        StorageError: the folder cannot be read.
    """
    splits = {
        split: lines_of(uri, f"{split}.txt", unique=True)
        for split in _SPLITS
        if split != "test" or storage.exists(storage.join(uri, "test.txt"))
    }
    classes = lines_of(uri, "classes.txt", numbered=True)
    if len(classes) > VOID:
        raise ShardError(
            f"{uri}/classes.txt: {len(classes)} classes do not fit 8-bit masks, in which {VOID} is "
            f"void; use at most {VOID}"
        )
    images = files_by_id(uri, "images", suffixes=_IMAGE_SUFFIXES)
    masks = files_by_id(uri, "masks", suffixes=(".png",))
    check_present(uri, splits, {"image in images/": images, "mask in masks/": masks})
    numbered = distinct_names(classes, range(len(classes)))
    return SegmentationData(uri, numbered, splits, images, masks, size_px)


def check_present(
    uri: str, splits: Mapping[str, tuple[str, ...]], kinds: Mapping[str, Mapping[str, str]]
) -> None:
    """Refuse a set whose lists name files that it lacks.

    Args:
        uri: of the set.
        splits: ids by split.
        kinds: what an id should have, in words -> URI by id.

    Raises:
        ShardError: an id has none.
    """
    for split, names in splits.items():
        for kind, found in kinds.items():
            absent = [name for name in names if name not in found]
            if absent:
                raise ShardError(
                    f"{uri}: {len(absent)} of {len(names)} ids in {split}.txt have no {kind} "
                    f"({_some(absent)}); add the files or remove the ids"
                )


def lines_of(
    uri: str, name: str, *, layout: str = _LAYOUT, numbered: bool = False, unique: bool = False
) -> tuple[str, ...]:
    """Return the lines of a list in a folder, blank ones left out.

    Raises:
        ShardError: it is missing, which ``layout`` says in words should be there, or empty, or
            lines are ``numbered`` and one before the last is blank, or ``unique`` and one repeats.
    """
    path = storage.join(uri, name)
    if not storage.exists(path):
        raise ShardError(f"{path}: is missing; {layout}")
    read = [line.strip() for line in storage.read_lines(path)]
    lines = tuple(filter(None, read))
    if numbered and "" in read[: len(lines)]:
        blank = read.index("") + 1
        raise ShardError(f"{path}: line {blank} is blank, and line numbers are labels; remove it")
    if not lines:
        raise ShardError(f"{path}: is empty; write one name per line")
    repeated = [line for line, count in Counter(lines).items() if count > 1]
    if unique and repeated:
        raise ShardError(
            f"{path}: {len(repeated)} lines occur more than once ({_some(repeated)}), and would "
            "count several times; remove the repeated lines"
        )
    return lines


def files_by_id(uri: str, folder: str, *, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return id -> URI of the files in a folder; an id is a path without its suffix.

    Raises:
        ShardError: two files have one id.
    """
    start = len(storage.split_query(storage.absolute(storage.join(uri, folder)))[0]) + 1
    found: dict[str, str] = {}
    for file in storage.list_files(storage.join(uri, folder)):
        name, dot, suffix = storage.split_query(file.uri)[0][start:].rpartition(".")
        if (dot + suffix).lower() not in suffixes:
            continue
        if name in found:
            raise ShardError(
                f"{found[name]} and {file.uri} are two files of the id {name!r}; remove one of them"
            )
        found[name] = file.uri
    return found


def _max_pixels() -> int:
    """Return the most pixels of an image that Pillow reads."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _stacked(arrays: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
