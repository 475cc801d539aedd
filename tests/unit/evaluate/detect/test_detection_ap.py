"""Average precision equals pycocotools'; perfect detections give 100."""

import contextlib
import io
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from detection_folder import SIZE
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pcd_ray.evaluate.detect.detection import Detections
from pcd_ray.evaluate.detect.detection_ap import (
    Result,
    average_precision,
    renumbered,
    results_of,
    truth_of,
)
from pcd_ray.evaluate.detect.detection_data import DetectionImage
from pcd_ray.evaluate.detect.detection_masks import run_lengths_of

CLASSES = ("cat", "dog", "cow", "absent")
IDS = (9, 2, 70, 44)  # with gaps, and not in the order of the names
LARGE = (300, 400)


def drawn_set(*, crowds: bool = True) -> list[DetectionImage]:
    """Images with objects small, medium and large, some crowds, one image without any."""
    random = np.random.default_rng(4)
    images = []
    for id_ in range(12):
        count = 0 if id_ == 3 else int(random.integers(1, 6))
        sides = random.choice([20, 60, 150], (count, 1)) * random.uniform(0.8, 1.2, (count, 2))
        corners = random.uniform(0, 1, (count, 2)) * (np.array(LARGE[::-1]) - sides)
        boxes = np.concatenate([corners, corners + sides], 1).round()
        images.append(
            DetectionImage(
                id=id_,
                uri="",
                width=LARGE[1],
                height=LARGE[0],
                boxes=boxes,
                labels=random.integers(0, 3, count),
                crowd=(random.random(count) < 0.25) & crowds,
                areas=sides.prod(1).round(),
                segmentations=tuple(run_lengths_of(filled(box)) for box in boxes),
            )
        )
    return images


def filled(box: Any, size: tuple[int, int] = LARGE) -> Any:
    bitmap = np.zeros(size, np.uint8)
    left, top, right, bottom = (int(value) for value in box)
    bitmap[top:bottom, left:right] = 1
    return bitmap


def noisy_results(images: list[DetectionImage]) -> list[Result]:
    """Detections near the truth, of the wrong class at times, twice at times, and elsewhere."""
    random = np.random.default_rng(5)
    results: list[Result] = []
    for image in images:
        extra = random.uniform(0, 200, (2, 2))
        near = np.repeat(image.boxes, 2, axis=0)
        boxes = np.concatenate([near + random.normal(0, 4, near.shape), np.tile(extra, (1, 2))])
        boxes[len(near) :, 2:] += 50
        boxes = np.clip(boxes.round(), 0, np.tile(LARGE[::-1], 2))
        labels = np.concatenate([np.repeat(image.labels, 2), random.integers(0, 4, 2)])
        wrong = random.random(len(labels)) < 0.2
        labels[wrong] = random.integers(0, 4, int(wrong.sum()))
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = [filled(box) for box in boxes[kept]]
        found = Detections(
            boxes=torch.from_numpy(boxes[kept]),
            labels=torch.from_numpy(labels[kept]),
            scores=torch.from_numpy(random.random(int(kept.sum()))),
            masks=torch.from_numpy(np.stack(masks)),
        )
        results += results_of(image, found, IDS)
    return results


def pycocotools_ap(
    images: list[DetectionImage], results: list[Result], of: Literal["bbox", "segm"]
) -> tuple[list[float], dict[int, float]]:
    """Its first six statistics, and AP of each category."""
    given = renumbered(images, results, category_ids=IDS, of=of)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = truth_of(images, num_classes=len(IDS))
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(given), of)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    precision = judged.eval["precision"][:, :, :, 0, -1]
    by_id = {id_: float(precision[:, :, k].mean()) for k, id_ in enumerate(IDS)}
    return list(judged.stats[:6]), by_id


@pytest.mark.parametrize("of", ["bbox", "segm"])
def test_it_is_that_of_pycocotools(of: Literal["bbox", "segm"]) -> None:
    images = drawn_set()
    results = noisy_results(images)
    ours = average_precision(images, results, classes=CLASSES, category_ids=IDS, of=of)
    stats, by_id = pycocotools_ap(images, results, of)
    assert list(ours.summary) == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    np.testing.assert_allclose(
        np.array(list(ours.summary.values()), float), 100 * np.array(stats), atol=1e-9
    )
    assert 5 < stats[0] * 100 < 95
    for name, id_ in zip(CLASSES, IDS, strict=True):
        value = ours.classes[name]
        if value is None:
            assert by_id[id_] == -1
        else:
            assert value == pytest.approx(100 * by_id[id_], abs=1e-9)
    assert [name for name, value in ours.classes.items() if value is None] == ["absent"]


def perfect(images: list[DetectionImage]) -> list[Result]:
    results: list[Result] = []
    for image in images:
        shown = ~image.crowd
        masks = [filled(box) for box in image.boxes[shown]]
        found = Detections(
            boxes=torch.from_numpy(image.boxes[shown]),
            labels=torch.from_numpy(image.labels[shown]),
            scores=torch.ones(int(shown.sum())),
            masks=torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *LARGE), np.uint8)),
        )
        results += results_of(image, found, IDS)
    return results


@pytest.mark.parametrize("of", ["bbox", "segm"])
def test_perfect_detections_give_100_and_none_give_0(of: Literal["bbox", "segm"]) -> None:
    images = drawn_set()
    best = average_precision(images, perfect(images), classes=CLASSES, category_ids=IDS, of=of)
    assert {round(value, 9) for value in best.summary.values() if value is not None} == {100.0}
    none = average_precision(images, [], classes=CLASSES, category_ids=IDS, of=of)
    assert none.summary["ap"] == 0


@pytest.mark.parametrize("start", [2**53, 2**64, -(2**53) - 4])
@pytest.mark.parametrize("of", ["bbox", "segm"])
def test_ids_of_any_size_give_the_scores_of_small_ones(
    of: Literal["bbox", "segm"], start: int
) -> None:
    """Neighboring whole numbers from 2**53 on are one number in floating point."""
    images = drawn_set()
    results = noisy_results(images)
    small = average_precision(images, results, classes=CLASSES, category_ids=IDS, of=of)
    ids = [start + label for label in range(len(IDS))]
    large = average_precision(
        [replace(image, id=start + image.id) for image in images],
        [
            result
            | {
                "image_id": start + result["image_id"],
                "category_id": ids[IDS.index(result["category_id"])],
            }
            for result in results
        ],
        classes=CLASSES,
        category_ids=ids,
        of=of,
    )
    assert large == small


def test_what_is_found_in_a_crowd_does_not_count() -> None:
    images = drawn_set()
    inside = [
        {
            "image_id": image.id,
            "category_id": IDS[image.labels[row]],
            "bbox": [box[0] + 1, box[1] + 1, 9.0, 9.0],
            "score": 1.0,  # above all others
        }
        for image in images
        for row, box in enumerate(image.boxes.tolist())
        if image.crowd[row]
    ]
    assert len(inside) > 2
    both = [*perfect(images), *inside]
    kept = average_precision(images, both, classes=CLASSES, category_ids=IDS, of="bbox")
    assert kept.summary["ap"] == pytest.approx(100)
    others = drawn_set(crowds=False)  # the same boxes, were they objects
    fallen = average_precision(others, both, classes=CLASSES, category_ids=IDS, of="bbox")
    assert fallen.summary["ap"] is not None
    assert fallen.summary["ap"] < 95


def test_results_are_boxes_with_width_and_height_and_ids_of_the_file() -> None:
    image = drawn_set()[0]
    found = Detections(
        boxes=torch.tensor([[1.0, 2, 11, 32]]),
        labels=torch.tensor([2]),
        scores=torch.tensor([0.5]),
        masks=torch.from_numpy(filled([1, 2, 11, 32], SIZE))[None],
    )
    (result,) = results_of(image, found, IDS)
    assert result["bbox"] == [1, 2, 10, 30]
    assert (result["image_id"], result["category_id"], result["score"]) == (image.id, 70, 0.5)
    assert isinstance(result["segmentation"]["counts"], str)
