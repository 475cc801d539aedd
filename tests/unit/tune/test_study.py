"""A study outlives its driver: what is over stays, what ran goes on, what differs is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from studies import opened_study
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
    REFUSAL,
    SCORE,
    VALUES,
    StudySearch,
    reason_file,
    stopping_rule,
)
from pcd_ray.tune.records import best_config, best_trial, best_yaml, records_of, trials_csv
from pcd_ray.tune.space import open_space
from pcd_ray.tune.study import (
    COST,
    OpenStudy,
    begin_study,
    find_study,
    history_of,
    new_study,
    story_of,
)

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}, "student.mhsa.depth": {"choice": [0, 1, 2]}}


def searching(root: Path, **tune: Any) -> Config:
    return tiny_config(
        run={"root": str(root), "name": "sweep"},
        tune={"space": SPACE, "scheduler": "asha", "reduction_factor": 2, **tune},
        train={"epochs": 4},
    )


def search(config: Config) -> StudySearch:
    folder = RunFolder.of(config)
    return StudySearch(opened_study(config), open_space(config), config, folder.file("trials"))


def rule_of(config: Config) -> Any:
    return stopping_rule(config, open_space(config), opened_study(config))


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
    records = records_of(opened_study(config))
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
            {NUMBER: 3, VALUES: {}, REFUSAL: ""},
            base=base,
            trials_uri=trials,
            places={},
            builder=None,
        )
    assert Path(reason_file(trials, 3)).read_text() == (
        f"the workers died; `pcd-ray train {trials}/trial_0003/config.yaml` goes on from step 12; "
        "the sweep does not go on with this trial"
    )


def test_what_a_trial_varies_it_has_also_where_the_sweep_sets_it_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Config] = []

    def train(config: Config, **_: Any) -> None:
        ran.append(config)
        raise TrainingError("enough is seen")

    monkeypatch.setattr(ray_trial, "train", train)
    places = {"teacher.cache.path": "/shared", "train.threads_per_worker": 1}
    with pytest.raises(TrainingError, match="enough"):
        ray_trial.run_trial(
            {NUMBER: 0, VALUES: {"teacher.cache.path": "/own"}, REFUSAL: ""},
            base=config_to_values(searching(tmp_path)),
            trials_uri=str(tmp_path),
            places=places,
            builder=None,
        )
    assert ran[0].teacher.cache.path == "/own"
    assert ran[0].train.threads_per_worker == 1


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
    assert history_of(opened_study(config).trials()[1]) == {1: 20.0, 2: 21.0}


def test_a_later_sitting_draws_other_values_than_the_first_did(tmp_path: Path) -> None:
    config = searching(tmp_path, own_values_first=False, sampler="random")
    drawn = []
    for _ in range(3):
        searcher = search(config)
        finish(searcher, "a", 1.0)
        drawn.append(opened_study(config).trials()[-1].params["loss.temperature"])
    assert len(set(drawn)) == 3


def test_an_abandoned_trial_stays_running(tmp_path: Path) -> None:
    searcher = search(searching(tmp_path))
    searcher.suggest("a")
    searcher.on_trial_complete("a")
    assert len(opened_study(searching(tmp_path)).trials(TrialState.RUNNING)) == 1


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
    rule = rule_of(config)
    fresh = rule_of(searching(tmp_path / "other"))
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
    rule = rule_of(config)  # no controller to ask whether others wait
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
    rule = rule_of(config)
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
    rule = rule_of(config)
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
    rule = rule_of(config)
    for number, decision in ((3, "CONTINUE"), (4, "STOP")):
        trial: Any = _Trial(f"trial_{number}", number=number)
        rule.on_trial_add(None, trial)
        assert rule.on_trial_result(None, trial, report(50.0, 4)) == decision


def test_the_median_rule_counts_an_epoch_that_is_done_again_once(tmp_path: Path) -> None:
    config = searching(tmp_path, scheduler="median")
    searcher = search(config)
    for number, scores in enumerate(((60.0, 61.0), (40.0,), (10.0, 11.0))):
        reported(searcher, number, scores)
    rule = rule_of(config)
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


def test_a_trial_that_was_interrupted_while_it_was_drawn_is_drawn_to_the_end(
    tmp_path: Path,
) -> None:
    config = searching(tmp_path, own_values_first=False)
    begun = opened_study(config).study.ask()  # its driver dies before the second value
    temperature = begun.suggest_float("loss.temperature", 0.03, 0.5, log=True)
    again = search(config).suggest("a")
    assert again is not None
    assert again[NUMBER] == begun.number
    assert again[VALUES]["loss.temperature"] == temperature
    assert again[VALUES]["student.mhsa.depth"] in (0, 1, 2)
    assert opened_study(config).trials()[0].params == again[VALUES]


FAILS_LATE = """
def space(trial):
    trial.suggest_float("loss.temperature", 0.03, 0.5)
    if trial.number == 65:  # one more than are drawn before the sweep
        raise KeyError("late")
"""


def test_a_trial_that_a_space_function_fails_for_fails_alone_with_its_reason(
    tmp_path: Path,
) -> None:
    path = tmp_path / "space.py"
    path.write_text(FAILS_LATE)
    config = searching(tmp_path, space={}, space_function=f"{path}:space", own_values_first=False)
    opened = opened_study(config)
    for _ in range(65):
        opened.study.tell(opened.study.ask(), state=TrialState.FAIL)
    searcher = search(config)
    refused, right = searcher.suggest("a"), searcher.suggest("b")
    assert refused is not None
    assert right is not None
    assert (refused[NUMBER], right[NUMBER], right[REFUSAL]) == (65, 66, "")
    trials = RunFolder.of(config).file("trials")
    with pytest.raises(ConfigError, match="fails with KeyError: 'late'"):
        ray_trial.run_trial(
            refused, base=config_to_values(config), trials_uri=trials, places={}, builder=None
        )
    searcher.on_trial_complete("a", error=True)
    record = records_of(opened)[65]
    assert (record.state, "KeyError: 'late'" in record.reason) == ("failed", True)


def test_the_stopping_rule_lasts_as_long_as_the_longest_trial(tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [
        {"train.epochs": {"choice": [4, 9]}},
        {"train.epochs": {"uniform": [4, 9]}},
        SPACE,
    ]
    longest = [open_space(searching(tmp_path, space=rule)).most_epochs for rule in rules]
    assert longest == [9, 9, 4]
    rule = rule_of(searching(tmp_path, space=rules[0], own_values_first=False))
    for number, last in enumerate((50.0, 50.0, 50.0, 1.0)):  # at a rung beyond the base's epochs
        trial: Any = _Trial(f"trial_{number}")
        rule.on_trial_add(None, trial)
        for epoch in range(1, 8):
            assert rule.on_trial_result(None, trial, report(50.0, epoch)) == "CONTINUE"
        decision = rule.on_trial_result(None, trial, report(last, 8))
        assert decision == ("STOP" if last == 1.0 else "CONTINUE")


def test_a_changed_space_is_told_option_by_option(tmp_path: Path) -> None:
    opened_study(searching(tmp_path))
    other = {"loss.temperature": {"log": [0.03, 0.4]}, "student.ema": {"uniform": [0.0, 0.9]}}
    with pytest.raises(ConfigError) as error:
        opened_study(searching(tmp_path, space=other))
    said = str(error.value)
    assert "loss.temperature: {'log': [0.03, 0.5]} -> {'log': [0.03, 0.4]}" in said
    assert "student.mhsa.depth: {'choice': [0, 1, 2]} -> not searched" in said
    assert "student.ema: not searched -> {'uniform': [0.0, 0.9]}" in said


def test_other_packed_images_are_another_sweep(tmp_path: Path) -> None:
    config = searching(tmp_path)
    opened_study(config, data_sha256="a" * 64)
    opened_study(config, data_sha256="a" * 64)
    with pytest.raises(ConfigError, match="the packed images at"):
        opened_study(config, data_sha256="b" * 64)


def test_other_weights_in_the_same_place_are_another_sweep_and_a_moved_file_is_not(
    tmp_path: Path,
) -> None:
    def of(weights: str) -> Config:
        config = searching(tmp_path)
        return replace(config, teacher=replace(config.teacher, weights=weights))

    file, moved = tmp_path / "a.pth", tmp_path / "moved.pth"
    for path in (file, moved):
        path.write_text("one")
    opened_study(of(str(file)))
    opened_study(of(str(moved)))
    file.write_text("other")
    with pytest.raises(ConfigError, match=r"teacher\.weights: the weights there are others"):
        opened_study(of(str(file)))


def test_other_weights_among_those_that_trials_choose_from_are_another_sweep(
    tmp_path: Path,
) -> None:
    files = [str(tmp_path / name) for name in ("a.pth", "b.pth")]
    for path in files:
        Path(path).write_text(path)
    config = searching(tmp_path, space={"teacher.weights": {"choice": files}})
    opened_study(config)
    opened_study(config)
    Path(files[1]).write_text("other")
    with pytest.raises(ConfigError, match=r"b\.pth: the weights there are others"):
        opened_study(config)


FUNCTION = """
HIGH, SIZE = 0.5, 64
def size(): return SIZE
def space(trial):
    trial.suggest_float("loss.temperature", 0.03, HIGH)
    return {"loss.queue_size": size()}
"""


@pytest.mark.parametrize(
    ("old", "new"), [("HIGH, SIZE = 0.5", "HIGH, SIZE = 0.4"), ("return SIZE", "return 2 * SIZE")]
)
def test_a_space_function_that_asks_or_sets_otherwise_is_another_space(
    tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "space.py"
    path.write_text(FUNCTION)
    config = searching(tmp_path, space={}, space_function=f"{path}:space")
    opened_study(config)
    path.write_text(f"# a remark\n{FUNCTION}")
    opened_study(config)
    path.write_text(FUNCTION.replace(old, new))  # the text of `space` itself is the same
    with pytest.raises(ConfigError, match=r"tune\.space_function.*what it sets is another"):
        opened_study(config)


def test_a_study_that_has_not_begun_leaves_nothing_behind_when_it_is_looked_for(
    tmp_path: Path,
) -> None:
    config = searching(tmp_path)
    space, folder = open_space(config), RunFolder.of(config)
    assert find_study(config, folder, story_of(config, space, data_sha256="a")) is None
    assert list(tmp_path.iterdir()) == []


def test_of_two_drivers_that_begin_a_study_together_the_second_changes_nothing(
    tmp_path: Path,
) -> None:
    first, second = searching(tmp_path), searching(tmp_path, metric="segmentation_miou")
    folder = RunFolder.of(first)
    space = open_space(first)
    stories = [story_of(config, space, data_sha256="a" * 64) for config in (first, second)]
    studies = [new_study(config, folder) for config in (first, second)]  # neither has found one
    begin_study(studies[0], first, space, stories[0])
    begin_study(studies[1], first, space, stories[0])
    with pytest.raises(ConfigError, match=r"tune\.metric"):
        begin_study(studies[1], second, space, stories[1])
    assert len(opened_study(first).trials(TrialState.WAITING)) == 1


def test_a_study_from_before_weights_were_known_by_content_goes_on(tmp_path: Path) -> None:
    config = searching(tmp_path)
    opened = opened_study(config)
    stored = json.loads(opened.study.user_attrs["sweep"])
    del stored["weights_sha256"]
    opened.study.set_user_attr("sweep", json.dumps(stored))
    assert opened_study(config).trials()


def test_a_study_that_something_else_began_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    optuna.create_study(study_name="sweep", storage=url, directions=["minimize"])
    with pytest.raises(ConfigError, match="that pcd-ray did not begin; choose another"):
        opened_study(searching(tmp_path, storage=url))


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
    opened_study(searching(tmp_path))
    sections: dict[str, Any] = {
        "run": {"root": str(tmp_path), "name": "sweep"},
        "tune": {"space": SPACE},
        "train": {"epochs": 4},
    }
    for name, values in change.items():
        sections[name] = sections.get(name, {}) | values
    with pytest.raises((ConfigError, ValueError), match=message):
        opened_study(tiny_config(**sections))


def test_more_trials_and_another_scheduler_are_the_same_study(tmp_path: Path) -> None:
    finish(search(searching(tmp_path)), "a", 1.0)
    again = opened_study(searching(tmp_path, trials=99, scheduler="none", max_concurrent=3))
    assert len(again.trials()) == 1


def test_a_study_whose_trials_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    opened_study(searching(tmp_path / "mine", storage=url))
    opened_study(searching(tmp_path / "mine", storage=url))
    with pytest.raises(ConfigError, match=f"of run.root={tmp_path}/mine; give that"):
        opened_study(searching(tmp_path / "yours", storage=url))


def test_a_bucket_needs_a_storage_url() -> None:
    config = tiny_config(run={"root": "s3://bucket/runs"}, tune={"space": SPACE})
    with pytest.raises(ConfigError, match="SQLite cannot live"):
        opened_study(config)


def test_no_password_is_shown_or_stored(tmp_path: Path) -> None:
    study = optuna.create_study()
    shown = OpenStudy(study, "postgresql://me:secret@host/db").shown_url
    assert shown == "postgresql://me:***@host/db"
    config = searching(tmp_path, storage="nonsense://me:secret@host/db")
    with pytest.raises(ConfigError) as error:
        opened_study(config)
    assert "secret" not in str(error.value)


def test_the_best_trial_is_a_configuration_that_trains_as_it_is(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    for name, score in (("a", 10.0), ("b", 30.0), ("c", 20.0)):
        finish(searcher, name, score)
    best = best_trial(opened_study(config))
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
    best = best_trial(opened_study(config))
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
    best = best_trial(opened_study(config))
    assert best is not None
    assert begun[VALUES]["teacher.weights"] == f"{tmp_path}/{best.params['teacher.weights']}"
    assert best_config(config, best).teacher.weights == begun[VALUES]["teacher.weights"]


def test_two_objectives_give_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    config = searching(tmp_path, cost="training_s")
    searcher = search(config)
    for name, score, cost in (("a", 10.0, 1.0), ("b", 30.0, 5.0), ("c", 20.0, 6.0)):
        finish(searcher, name, score, cost)
    assert {trial.number for trial in opened_study(config).study.best_trials} == {0, 1}


def test_trials_csv_has_a_line_per_trial(tmp_path: Path) -> None:
    config = searching(tmp_path)
    searcher = search(config)
    finish(searcher, "a", 10.0)
    finish(searcher, "b", 12.5)
    lines = trials_csv(records_of(opened_study(config))).splitlines()
    assert lines[0] == "trial,state,score,cost,epochs,loss.temperature,student.mhsa.depth,reason"
    assert lines[1] == "0,finished,10.0,1.0,4,0.2,1,"
    assert len(lines) == 3
