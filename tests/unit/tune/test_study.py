"""A study outlives its driver: what is over stays, what ran goes on, what differs is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tiny import tiny_config

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, config_from_file, config_to_values, option_value
from pcd_ray.errors import ConfigError, TrainingError
from pcd_ray.ray_events import Event
from pcd_ray.tune import ray_trial
from pcd_ray.tune.ray_search import (
    EPOCH,
    FINISHED,
    NUMBER,
    SCORE,
    VALUES,
    StudySearch,
    reason_file,
    stopping_rule,
)
from pcd_ray.tune.records import best_config, best_trial, best_yaml, records_of, trials_csv
from pcd_ray.tune.space import open_space
from pcd_ray.tune.study import COST, OpenStudy, history_of, open_study

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}, "student.mhsa.depth": {"choice": [0, 1, 2]}}


def searching(root: Path, **tune: Any) -> Config:
    return tiny_config(
        run={"root": str(root), "name": "sweep"},
        tune={"space": SPACE, "scheduler": "asha", "reduction_factor": 2, **tune},
        train={"epochs": 4},
    )


def opened(config: Config) -> OpenStudy:
    return open_study(config, open_space(config), RunFolder.of(config), data_sha256="a" * 64)


def search(config: Config) -> StudySearch:
    folder = RunFolder.of(config)
    return StudySearch(opened(config), open_space(config), config, folder.file("trials"))


def report(score: float, epoch: int, **more: Any) -> dict[str, Any]:
    return {SCORE: score, EPOCH: epoch, **more}


def finish(searcher: StudySearch, trial_id: str, score: float, cost: float = 1.0) -> None:
    searcher.suggest(trial_id)
    searcher.on_trial_result(trial_id, report(score, 4))
    searcher.on_trial_complete(trial_id, report(score, 4, **{FINISHED: True, COST: cost}))


def test_the_first_trial_has_the_values_of_the_configuration(tmp_path: Path) -> None:
    config = searching(tmp_path)
    first = search(config).suggest("a")
    assert first is not None
    assert first[NUMBER] == 0
    assert first[VALUES] == {n: option_value(config, n) for n in SPACE}


def test_without_own_values_the_first_trial_is_drawn(tmp_path: Path) -> None:
    first = search(searching(tmp_path, own_values_first=False)).suggest("a")
    assert first is not None
    assert first[VALUES]["loss.temperature"] != 0.2


def test_trials_end_finished_stopped_or_failed(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    finish(searcher, "a", 50.0)
    searcher.suggest("b")
    searcher.on_trial_complete("b", report(10.0, 1))  # Tune tells a stopped trial's last score here
    searcher.suggest("c")
    reason = Path(reason_file(RunFolder.of(config).file("trials"), 2))
    reason.parent.mkdir(parents=True)
    reason.write_text("the loss is not finite")
    searcher.on_trial_complete("c", error=True)
    searcher.suggest("d")
    searcher.on_trial_complete("d", error=True)
    records = records_of(opened(config))
    assert [(r.state, r.score, r.epochs) for r in records] == [
        ("finished", 50.0, 4),
        ("stopped early", 10.0, 1),
        ("failed", None, 0),
        ("failed", None, 0),
    ]
    assert records[2].reason == "the loss is not finite"
    assert "out of memory" in records[3].reason
    assert f"`pcd-ray train {tmp_path}/sweep/trials/trial_0003/config.yaml`" in records[3].reason


def test_the_advice_of_a_failed_trial_is_what_is_true_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise TrainingError("the workers died; the same command goes on from step 12")

    monkeypatch.setattr(ray_trial, "train", train)
    base = config_to_values(searching(tmp_path))
    trials = str(tmp_path / "trials")
    with pytest.raises(TrainingError):
        ray_trial.run_trial(
            {NUMBER: 3, VALUES: {}}, base=base, trials_uri=trials, places={}, builder=None
        )
    assert Path(reason_file(trials, 3)).read_text() == (
        f"the workers died; `pcd-ray train {trials}/trial_0003/config.yaml` goes on from step 12; "
        "the sweep does not go on with this trial"
    )


def test_interrupted_trials_go_on_before_new_ones_with_their_numbers_and_values(
    tmp_path: Path,
) -> None:
    config = searching(tmp_path)
    first = search(config)
    finish(first, "a", 50.0)
    left = [first.suggest(name) for name in ("b", "c")]
    first.on_trial_result("b", report(20.0, 1))
    again = search(config)  # another driver: the first one is gone without a word
    assert [again.suggest(name) for name in ("x", "y")] == left
    again.on_trial_result("x", report(21.0, 2))
    new = again.suggest("z")
    assert new is not None
    assert new[NUMBER] == 3
    assert history_of(opened(config).trials()[1]) == {1: 20.0, 2: 21.0}


def test_a_later_sitting_draws_other_values_than_the_first_did(tmp_path: Path) -> None:
    config = searching(tmp_path, own_values_first=False, sampler="random")
    drawn = []
    for _ in range(3):
        searcher = search(config)
        finish(searcher, "a", 1.0)
        drawn.append(opened(config).trials()[-1].params["loss.temperature"])
    assert len(set(drawn)) == 3


def test_an_abandoned_trial_stays_running(tmp_path: Path) -> None:
    searcher = search(searching(tmp_path))
    searcher.suggest("a")
    searcher.on_trial_complete("a")
    assert len(opened(searching(tmp_path)).trials(TrialState.RUNNING)) == 1


class _Trial:
    def __init__(self, trial_id: str, number: int = 99) -> None:
        self.trial_id = trial_id
        self.config = {NUMBER: number}


def test_the_stopping_rule_remembers_trials_of_earlier_sittings(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    for number, score in enumerate((60.0, 70.0, 80.0)):
        searcher.suggest(str(number))
        searcher.on_trial_result(str(number), report(score, 1))
        searcher.on_trial_result(str(number), report(score + 1, 2))
        searcher.on_trial_complete(str(number), report(score + 1, 2))
    rule = stopping_rule(config, opened(config))
    fresh = stopping_rule(config, opened(searching(tmp_path / "other")))
    for score, decision in ((90.0, "CONTINUE"), (10.0, "STOP")):
        trial: Any = _Trial(f"new_{score}")
        rule.on_trial_add(None, trial)
        assert rule.on_trial_result(None, trial, report(score, 1)) == decision
        fresh.on_trial_add(None, trial)
    alone: Any = _Trial("new_10.0")
    assert fresh.on_trial_result(None, alone, report(10.0, 1)) == "CONTINUE"


def test_the_median_rule_remembers_too_and_pauses_none(tmp_path: Path) -> None:
    config = searching(tmp_path, scheduler="median")
    searcher = search(config)
    for number, score in enumerate((60.0, 70.0, 80.0)):
        finish(searcher, str(number), score)
    rule = stopping_rule(config, opened(config))  # no controller to ask whether others wait
    for score, decision in ((90.0, "CONTINUE"), (10.0, "STOP")):
        trial: Any = _Trial(f"new_{score}")
        rule.on_trial_add(None, trial)
        assert rule.on_trial_result(None, trial, report(score, 4)) == decision


def reported(searcher: StudySearch, number: int, scores: Sequence[float]) -> None:
    """Begin a trial and report its scores, one epoch after the other."""
    searcher.suggest(str(number))
    for epoch, score in enumerate(scores, 1):
        searcher.on_trial_result(str(number), report(score, epoch))


def test_the_median_rule_takes_up_trials_that_were_reported_in_another_order(
    tmp_path: Path,
) -> None:
    config = searching(tmp_path, scheduler="median")
    searcher = search(config)
    scores = {0: (60.0, 61.0), 1: (70.0, 71.0), 2: (80.0, 81.0), 3: (10.0, 11.0, 12.0)}
    for number in scores:
        searcher.suggest(str(number))
    for number in (3, 0, 1, 2):  # the weakest is first, when there is no median yet
        for epoch, score in enumerate(scores[number], 1):
            searcher.on_trial_result(str(number), report(score, epoch))
    for number, of in scores.items():
        searcher.on_trial_complete(str(number), report(of[-1], 4, **{FINISHED: True, COST: 1.0}))
    rule = stopping_rule(config, opened(config))
    for score, decision in ((90.0, "CONTINUE"), (10.0, "STOP")):
        trial: Any = _Trial(f"new_{score}")
        rule.on_trial_add(None, trial)
        assert rule.on_trial_result(None, trial, report(score, 2)) == decision


def test_an_interrupted_trial_is_not_judged_again_at_a_rung_that_it_has_passed(
    tmp_path: Path,
) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    for number, score in enumerate((50.0, 20.0, 30.0, 40.0)):  # the first goes on, above all
        reported(searcher, number, (score,))
        if number:
            searcher.on_trial_complete(str(number), report(score, 1))
    rule = stopping_rule(config, opened(config))
    again: Any = _Trial("another_id", number=0)
    rule.on_trial_add(None, again)
    assert rule.on_trial_result(None, again, report(1.0, 1)) == "CONTINUE"
    between: Any = _Trial("new", number=4)  # half of (50, 20, 30, 40) is better than it
    rule.on_trial_add(None, between)
    assert rule.on_trial_result(None, between, report(34.0, 1)) == "STOP"


def test_the_median_rule_knows_what_an_interrupted_trial_has_reached(tmp_path: Path) -> None:
    config = searching(tmp_path, scheduler="median")
    searcher = search(config)
    for number, score in enumerate((60.0, 70.0, 80.0)):
        finish(searcher, str(number), score)
    reported(searcher, 3, (90.0, 91.0, 92.0))
    rule = stopping_rule(config, opened(config))
    for number, decision in ((3, "CONTINUE"), (4, "STOP")):
        trial: Any = _Trial(f"trial_{number}", number=number)
        rule.on_trial_add(None, trial)
        assert rule.on_trial_result(None, trial, report(50.0, 4)) == decision


def test_the_median_rule_counts_an_epoch_that_is_done_again_once(tmp_path: Path) -> None:
    config = searching(tmp_path, scheduler="median")
    searcher = search(config)
    for number, scores in enumerate(((60.0, 61.0), (40.0,), (10.0, 11.0))):
        reported(searcher, number, scores)
    rule = stopping_rule(config, opened(config))
    again: Any = _Trial("again", number=1)  # its mean is 65, or 57 where 40 counts twice
    rule.on_trial_add(None, again)
    rule.on_trial_result(None, again, report(40.0, 1))
    rule.on_trial_result(None, again, report(90.0, 2))
    for number in (0, 2):
        rule.on_trial_add(None, _Trial(f"trial_{number}", number=number))
    new: Any = _Trial("new", number=3)  # the median of 60.5, 65 and 10.5, or of 60.5, 57 and 10.5
    rule.on_trial_add(None, new)
    assert rule.on_trial_result(None, new, report(58.0, 2)) == "STOP"


def test_the_score_of_the_last_epoch_ends_no_trial_that_is_still_to_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    reporter = ray_trial.Reporter(searching(tmp_path))
    for epoch in (1, 2, 3, 4):
        reporter(Event("metrics", 10 * epoch, float(epoch), {names.KNN_TOP1: 50.0}))
    assert [each[EPOCH] for each in told] == [1, 2, 3]


def test_a_changed_space_is_told_option_by_option(tmp_path: Path) -> None:
    opened(searching(tmp_path))
    other = {"loss.temperature": {"log": [0.03, 0.4]}, "student.ema": {"uniform": [0.0, 0.9]}}
    with pytest.raises(ConfigError) as error:
        opened(searching(tmp_path, space=other))
    said = str(error.value)
    assert "loss.temperature: {'log': [0.03, 0.5]} -> {'log': [0.03, 0.4]}" in said
    assert "student.mhsa.depth: {'choice': [0, 1, 2]} -> not searched" in said
    assert "student.ema: not searched -> {'uniform': [0.0, 0.9]}" in said


def test_other_packed_images_are_another_sweep(tmp_path: Path) -> None:
    config = searching(tmp_path)
    space, folder = open_space(config), RunFolder.of(config)
    open_study(config, space, folder, data_sha256="a" * 64)
    open_study(config, space, folder, data_sha256="a" * 64)
    with pytest.raises(ConfigError, match="the packed images at"):
        open_study(config, space, folder, data_sha256="b" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": {"space": {"loss.temperature": {"log": [0.03, 0.4]}}}}, "tune.space"),
        ({"tune": {"space": SPACE, "metric": "segmentation_miou"}}, "tune.metric"),
        ({"tune": {"space": SPACE, "cost": "parameters"}}, "cost"),
        ({"train": {"epochs": 5}}, "train.epochs: 4 -> 5"),
        ({"eval": {"knn_k": 7}}, "eval.knn_k: 20 -> 7"),
        ({"run": {"seed": 3}}, "run.seed"),
    ],
)
def test_a_study_of_other_settings_is_refused(
    tmp_path: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    opened(searching(tmp_path))
    sections: dict[str, Any] = {
        "run": {"root": str(tmp_path), "name": "sweep"},
        "tune": {"space": SPACE},
        "train": {"epochs": 4},
    }
    for name, values in change.items():
        sections[name] = sections.get(name, {}) | values
    with pytest.raises((ConfigError, ValueError), match=message):
        opened(tiny_config(**sections))


def test_more_trials_and_another_scheduler_are_the_same_study(tmp_path: Path) -> None:
    finish(search(searching(tmp_path)), "a", 1.0)
    again = opened(searching(tmp_path, trials=99, scheduler="none", max_concurrent=3))
    assert len(again.trials()) == 1


def test_a_study_whose_trials_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    opened(searching(tmp_path / "mine", storage=url))
    opened(searching(tmp_path / "mine", storage=url))
    with pytest.raises(ConfigError, match=f"of run.root={tmp_path}/mine; give that"):
        opened(searching(tmp_path / "yours", storage=url))


def test_a_bucket_needs_a_storage_url() -> None:
    config = tiny_config(run={"root": "s3://bucket/runs"}, tune={"space": SPACE})
    with pytest.raises(ConfigError, match="SQLite cannot live"):
        opened(config)


def test_no_password_is_shown_or_stored(tmp_path: Path) -> None:
    study = optuna.create_study()
    shown = OpenStudy(study, "postgresql://me:secret@host/db").shown_url
    assert shown == "postgresql://me:***@host/db"
    config = searching(tmp_path, storage="nonsense://me:secret@host/db")
    with pytest.raises(ConfigError) as error:
        opened(config)
    assert "secret" not in str(error.value)


def test_the_best_trial_is_a_configuration_that_trains_as_it_is(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    for name, score in (("a", 10.0), ("b", 30.0), ("c", 20.0)):
        finish(searcher, name, score)
    best = best_trial(opened(config))
    assert best is not None
    assert (best.number, best.values) == (1, [30.0])
    path = tmp_path / "best.yaml"
    path.write_text(best_yaml(config, best, unit="kNN top-1 %"))
    read = config_from_file(str(path))
    assert read == best_config(config, best)
    assert {n: option_value(read, n) for n in SPACE} == best.params
    assert read.tune.space == {}
    assert read.run.name == "sweep_best"


def test_what_a_function_sets_is_the_best_trials_though_it_asked_for_something_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "space.py").write_text(
        "def space(trial):\n"
        "    exponent = trial.suggest_int('loss.queue_size', 4, 6)\n"
        "    trial.suggest_float('loss.temperature', 0.1, 0.2)\n"
        "    return {'loss.queue_size': 2**exponent}\n"
    )
    function = f"{tmp_path}/space.py:space"
    config = searching(tmp_path, space={}, space_function=function, own_values_first=False)
    searcher = search(config)
    finish(searcher, "a", 10.0)
    best = best_trial(opened(config))
    assert best is not None
    assert best.params["loss.queue_size"] in (4, 5, 6)
    trained = best_config(config, best).loss
    assert trained.queue_size == 2 ** best.params["loss.queue_size"]
    assert trained.temperature == best.params["loss.temperature"]


def test_relative_weights_of_a_function_are_absolute_in_its_trials_and_in_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.pth").touch()
    Path("space.py").write_text(
        "def space(trial):\n    trial.suggest_categorical('teacher.weights', ['a.pth', 'b.pth'])\n"
    )
    config = searching(tmp_path, space={}, space_function=f"{tmp_path}/space.py:space")
    searcher = search(config)
    begun = searcher.suggest("a")
    assert begun is not None
    finish(searcher, "a", 10.0)
    best = best_trial(opened(config))
    assert best is not None
    assert begun[VALUES]["teacher.weights"] == f"{tmp_path}/{best.params['teacher.weights']}"
    assert best_config(config, best).teacher.weights == begun[VALUES]["teacher.weights"]


def test_two_objectives_give_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    config = searching(tmp_path, cost="training_s")
    searcher = search(config)
    for name, score, cost in (("a", 10.0, 1.0), ("b", 30.0, 5.0), ("c", 20.0, 6.0)):
        finish(searcher, name, score, cost)
    assert {trial.number for trial in opened(config).study.best_trials} == {0, 1}


def test_trials_csv_has_a_line_per_trial(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    finish(searcher, "a", 10.0)
    finish(searcher, "b", 12.5)
    lines = trials_csv(records_of(opened(config))).splitlines()
    assert lines[0] == "trial,state,score,cost,epochs,loss.temperature,student.mhsa.depth,reason"
    assert lines[1] == "0,finished,10.0,1.0,4,0.2,1,"
    assert len(lines) == 3
