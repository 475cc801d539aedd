import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.segment.confusion import ImageCounts, confusion_matrix, score_of, sum_of
from pcd_ray.evaluate.segment.segmentation_scores import segmentation_scores

CLASSES = ("road", "sky", "tree", "sign", "never")
Masks = list[np.ndarray[Any, np.dtype[np.uint8]]]


def drawn(seed: int, images: int = 7) -> tuple[Masks, Masks]:
    """True and predicted masks of other sizes; two thirds are right, some are void."""
    random = np.random.default_rng(seed)
    truth, predicted = [], []
    for _ in range(images):
        shape = tuple(random.integers(5, 12, 2))
        true = random.integers(0, 4, shape).astype(np.uint8)
        guess = np.where(random.random(shape) < 0.67, true, random.integers(0, 4, shape))
        true[random.random(shape) < 0.2] = 255
        truth.append(true)
        predicted.append(guess.astype(np.uint8))
    return truth, predicted


def confusions_of(truth: Masks, predicted: Masks) -> list[torch.Tensor]:
    return [
        confusion_matrix(torch.from_numpy(t), torch.from_numpy(p), num_classes=5, void=255)
        for t, p in zip(truth, predicted, strict=True)
    ]


def numpy_scores(truth: Masks, predicted: Masks) -> tuple[float, float, float, dict[str, float]]:
    """mIoU, mAcc, aAcc and IoU by class, from the pixels themselves."""
    true = np.concatenate([mask.ravel() for mask in truth])
    guess = np.concatenate([mask.ravel() for mask in predicted])
    guess, true = guess[true != 255], true[true != 255]
    iou, acc = {}, []
    for label, name in enumerate(CLASSES):
        both = np.sum((true == label) & (guess == label))
        either = np.sum((true == label) | (guess == label))
        if either:
            iou[name] = 100 * both / either
        if np.any(true == label):
            acc.append(100 * both / np.sum(true == label))
    right = 100 * float(np.mean(true == guess))
    return float(np.mean(list(iou.values()))), float(np.mean(acc)), right, iou


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_an_independent_computation(seed: int) -> None:
    truth, predicted = drawn(seed)
    scores = segmentation_scores({"val": confusions_of(truth, predicted)}, CLASSES, seed=0)
    miou, macc, aacc, iou = numpy_scores(truth, predicted)
    assert list(scores.values) == ["miou", "macc", "aacc"]
    assert scores.values == pytest.approx({"miou": miou, "macc": macc, "aacc": aacc}, rel=1e-12)
    assert scores.classes["iou"].pop("never") is None
    assert scores.classes["iou"] == pytest.approx(iou, rel=1e-12)


def test_a_draw_of_images_scores_as_these_images_do() -> None:
    truth, predicted = drawn(5)
    times = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 3, 0, 1, 0, 0, 2]]).double()
    found = ImageCounts.of(confusions_of(truth, predicted)).scores(times)
    for row, drawn_images in enumerate(([*range(7)], [1, 1, 1, 3, 6, 6])):
        again = [truth[i] for i in drawn_images], [predicted[i] for i in drawn_images]
        expected = numpy_scores(*again)
        values = [float(found[name][row]) for name in ("miou", "macc", "aacc")]
        assert values == pytest.approx(expected[:3], rel=1e-12)


def test_intervals_hold_the_value_and_shrink_with_more_images() -> None:
    few, many = (
        segmentation_scores({"val": confusions_of(*drawn(1, images))}, CLASSES, seed=0)
        for images in (6, 60)
    )
    for scores in (few, many):
        for name, (low, high) in scores.intervals.items():
            assert low < scores.values[name] < high
    widths = [s.intervals["miou"][1] - s.intervals["miou"][0] for s in (few, many)]
    assert widths[1] < widths[0] / 2  # about the square root of 10


def test_other_splits_are_named_and_the_matrix_is_there() -> None:
    val, test = confusions_of(*drawn(1)), confusions_of(*drawn(2))
    scores = segmentation_scores({"val": val, "test": test}, CLASSES, seed=0)
    assert list(scores.values)[::3] == ["miou", "test_miou"]
    assert scores.values["test_miou"] == score_of(sum_of(test), CLASSES).miou_pct
    assert set(scores.classes) == {"iou", "test_iou"}
    assert scores.about["confusion"]["test"] == sum_of(test).tolist()
    for name in ("confusion.png", "test_confusion.png"):
        picture = Image.open(io.BytesIO(scores.pictures[name])).convert("RGB")
        assert len(picture.getcolors(1 << 24)) > 50


def test_a_split_without_labels_is_refused() -> None:
    with pytest.raises(ShardError, match="0 labelled pixels"):
        segmentation_scores({"val": [torch.zeros(5, 5, dtype=torch.int64)]}, CLASSES, seed=0)


def test_a_class_in_one_image_does_not_shift_the_draws() -> None:
    """Half of the draws would leave out, or score 0, what one of many images shows."""
    common = torch.tensor([[80, 20, 0], [20, 80, 0], [0, 0, 0]])
    rare = torch.tensor([[80, 18, 2], [20, 80, 0], [40, 55, 5]])  # its class has an IoU of 5%
    confused = torch.tensor([[80, 18, 2], [20, 80, 0], [0, 0, 0]])  # predicted, not there
    images = [*[common] * 10, *[confused] * 10, rare]
    counts = ImageCounts.of(images)
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(images), (4000, len(images)), generator=random)
    times = torch.zeros(4000, len(images), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    whole = score_of(sum_of(images), ["a", "b", "rare"])
    found = counts.scores(times)
    # left out in 36% of draws, the class moves the mean by 0.36 x (64 - 5) x 1 / 3 > 6 points
    assert float(found["miou"].mean()) == pytest.approx(whole.miou_pct, abs=0.5)
    assert float(found["macc"].mean()) == pytest.approx(whole.macc_pct, abs=0.5)
