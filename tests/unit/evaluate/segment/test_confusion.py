import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torchmetrics import JaccardIndex

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.scores import bootstrap_interval
from pcd_ray.evaluate.segment.confusion import ImageCounts, confusion_matrix, score_of


def test_scores_of_a_matrix_worked_out_by_hand() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 4, 4, 0], [0, 0, 0, 0]])
    score = score_of(confusion, ["a", "b", "c", "absent"])
    # unions: a 6+2+1 = 9, b 3+1+2+4 = 10, c 4+4 = 8
    assert score.iou_pct["a"] == pytest.approx(100 * 6 / 9)
    assert score.iou_pct["b"] == pytest.approx(100 * 3 / 10)
    assert score.iou_pct["c"] == pytest.approx(100 * 4 / 8)
    assert math.isnan(score.iou_pct["absent"])
    assert score.miou_pct == pytest.approx(100 * (6 / 9 + 3 / 10 + 4 / 8) / 3)
    assert score.macc_pct == pytest.approx(100 * (6 / 8 + 3 / 4 + 4 / 8) / 3)
    assert score.aacc_pct == pytest.approx(100 * 13 / 20)


def test_a_class_that_is_predicted_but_never_true_lowers_miou_not_macc() -> None:
    score = score_of(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert score.miou_pct == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert score.macc_pct == pytest.approx(75)


def test_rows_are_the_truth_and_void_does_not_count() -> None:
    truth = torch.tensor([[0, 0, 1], [1, 255, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.uint8)
    found = confusion_matrix(truth, predicted, num_classes=3, void=255)
    assert found.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_miou_equals_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(7, (4, 9, 11), generator=generator)  # classes 7 and 8 are absent
    predicted = torch.randint(8, (4, 9, 11), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    metric = JaccardIndex("multiclass", num_classes=9, ignore_index=255, average="macro")
    expected = 100 * float(metric(predicted, truth))
    confusion = confusion_matrix(truth, predicted, num_classes=9, void=255)
    assert score_of(confusion, list("abcdefghi")).miou_pct == pytest.approx(expected, rel=1e-6)


def test_masks_without_a_labelled_pixel_are_refused() -> None:
    with pytest.raises(ShardError, match="0 labelled pixels; label some"):
        score_of(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"])


def test_a_draw_of_void_images_alone_has_the_scores_of_the_split() -> None:
    void = torch.zeros(2, 2, dtype=torch.int64)
    counts = ImageCounts.of([torch.tensor([[3, 1], [2, 4]]), void])
    whole = score_of(torch.tensor([[3, 1], [2, 4]]), ["a", "b"])
    draws = torch.tensor([[1, 1], [0, 2]], dtype=torch.float64)
    expected = {"miou": whole.miou_pct, "macc": whole.macc_pct, "aacc": whole.aacc_pct}
    for name, values in counts.scores(draws).items():
        assert values.tolist() == pytest.approx([expected[name]] * 2), name
        statistic = partial(_scores_of, counts, name)  # a quarter of the draws are void
        assert bootstrap_interval(statistic, 2, seed=0) == pytest.approx((expected[name],) * 2)


def _scores_of(counts: ImageCounts, name: str, times: Tensor) -> Tensor:
    return counts.scores(times)[name]
