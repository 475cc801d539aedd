"""Parts that are done are not done again; one that fails costs itself alone."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stored_run import store_run
from tiny import tiny_config

from pcd_ray.config import Config
from pcd_ray.errors import TrainingError
from pcd_ray.evaluate.comparison import compare
from pcd_ray.evaluate.contents import files_sha256
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import (
    Kind,
    Place,
    judge_rows,
    protocol_of,
    store_scores,
    stored_scores,
)
from pcd_ray.evaluate.ray_eval import shown_networks
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import Row, open_rows


class Counting:
    """A judge that gives the seed as its score and notes what it was asked."""

    def __init__(self, *, fails: str = "", error: type[Exception] = TrainingError) -> None:
        self.asked: list[tuple[str, int]] = []
        self.places: list[Place] = []
        self.fails = fails
        self.error = error

    def __call__(
        self,
        network: JudgedNetwork,
        data: Any,
        _: Config,
        *,
        place: Place,
        seed: int,
        device: str,
    ) -> Scores:
        assert (data, device) == ("opened", "cpu")
        self.asked.append((network.label, seed))
        self.places.append(place)
        if self.fails in (network.label, network.source):
            raise self.error("features: infinite")
        work = Path(place.work, "checkpoints", "step_1")
        work.mkdir(parents=True)
        (work / "state.pt").write_bytes(bytes(100))
        Path(place.part, "kept.json").write_text("{}")
        pictures = {"map.png": bytes(range(256))}
        return Scores(
            values={"score": float(seed)}, intervals={"score": (0.0, 1.5)}, pictures=pictures
        )


def kind_of(judge: Counting, uri: str, **options: Any) -> Kind:
    values: dict[str, Any] = {
        "name": "toy",
        "title": lambda _: "Toy",
        "format": 1,
        "judge": judge,
        "facts": lambda _data, config, _device: {"k": config.eval.knn_k},
        "sets": lambda _: {"eval.knn_train": uri},
        "contents": lambda _: files_sha256(str(path) for path in sorted(Path(uri).iterdir())),
        "open": lambda _: "opened",
        "notes": lambda *_: (),
        "images": lambda *_: [],
    }
    return Kind(**(values | options))


def judged(
    kind: Kind, rows: list[Row], config: Config, out: Path
) -> tuple[dict[str, list[list[Scores]]], dict[str, str]]:
    known = {"protocol": protocol(kind, config), "parts": str(out), "device": "cpu"}
    return judge_rows(kind, rows, "opened", config, **known)


def protocol(kind: Kind, config: Config) -> str:
    return protocol_of(kind, "opened", config, "cpu")


@pytest.fixture
def config() -> Config:
    return tiny_config(run={"seed": 5}, eval={"seeds": 2})


@pytest.fixture
def rows(config: Config) -> list[Row]:
    return open_rows(["untrained", "other:untrained"], config)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"1234")
    return str(tmp_path / "set")


def test_done_parts_are_read(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    kind = kind_of(judge, labelled)
    first, failures = judged(kind, rows[:1], config, tmp_path / "out")
    assert judge.asked == [("untrained", 5), ("untrained", 6)]
    assert failures == {}
    assert [[s.values["score"] for s in training] for training in first["untrained"]] == [[5, 6]]
    again, _ = judged(kind, rows, config, tmp_path / "out")
    assert len(judge.asked) == 2, "the other row is the same network: nothing is left to do"
    assert again["untrained"] == again["other"] == first["untrained"]


def test_what_was_only_needed_to_judge_goes_once_scores_are_stored(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting(fails="untrained")
    judged(kind_of(Counting(), labelled), rows[:1], config, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"scores.json", "kept.json"}
    judged(kind_of(judge, labelled), rows[1:], config, tmp_path / "other")
    Path(judge.places[0].work).mkdir(parents=True, exist_ok=True)
    judged(kind_of(Counting(fails="other"), labelled), rows[1:], config, tmp_path / "other")
    assert Path(judge.places[0].work).is_dir(), "an interrupted one goes on from there"


@pytest.mark.parametrize("change", ["option", "set", "time", "format", "seed"])
def test_what_has_changed_is_judged_anew(
    change: str, tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    judged(kind_of(judge, labelled), rows[:1], config, tmp_path)
    sections: dict[str, dict[str, Any]] = {"run": {"seed": 5}, "eval": {"seeds": 2}}
    if change == "option":
        sections["eval"]["knn_k"] = 3
    if change == "seed":
        sections["eval"]["seeds"] = 3
    if change == "set":
        Path(labelled, "b.png").write_bytes(b"5")
    if change == "time":
        os.utime(Path(labelled, "a.png"), ns=(1, 10**18))
    kind = kind_of(judge, labelled, format=2 if change == "format" else 1)
    judged(kind, rows[:1], tiny_config(**sections), tmp_path)
    assert len(judge.asked) == (3 if change == "seed" else 4)


def test_an_option_of_another_kind_changes_nothing(labelled: str, config: Config) -> None:
    kind = kind_of(Counting(), labelled)
    other = tiny_config(run={"seed": 5}, eval={"seeds": 2, "segmentation": "elsewhere"})
    assert protocol(kind, config) == protocol(kind, other)


@pytest.mark.parametrize("error", [TrainingError, AssertionError, MemoryError, RuntimeError])
def test_one_failure_costs_itself_alone(
    error: type[Exception], tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    other = tiny_config(run={"seed": 6})
    mixed = [*open_rows(["bad:untrained"], other), *rows[:1]]
    judge = Counting(fails="bad", error=error)
    measured, failures = judged(kind_of(judge, labelled), mixed, config, tmp_path)
    words = "features: infinite"
    words = words if error is TrainingError else f"{error.__name__}: {words}"
    parts = ["bad (seed 6), seed 5", "bad (seed 6), seed 6"]
    assert failures == dict.fromkeys(parts, words)
    assert measured["bad"] == [[]]
    assert len(measured["untrained"][0]) == 2


def test_each_training_that_fails_has_its_own_reason(
    tmp_path: Path, labelled: str, config: Config
) -> None:
    row = open_rows(["three:untrained@1,untrained@2,untrained@3"], config)
    judge = Counting(fails="seed 2")
    measured, failures = judged(kind_of(judge, labelled, draws=False), row, config, tmp_path)
    assert list(failures) == ["three (seed 2), seed 5"]
    assert [len(training) for training in measured["three"]] == [1, 0, 1]
    estimated = compare(measured)["score"]["three"]
    assert (estimated.trainings, estimated.missing) == (2, 1)
    assert estimated.basis == "2 trainings, 1 of 3 trainings missing"


def test_a_row_is_shown_by_its_first_network_that_has_scores(
    tmp_path: Path, labelled: str, config: Config
) -> None:
    run = store_run(tmp_path, 3)[0].uri
    rows = open_rows(
        [f"late:untrained@1,{run}", f"early:{run},untrained@1", "bad:untrained@1"], config
    )
    judge = Counting(fails="seed 1")
    measured, _ = judged(kind_of(judge, labelled, draws=False), rows, config, tmp_path / "out")
    shown = shown_networks(rows, measured)
    assert [(network.label, run_of) for network, run_of in shown] == [("late", run), ("early", run)]
    assert shown[0][0] is rows[0].networks[1]
    assert shown[1][0] is rows[1].networks[0]


def test_features_are_shared_by_seeds_and_kinds(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    judged(kind_of(judge, labelled), rows[:1], config, tmp_path)
    judged(kind_of(judge, labelled, name="other"), rows[:1], config, tmp_path)
    assert len({place.shared for place in judge.places}) == 1
    assert len({place.part for place in judge.places}) == 4


def test_a_kind_without_draws_is_measured_once(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    judged(kind_of(judge, labelled, draws=False), rows[:1], config, tmp_path)
    assert judge.asked == [("untrained", 5)]


def test_notes_of_a_measurement_are_said_once(
    tmp_path: Path,
    labelled: str,
    config: Config,
    rows: list[Row],
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Noting(Counting):
        def __call__(self, *args: Any, **options: Any) -> Scores:
            scores = super().__call__(*args, **options)
            scores.about["notes"] = ["the rate is at the edge"]
            return scores

    judged(kind_of(Noting(), labelled), rows[:1], config, tmp_path)
    assert capsys.readouterr().err.count("note: untrained: the rate is at the edge") == 1


def test_scores_come_back_whole(tmp_path: Path) -> None:
    scores = Scores(
        values={"miou": 12.5},
        intervals={"miou": (10.0, 15.0)},
        test_images={"miou": 4},
        classes={"miou": {"road": 80.0, "sign": None}},
        pictures={"a.png": b"\x89PNG\x00\xff"},
        about={"rate": 0.1},
    )
    store_scores(str(tmp_path), scores)
    assert stored_scores(str(tmp_path)) == scores
    store_scores(str(tmp_path), replace(scores, intervals={"miou": (10.0, float("nan"))}))
    assert stored_scores(str(tmp_path)) is None, "of an older version: it is judged again"
    (tmp_path / "scores.json").write_text('{"values": 3')
    assert stored_scores(str(tmp_path)) is None
    assert stored_scores(str(tmp_path / "absent")) is None
