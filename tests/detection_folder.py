"""Small detection sets in COCO's form: coloured shapes on noise, and what is wrong with some."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {3: (220, 40, 40), 7: (40, 60, 220)}
"""Category id, with gaps -> colour of its shapes."""
SIZE = (64, 96)
"""(height, width) of an image."""


def square(left: float, top: float, width: float, height: float) -> list[list[float]]:
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(id_: int, image_id: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": 3,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": square(*box),
        **more,
    }


def record(num_images: int, *, start: int = 0) -> dict[str, Any]:
    """One red and one blue rectangle on each image."""
    random = np.random.default_rng(start)
    images, annotations = [], []
    for number in range(start, start + num_images):
        id_ = 100 + number
        images.append({"id": id_, "file_name": f"{id_}.png", "width": SIZE[1], "height": SIZE[0]})
        for place, category in enumerate(COLOURS):
            left = float(random.integers(2, 14)) + 46 * place
            top, width, height = (
                float(random.integers(*span)) for span in ((4, 16), (22, 32), (20, 42))
            )
            box = [left, top, width, height]
            annotations.append(annotation(2 * number + place, id_, box, category_id=category))
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def paint(given: dict[str, Any], folder: Path) -> None:
    """Draw the images of a record, each annotation a filled rectangle."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in given["images"]:
        random = np.random.default_rng(image["id"])
        pixels = random.integers(90, 150, (image["height"], image["width"], 3)).astype(np.uint8)
        for item in given["annotations"]:
            if item["image_id"] == image["id"] and item["category_id"] in COLOURS:
                left, top, width, height = (int(value) for value in item["bbox"])
                pixels[max(0, top) : top + height, max(0, left) : left + width] = COLOURS[
                    item["category_id"]
                ]
        Image.fromarray(pixels).save(folder / image["file_name"])


def write_set(
    folder: Path, train: dict[str, Any] | None = None, val: dict[str, Any] | None = None
) -> str:
    """Write a set, its images included, and return its URI."""
    for split, given in (("train", train or record(4)), ("val", val or record(3, start=4))):
        paint(given, folder / "images")
        (folder / f"instances_{split}.json").write_text(json.dumps(given))
    return str(folder)
