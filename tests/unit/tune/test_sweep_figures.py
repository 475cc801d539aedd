"""Pictures of a sweep: which there are, and what they are made of."""

import io
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from pcd_ray.tune.study import HISTORY
from pcd_ray.tune.sweep_figures import importances, sweep_figures

DISTRIBUTIONS: dict[str, Any] = {
    "loss.temperature": FloatDistribution(0.03, 0.5, log=True),
    "student.mhsa.depth": CategoricalDistribution((0, 1, 2)),
}


def study_of(trials: int, *, cost: bool = False, stopped: int = 0) -> optuna.Study:
    """Return a study whose score falls with the temperature and never with the depth."""
    study = optuna.create_study(directions=["maximize"] + ["minimize"] * cost)
    for number in range(trials + stopped):
        temperature = 0.03 * 1.2**number
        over = number < trials
        score = 50 - 100 * temperature
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if over else TrialState.PRUNED,
                values=[score, float(number)][: 1 + cost] if over else None,
                params={"loss.temperature": temperature, "student.mhsa.depth": number * 7 % 3},
                distributions=DISTRIBUTIONS,
                user_attrs={HISTORY: [[1, score - 1], [2, score]][: 2 if over else 1]},
            )
        )
    return study


@pytest.mark.parametrize(
    ("trials", "cost", "names"),
    [
        (0, False, set()),
        (1, False, {"learning_curves"}),
        (12, False, {"learning_curves", "history", "slices", "importance", "parallel"}),
        (12, True, {"learning_curves", "history", "slices", "importance", "parallel", "trade_off"}),
    ],
)
def test_pictures_are_drawn_when_there_are_trials_enough(
    trials: int, cost: bool, names: set[str]
) -> None:
    study = study_of(trials, cost=cost)
    drawn = sweep_figures(study, score="kNN top-1 %", cost="seconds" if cost else "")
    assert {name.removesuffix(".png") for name in drawn} == names
    for png in drawn.values():
        colours = Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 20, "something is on it"


def test_a_stopped_trial_is_drawn_too() -> None:
    with_it = sweep_figures(study_of(3, stopped=1), score="score", cost="")
    without = sweep_figures(study_of(3), score="score", cost="")
    for name in ("learning_curves.png", "history.png", "slices.png"):
        assert with_it[name] != without[name]


@pytest.mark.parametrize("params", [{}, {"student.mhsa.depth": 1}])
def test_where_nothing_varied_there_are_no_slices(params: dict[str, Any]) -> None:
    study = optuna.create_study(direction="maximize")
    for number in range(12):
        study.add_trial(
            create_trial(
                value=float(number),
                params=params,
                distributions={name: DISTRIBUTIONS[name] for name in params},
                user_attrs={HISTORY: [[1, float(number)]]},
            )
        )
    drawn = sweep_figures(study, score="score", cost="")
    assert set(drawn) == {"learning_curves.png", "history.png"}


def test_the_option_that_makes_the_score_is_the_important_one() -> None:
    shares = importances(study_of(15))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["loss.temperature"] > 0.8


def test_with_few_trials_no_option_is_called_important() -> None:
    assert importances(study_of(9)) == {}
