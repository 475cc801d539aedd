"""Parts that are done are not done again; one that fails costs itself alone."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from pcd_ray.config import Config
from pcd_ray.errors import TrainingError
from pcd_ray.evaluate.judging import (
    Kind,
    judge_rows,
    out_folder,
    protocol_of,
    store_scores,
    stored_scores,
)
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import JudgedNetwork, Row, open_rows


class Counting:
    """A judge that gives the seed as its score and notes what it was asked."""

    def __init__(self, *, fails: str = "") -> None:
        self.asked: list[tuple[str, int]] = []
        self.folders: list[str] = []
        self.fails = fails

    def __call__(
        self, network: JudgedNetwork, _: Config, *, folder: str, seed: int, device: str
    ) -> Scores:
        assert device == "cpu"
        self.asked.append((network.label, seed))
        self.folders.append(folder)
        if network.label == self.fails:
            raise TrainingError("features: infinite")
        pictures = {"map.png": bytes(range(256))}
        return Scores(
            values={"score": float(seed)}, intervals={"score": (0.0, 1.5)}, pictures=pictures
        )


def kind_of(judge: Counting, uri: str, **options: Any) -> Kind:
    return Kind(
        name="toy",
        title="Toy",
        judge=judge,
        options=("knn_k",),
        sets=lambda _: {"eval.knn_train": uri},
        check=lambda _: None,
        images=lambda _: [],
        **options,
    )


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
    out = str(tmp_path / "out")
    first, failures = judge_rows(kind, rows[:1], config, out=out, device="cpu")
    assert judge.asked == [("untrained", 5), ("untrained", 6)]
    assert failures == {}
    assert [scores.values["score"] for scores in first["untrained"]] == [5, 6]
    again, _ = judge_rows(kind, rows, config, out=out, device="cpu")
    assert len(judge.asked) == 2, "the other row is the same network: nothing is left to do"
    assert again["untrained"] == again["other"] == first["untrained"]


@pytest.mark.parametrize("change", ["option", "set", "size", "seed"])
def test_what_has_changed_is_judged_anew(
    change: str, tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    kind = kind_of(judge, labelled)
    judge_rows(kind, rows[:1], config, out=str(tmp_path), device="cpu")
    sections: dict[str, dict[str, Any]] = {"run": {"seed": 5}, "eval": {"seeds": 2}}
    if change == "option":
        sections["eval"]["knn_k"] = 3
    if change == "size":
        sections["eval"]["image_size_px"] = 32
    if change == "seed":
        sections["eval"]["seeds"] = 3
    if change == "set":
        Path(labelled, "b.png").write_bytes(b"5")
    judge_rows(kind, rows[:1], tiny_config(**sections), out=str(tmp_path), device="cpu")
    assert len(judge.asked) == (3 if change == "seed" else 4)


def test_an_option_of_another_kind_changes_nothing(labelled: str, config: Config) -> None:
    kind = kind_of(Counting(), labelled)
    other = tiny_config(run={"seed": 5}, eval={"seeds": 2, "segmentation": "elsewhere"})
    assert protocol_of(kind, config) == protocol_of(kind, other)


def test_one_failure_costs_itself_alone(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    other = tiny_config(run={"seed": 6})
    mixed = [*open_rows(["bad:untrained"], other), *rows[:1]]
    judge = Counting(fails="bad")
    measured, failures = judge_rows(
        kind_of(judge, labelled), mixed, config, out=str(tmp_path), device="cpu"
    )
    assert failures == dict.fromkeys(["bad, seed 5", "bad, seed 6"], "features: infinite")
    assert [len(measured[name]) for name in ("bad", "untrained")] == [0, 2]


def test_features_are_shared_by_seeds_and_kinds(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    kind = kind_of(judge, labelled, on_features=True)
    judge_rows(kind, rows[:1], config, out=str(tmp_path), device="cpu")
    assert len(set(judge.folders)) == 1
    own = Counting()
    judge_rows(kind_of(own, labelled), rows[:1], config, out=f"{tmp_path}/2", device="cpu")
    assert len(set(own.folders)) == 2


def test_a_kind_without_draws_is_measured_once(
    tmp_path: Path, labelled: str, config: Config, rows: list[Row]
) -> None:
    judge = Counting()
    judge_rows(
        kind_of(judge, labelled, draws=False), rows[:1], config, out=str(tmp_path), device="cpu"
    )
    assert judge.asked == [("untrained", 5)]


def test_scores_come_back_whole(tmp_path: Path) -> None:
    scores = Scores(
        values={"miou": 12.5},
        intervals={"miou": (10.0, 15.0)},
        classes={"miou": {"road": 80.0, "sign": None}},
        pictures={"a.png": b"\x89PNG\x00\xff"},
        about={"rate": 0.1},
    )
    store_scores(str(tmp_path), scores)
    assert stored_scores(str(tmp_path)) == scores
    (tmp_path / "scores.json").write_text('{"values": 3')
    assert stored_scores(str(tmp_path)) is None
    assert stored_scores(str(tmp_path / "absent")) is None


def test_results_lie_in_the_first_run_or_beside_all_runs(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)})
    assert out_folder("untrained", config) == f"{tmp_path}/eval"
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    assert out_folder(f"{tmp_path}/mine", config) == f"{tmp_path}/mine/eval"
    named = tiny_config(eval={"out": f"{tmp_path}/else"})
    assert out_folder(f"{tmp_path}/mine", named) == f"{tmp_path}/else"
