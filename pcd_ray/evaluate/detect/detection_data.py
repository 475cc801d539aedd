"""A detection set: images with boxes and instance masks in COCO's json files.

    images/                   a folder of our own layout, with
    instances_train.json      and instances_val.json beside it; or, as COCO 2017 is downloaded,
    train2017/ val2017/       with annotations/instances_train2017.json and instances_val2017.json

Everything that can be seen without decoding an image is checked when a set is opened.

Shapes: N annotations of an image, crowds included.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pcd_ray import storage
from pcd_ray.data.decode import UnreadableImage, decode_rgb, unreadable
from pcd_ray.errors import ShardError
from pcd_ray.evaluate.detect.detection_annotations import Annotation, LeftOut, annotation_of
from pcd_ray.evaluate.detect.detection_masks import Segmentation, damaged
from pcd_ray.evaluate.scores import distinct_names
from pcd_ray.uris import OutsideError

SPLITS = ("train", "val")

_CROWDS = "crowd regions are no training targets; AP ignores what is found in them"
_EMPTY = "images have no annotation; they are kept"


@dataclass(frozen=True, slots=True)
class DetectionImage:
    """One image and what is marked on it."""

    id: int
    uri: str
    width: int
    height: int
    boxes: NDArray[np.float64]
    """(N, 4): left, top, right, bottom in pixels, inside the image."""
    labels: NDArray[np.int64]
    """(N,) numbers of classes, from 0."""
    crowd: NDArray[np.bool_]
    """(N,) whether a box holds a group that nobody counted."""
    areas: NDArray[np.float64]
    """(N,) areas in pixels, as the file gives them: they decide what is small."""
    segmentations: tuple[Segmentation, ...]
    """N masks."""

    def pixels(self, *, max_pixels: int, max_decode_s: float) -> Image.Image:
        """Return the image, upright, in RGB.

        Args:
            max_pixels: images with more are refused.
            max_decode_s: seconds of processor time that decoding may take.

        Raises:
            ShardError: it cannot be decoded, or is not of the size that the json file says.
        """
        try:
            data = storage.read_bytes(self.uri)
            image = decode_rgb(data, max_pixels=max_pixels, max_decode_s=max_decode_s)
        except UnreadableImage as error:
            raise unreadable(str(self.id), self.uri, str(error)) from error
        if image.size != (self.width, self.height):
            raise ShardError(
                f"{self.uri}: the image is {image.width} x {image.height} px (upright), its record "
                f"{self.id} says {self.width} x {self.height}; mend the record, or the EXIF "
                "orientation of the file"
            )
        return image


@dataclass(frozen=True, slots=True)
class DetectionSplit:
    """The images of one json file, in its order."""

    file: str
    images: tuple[DetectionImage, ...]
    notes: tuple[str, ...]
    """What was clipped, left out or is unusual, with counts."""

    @property
    def num_objects(self) -> int:
        """Annotations that are no crowds."""
        return sum(int((~image.crowd).sum()) for image in self.images)


@dataclass(frozen=True, slots=True)
class DetectionData:
    """An opened set; both splits count classes alike."""

    uri: str
    classes: tuple[str, ...]
    """Names, by label; each once."""
    category_ids: tuple[int, ...]
    """Ids of the json files, by label; they may have gaps."""
    train: DetectionSplit
    val: DetectionSplit
    sha256: str
    """Of both json files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was clipped, left out or is unusual, in both splits."""
        return (*self.train.notes, *self.val.notes, *self._empty_classes())

    def _empty_classes(self) -> Iterator[str]:
        for split in (self.train, self.val):
            labels = [image.labels[~image.crowd] for image in split.images]
            there = np.bincount(np.concatenate(labels), minlength=len(self.classes))
            empty = [name for name, count in zip(self.classes, there, strict=True) if not count]
            if empty:
                yield (
                    f"{storage.name_of(split.file)}: {len(empty)} of {len(self.classes)} classes "
                    f"have no object ({_some(empty)})"
                )


def open_detection(uri: str, *, masks: bool) -> DetectionData:
    """Open a folder or bucket prefix in one of the layouts at the top of this module.

    Args:
        uri: the folder.
        masks: every object must have a mask, objects with an empty one are left out.

    Raises:
        ShardError: a file is missing or no COCO json, or an image, a box, a mask or a category
            of it is wrong.
        StorageError: the folder cannot be read.
    """
    places = _places(uri)
    texts = {split: storage.read_text(file) for split, (file, _) in places.items()}
    records = {split: _record(places[split][0], text) for split, text in texts.items()}
    categories = {split: _categories(places[split][0], records[split]) for split in SPLITS}
    _check_same(categories, {split: file for split, (file, _) in places.items()})
    ids = sorted(categories["train"])
    label_of = {id_: label for label, id_ in enumerate(ids)}
    opened = {
        split: _open_split(*places[split], records[split], label_of, masks) for split in SPLITS
    }
    for split, found in opened.items():
        if not found.num_objects:
            raise ShardError(
                f"{found.file}: 0 objects to {'learn' if split == 'train' else 'find'} "
                f"({'; '.join(found.notes)}); correct or add annotations that are not crowds"
            )
    names = distinct_names([categories["train"][id_] for id_ in ids], ids)
    sha256 = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return DetectionData(uri, names, tuple(ids), opened["train"], opened["val"], sha256)


def _places(uri: str) -> dict[str, tuple[str, str]]:
    """Return split -> (json file, folder of its images)."""
    coco = {
        split: (
            storage.join(uri, "annotations", f"instances_{split}2017.json"),
            storage.join(uri, f"{split}2017"),
        )
        for split in SPLITS
    }
    ours = {
        split: (storage.join(uri, f"instances_{split}.json"), storage.join(uri, "images"))
        for split in SPLITS
    }
    for layout in (ours, coco):
        if all(storage.exists(file) for file, _ in layout.values()):
            return layout
    raise ShardError(
        f"{uri}: is no detection set; it needs images/, instances_train.json and "
        "instances_val.json, or COCO's train2017/, val2017/, annotations/instances_train2017.json "
        "and annotations/instances_val2017.json"
    )


def _record(file: str, text: str) -> dict[str, Any]:
    try:
        record = storage.parse_json(text)
    except ValueError as error:
        raise ShardError(f"{file}: is no json ({error}); write it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(record, dict) or not isinstance(record.get(key), list):
            raise ShardError(f"{file}: has no list {key!r}; a COCO file has one")
        for item in record[key]:
            if not isinstance(item, dict) or type(item.get("id")) is not int:
                raise ShardError(
                    f"{file}: {str(item)[:80]} in {key!r} has no whole number as id; give each one"
                )
        _check_unique(file, key, (item["id"] for item in record[key]))
    return dict(record)


def _check_unique(file: str, kind: str, ids: Iterable[int]) -> None:
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ShardError(
            f"{file}: {len(repeated)} ids in {kind!r} occur more than once ({_some(repeated)}); "
            "give each its own"
        )


def _categories(file: str, record: Mapping[str, Any]) -> dict[int, str]:
    named = {item["id"]: str(item.get("name", item["id"])) for item in record["categories"]}
    if not named:
        raise ShardError(f"{file}: 'categories' is empty; list the classes, each with id and name")
    return named


def _check_same(categories: Mapping[str, dict[int, str]], files: Mapping[str, str]) -> None:
    other = [pair for pair in categories["val"].items() if pair not in categories["train"].items()]
    if other:
        raise ShardError(
            f"{files['val']}: categories {_some(other)} are not those of {files['train']}; list "
            "the same ids and names in both"
        )


def _open_split(
    file: str,
    folder: str,
    record: Mapping[str, Any],
    label_of: Mapping[int, int],
    masks: bool,
) -> DetectionSplit:
    uris = _image_uris(file, folder, record["images"])
    marked: dict[int, list[dict[str, Any]]] = {item["id"]: [] for item in record["images"]}
    for item in record["annotations"]:
        for key, known in (("image", marked), ("category", label_of)):
            _check_known(file, item, key, known)
        marked[item["image_id"]].append(item)
    counts: LeftOut = defaultdict(list)
    images = tuple(
        _image(file, item, uris[item["id"]], marked.pop(item["id"]), label_of, masks, counts)
        for item in record["images"]
    )
    name = storage.name_of(file)
    notes = tuple(
        f"{name}: {len(ids):,} {what} (ids {_some(ids)})" for what, ids in sorted(counts.items())
    )
    return DetectionSplit(file, images, notes)


def _check_known(file: str, item: Mapping[str, Any], key: str, known: Container[int]) -> None:
    """Refuse an annotation of no image or category of its file."""
    id_ = item.get(f"{key}_id")
    if type(id_) is not int:  # true and 1.0 would pass for 1
        raise damaged(item["id"], file, f"{key}_id={id_!r:.80} is no whole number")
    if id_ not in known:
        raise damaged(item["id"], file, f"there is no {key} {id_}")


def _image_uris(file: str, folder: str, images: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return image id -> URI.

    Raises:
        ShardError: there are no images, or a file is missing.
    """
    if not images:
        raise ShardError(f"{file}: 'images' is empty; list the images")
    there = {stored.uri for stored in storage.list_files(folder)}
    place = storage.absolute(folder)
    try:
        uris = {item["id"]: storage.inside(place, item.get("file_name")) for item in images}
    except OutsideError as error:
        raise ShardError(f"{file}: file_name {error}") from error
    absent = [uri for uri in uris.values() if uri not in there]
    if absent:
        raise ShardError(
            f"{file}: {len(absent)} of {len(uris)} images are not in {folder} ({_some(absent)}); "
            "add the files or remove their records"
        )
    return uris


def _image(  # noqa: PLR0913 - one record, its place and what is counted on the way
    file: str,
    item: Mapping[str, Any],
    uri: str,
    annotations: Sequence[Mapping[str, Any]],
    label_of: Mapping[int, int],
    masks: bool,
    counts: LeftOut,
) -> DetectionImage:
    width, height = item.get("width"), item.get("height")
    if not (type(width) is int and type(height) is int and width > 0 and height > 0):
        raise ShardError(
            f"{file}: image {item['id']} is {width!r} x {height!r} px; give width and height as "
            "whole numbers above 0"
        )
    kept: list[Annotation] = []
    for annotation in annotations:
        try:
            parsed = annotation_of(annotation, width, height, masks, counts)
        except ValueError as error:
            raise damaged(annotation["id"], file, str(error)) from error
        if parsed is not None:
            kept.append(parsed)
            if parsed.crowd:
                counts[_CROWDS].append(annotation["id"])
    if not annotations:
        counts[_EMPTY].append(item["id"])
    return DetectionImage(
        id=item["id"],
        uri=uri,
        width=width,
        height=height,
        boxes=np.array([one.box for one in kept], np.float64).reshape(-1, 4),
        labels=np.array([label_of[one.category_id] for one in kept], np.int64),
        crowd=np.array([one.crowd for one in kept], np.bool_),
        areas=np.array([one.area for one in kept], np.float64),
        segmentations=tuple(one.segmentation for one in kept),
    )


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:3])
    return shown + (", ..." if len(items) > 3 else "")
