"""Average precision of draws of images: COCO's for the images drawn."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from test_detection_ap import CLASSES, IDS, drawn_set, noisy_results

from pcd_ray.evaluate.detect.detection_ap import average_precision, evaluated
from pcd_ray.evaluate.detect.detection_draws import intervals_of, mean_over_classes, ranked_classes

KINDS: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm")


@pytest.mark.parametrize("of", KINDS)
def test_each_image_once_is_cocos_average_precision(of: Literal["bbox", "segm"]) -> None:
    images = drawn_set()
    results = noisy_results(images)
    judged = evaluated(images, results, category_ids=IDS, of=of)
    found = mean_over_classes(ranked_classes(judged), np.ones((1, len(images))))[0]  # (T,)
    coco = average_precision(images, results, classes=CLASSES, category_ids=IDS, of=of)
    assert found.mean() == pytest.approx(coco.summary["ap"], abs=1e-9)
    assert found[0] == pytest.approx(coco.summary["ap50"], abs=1e-9)
    assert found[5] == pytest.approx(coco.summary["ap75"], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_is_cocos_average_precision_of_the_images_drawn(seed: int) -> None:
    """An image that is drawn twice is there twice, under two ids."""
    images = drawn_set()
    results = noisy_results(images)
    judged = evaluated(images, results, category_ids=IDS, of="bbox")
    times = np.random.default_rng(seed).multinomial(len(images), [1 / len(images)] * len(images))
    found = mean_over_classes(ranked_classes(judged), times[None].astype(float))[0]
    copies: list[Any] = []
    again: list[dict[str, Any]] = []
    for image, count in zip(images, times, strict=True):
        for _ in range(count):
            copies.append(replace(image, id=len(copies)))
            mine = [result for result in results if result["image_id"] == image.id]
            again += [{**result, "image_id": copies[-1].id} for result in mine]
    there = {int(label) for image in copies for label in image.labels[~image.crowd]}
    assert there == {0, 1, 2}, "a draw with all classes: no rule is needed for absent ones"
    coco = average_precision(copies, again, classes=CLASSES, category_ids=IDS, of="bbox")
    assert found.mean() == pytest.approx(coco.summary["ap"], abs=1e-9)
    assert found[0] == pytest.approx(coco.summary["ap50"], abs=1e-9)


def test_a_draw_without_a_class_leaves_its_value() -> None:
    images = drawn_set(crowds=False)
    results = noisy_results(images)
    judged = evaluated(images, results, category_ids=IDS, of="bbox")
    classes = ranked_classes(judged)
    times = np.array([[float(not (image.labels == 0).any()) for image in images]])
    whole = np.ones((1, len(images)))
    expected = sum(
        each.average_precision(whole if label == 0 else times)
        for label, each in enumerate(classes)
        if each.objects.any()
    )
    np.testing.assert_allclose(mean_over_classes(classes, times), 100 * expected / 3)


def test_intervals_hold_the_value_and_are_drawn_equally() -> None:
    images = drawn_set()
    results = noisy_results(images)
    coco = average_precision(images, results, classes=CLASSES, category_ids=IDS, of="bbox")
    assert list(coco.intervals) == ["ap", "ap50", "ap75"]
    for name, (low, high) in coco.intervals.items():
        assert low < (coco.summary[name] or 0) < high
    judged = evaluated(images, results, category_ids=IDS, of="bbox")
    again = intervals_of(ranked_classes(judged), judged.params.iouThrs, seed=0)
    assert again == coco.intervals
