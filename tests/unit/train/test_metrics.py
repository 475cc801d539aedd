import pytest
import torch

from pcd_ray import metric_names as names
from pcd_ray.train.metrics import NewestScores, mean_over_ranks, warnings_of

GOOD = {names.QUEUE_FILL: 100.0, names.STUDENT_SPREAD: 0.06, names.TEACHER_SPREAD: 0.06}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (names.QUEUE_FILL, 99.0, "the queue is 99% full"),
        (names.STUDENT_SPREAD, 0.04, "the student's features are nearly constant"),
        (names.TEACHER_SPREAD, 0.04, "the teacher's features are nearly constant"),
    ],
)
def test_a_warning_says_what_is_wrong_and_nothing_else_does(
    name: str, value: float, text: str
) -> None:
    assert warnings_of(GOOD) == []
    (warning,) = warnings_of(GOOD | {name: value})
    assert warning.startswith(text)


def test_a_loss_without_a_queue_has_none_to_warn_of() -> None:
    assert warnings_of({k: v for k, v in GOOD.items() if k != names.QUEUE_FILL}) == []


def test_alone_the_mean_over_ranks_is_the_value() -> None:
    values = {"a": torch.tensor(1.5, dtype=torch.float64), "b": torch.tensor(2)}
    assert mean_over_ranks(values) == {"a": 1.5, "b": 2.0}


def test_a_step_owns_the_scores_that_were_measured_at_it_alone() -> None:
    newest = NewestScores()
    newest.add(10, {names.KNN_TOP1: 30.0, names.SEGMENTATION_MIOU: 40.0})
    assert newest.of_step(10) == sorted([names.KNN_TOP1, names.SEGMENTATION_MIOU])
    newest.add(20, {names.KNN_TOP1: 31.0})
    assert newest.values == {names.KNN_TOP1: 31.0, names.SEGMENTATION_MIOU: 40.0}
    assert (newest.of_step(20), newest.of_step(10), newest.of_step(21)) == (
        [names.KNN_TOP1],
        [],
        [],
    )
