"""The space is checked before a trial starts; a trial is the configuration with other values."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from tiny import tiny_config

from pcd_ray.config import Config, option_value, overridden
from pcd_ray.errors import ConfigError
from pcd_ray.tune.space import (
    Space,
    drawn,
    epochs_of,
    in_words,
    open_space,
    trial_config,
    with_absolute_choices,
)

SPACE: dict[str, Any] = {
    "loss.temperature": {"log": [0.03, 0.5]},
    "loss.queue_size": {"log": [16, 256]},
    "student.mhsa.depth": {"choice": [0, 1, 2]},
    "teacher.adaptor.rule": {"choice": ["gate", "tangent", "naive"]},
    "student.ema": {"uniform": [0.0, 0.9], "step": 0.3},
}


def searching(space: Any = None, **sections: Any) -> Config:
    return tiny_config(tune={"space": SPACE if space is None else space}, **sections)


def test_every_combination_is_a_configuration_with_these_values_and_no_other_change() -> None:
    config = searching()
    space = open_space(config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    seen: dict[str, set[Any]] = {name: set() for name in SPACE}
    for _ in range(60):
        values = drawn(space, study.ask())
        trial = trial_config(config, values)
        for name, value in values.items():
            seen[name].add(value)
            assert option_value(trial, name) == value
        assert trial_config(trial, {n: option_value(config, n) for n in values}) == config
    assert seen["student.mhsa.depth"] == {0, 1, 2}
    assert seen["teacher.adaptor.rule"] == {"gate", "tangent", "naive"}
    assert {round(value, 9) for value in seen["student.ema"]} == {0.0, 0.3, 0.6, 0.9}
    assert all(isinstance(value, int) and 16 <= value <= 256 for value in seen["loss.queue_size"])
    assert min(seen["loss.temperature"]) < 0.1 < 0.25 < max(seen["loss.temperature"])


def test_options_may_be_written_as_sections() -> None:
    nested = {"loss": {"temperature": {"log": [0.03, 0.5]}}}
    flat = {"loss.temperature": {"log": [0.03, 0.5]}}
    assert open_space(searching(nested)).sha256 == open_space(searching(flat)).sha256
    assert open_space(searching(flat)).sha256 != open_space(searching()).sha256


def test_numbers_are_read_as_the_options_themselves_read_them() -> None:
    def opened(text: str) -> Space:
        return open_space(overridden(searching(loss={"queue_size": 1000}), [f"tune.space={text}"]))

    written = """{optim.base_lr: {log: [3e-2, 5E-1]}, loss.queue_size: {choice: [1e3, 2_000]},
    student.head_hidden: {uniform: [1e2, 3e+2], step: 1e2}, student.ema: {uniform: [.0, .5]},
    train.epochs: {choice: [1e0, +3]}, teacher.licence: {choice: [1e3, MIT, no, 007]}}"""
    plain = """{optim.base_lr: {log: [0.03, 0.5]}, loss.queue_size: {choice: [1000, 2000]},
    student.head_hidden: {uniform: [100, 300], step: 100}, student.ema: {uniform: [0.0, 0.5]},
    train.epochs: {choice: [1, 3]}, teacher.licence: {choice: ["1e3", "MIT", "no", "007"]}}"""
    found = opened(written)
    assert found == opened(plain)
    assert found.most_epochs == 3
    assert found.own_values(searching(loss={"queue_size": 1000}))["loss.queue_size"] == 1000


def test_own_values_are_those_that_a_trial_could_have() -> None:
    own = open_space(searching(loss={"temperature": 0.9, "queue_size": 64})).own_values
    config = searching(loss={"temperature": 0.9, "queue_size": 64}, student={"ema": 0.5})
    assert own(config) == {
        "loss.queue_size": 64,
        "student.mhsa.depth": 1,
        "teacher.adaptor.rule": "gate",
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space is empty"),
        ({"loss.temprature": {"log": [0.1, 1]}}, "did you mean loss.temperature"),
        ({"loss.temperature": {"log": [0.5, 0.03]}}, r"log=\[0.5, 0.03\].*0 < low < high"),
        ({"loss.temperature": {"log": [0, 1]}}, "0 < low < high"),
        ({"loss.temperature": {"uniform": [0.1]}}, r"uniform=\[0.1\].*low < high"),
        ({"loss.temperature": {"uniform": [-1, 1]}}, "loss.temperature must be > 0, got -1"),
        ({"loss.temperature": 0.1}, r"got 0.1; write \{log"),
        ({"loss.temperature": {"log": [0.1, 1], "choice": [1, 2]}}, "write {log"),
        ({"loss.temperature": {"log": [0.1, 1], "step": 0.1}}, "step=0.1"),
        ({"loss.queue_size": {"uniform": [1.5, 3]}}, "takes whole numbers"),
        ({"student.mhsa.depth": {"choice": [1]}}, "two or more"),
        ({"student.mhsa.depth": {"choice": [1, 1]}}, "two or more"),
        ({"student.mhsa.depth": {"choice": [0, 1, 1]}}, "names a value twice"),
        ({"student.mhsa.depth": {"choice": [0, -1]}}, "student.mhsa.depth must be >= 0, got -1"),
        ({"teacher.adaptor.rule": {"choice": ["gate", "tangnt"]}}, "did you mean 'tangent'"),
        ({"teacher.adaptor.rule": {"uniform": [0, 1]}}, r"is no number; write \{choice"),
        ({"run.seed": {"choice": [0, 1]}}, "run.seed says where the sweep lives"),
        ({"eval.knn_k": {"choice": [1, 5]}}, "the same for all"),
        ({"train.num_workers": {"choice": [1, 2]}}, "costs the cluster"),
        ({"train.cpus_per_worker": {"choice": [1.0, 2.0]}}, "costs the cluster"),
        ({"train.threads_per_worker": {"choice": [1, 2]}}, "costs the cluster"),
        ({"loss.temperature": {"log": [0.1, float("inf")]}}, r"log=\[0.1, inf\].*0 < low < high"),
        ({"loss.queue_size": {"uniform": [16, float("inf")]}}, "low < high"),
        ({"student.ema": {"uniform": [0, 0.9], "step": float("inf")}}, "step=inf"),
        ({"teacher_2.weight": {"uniform": [0.1, 1]}}, "no second teacher"),
        ({"tune.trials": {"choice": [1, 2]}}, "is the search itself"),
    ],
)
def test_a_wrong_space_is_refused_with_its_option_and_the_fix(space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_space(searching(space))


def test_all_wrong_options_are_named_at_once() -> None:
    wrong = {"loss.temprature": {"log": [0.1, 1]}, "losss.queue_size": {"choice": [1, 2]}}
    with pytest.raises(ConfigError) as error:
        open_space(searching(wrong))
    assert str(error.value).count("unknown option") == 2


def test_values_that_never_go_together_are_a_contradiction() -> None:
    space = {  # each is right alone: 8 images split into 4 and 8 parts, 6 and 10 into one
        "train.global_batch_size": {"choice": [6, 10]},
        "train.accumulation_steps": {"choice": [4, 8]},
    }
    with pytest.raises(ConfigError, match=r"contradictory.*does not split"):
        open_space(searching(space))


FUNCTION = """
def space(trial):
    depth = trial.suggest_int("student.mhsa.depth", 0, 2)
    if depth:
        trial.suggest_categorical("student.mhsa.heads", [4, 8])
    return {"loss.queue_size": 128}

def silent(trial):
    pass

def broken(trial):
    return trial.nothing

def wrong(trial):
    trial.suggest_float("loss.temprature", 0.1, 0.2)
"""


@pytest.fixture
def function_file(tmp_path: Path) -> str:
    path = tmp_path / "my_space.py"
    path.write_text(FUNCTION)
    return str(path)


def test_a_function_may_ask_on_conditions_and_set_options(function_file: str) -> None:
    config = tiny_config(tune={"space_function": f"{function_file}:space"})
    space = open_space(config)
    assert set(space.distributions) == {
        "student.mhsa.depth",
        "student.mhsa.heads",
        "loss.queue_size",
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        values = drawn(space, study.ask())
        assert ("student.mhsa.heads" in values) == (values["student.mhsa.depth"] > 0)
        assert trial_config(config, values).loss.queue_size == 128


def test_a_module_of_the_working_folder_is_found_and_hides_no_package(
    function_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(function_file).parent
    (folder / "optuna.py").write_text("raise RuntimeError")
    monkeypatch.chdir(folder)
    before = [entry for entry in sys.path if entry not in ("", str(folder))]  # as of `pcd-ray`
    monkeypatch.setattr(sys, "path", list(before))
    monkeypatch.delitem(sys.modules, "my_space", raising=False)
    space = open_space(tiny_config(tune={"space_function": "my_space:space"}))
    assert "student.mhsa.depth" in space.distributions
    assert sys.path == before
    with pytest.raises(ConfigError, match="has no attribute 'nothing'"):
        open_space(tiny_config(tune={"space_function": "optuna:nothing"}))
    del sys.modules["my_space"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("silent", "asks its trial for nothing"),
        ("broken", "fails with AttributeError"),
        ("wrong", "did you mean loss.temperature"),
        ("absent", "cannot be loaded"),
    ],
)
def test_a_wrong_function_is_refused(function_file: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_space(tiny_config(tune={"space_function": f"{function_file}:{name}"}))


def test_a_space_and_a_function_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"tune\.space_function"):
        tiny_config(tune={"space": SPACE, "space_function": "a.py:b"})


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two weights files; the one above it is that of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in "ab":
        (tmp_path / f"weights/{name}.pth").touch()
    return tmp_path / "weights"


@pytest.mark.parametrize("nested", [False, True])
def test_relative_weights_mean_the_same_in_a_trials_own_folder(
    weights: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    rule = {"choice": ["weights/a.pth", "./weights/b.pth", ""]}
    given = {"teacher": {"weights": rule}} if nested else {"teacher.weights": rule}
    teacher = {"arch": "test_resnet", "weights": f"{weights}/b.pth", "cache": {"views": 1}}
    caches = {"teacher.cache.path": {"choice": ["maps", "s3://bucket/maps"]}}
    config = with_absolute_choices(searching({**given, **caches}, teacher=teacher))
    space = open_space(config)
    assert space.own_values(config) == {"teacher.weights": f"{weights}/b.pth"}
    monkeypatch.chdir("/")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [drawn(space, study.ask()) for _ in range(20)]
    assert {each["teacher.weights"] for each in seen} == {
        f"{weights}/a.pth",
        f"{weights}/b.pth",
        "",
    }
    assert {each["teacher.cache.path"] for each in seen} == {
        f"{weights.parent}/maps",
        "s3://bucket/maps",
    }


def test_choices_without_paths_stay_as_they_are() -> None:
    config = searching()
    assert with_absolute_choices(config) == config


def test_a_function_may_name_relative_weights(weights: Path) -> None:
    path = weights.parent / "my_space.py"
    path.write_text(
        "def space(trial):\n"
        "    trial.suggest_categorical('teacher.weights', ['weights/a.pth', 'weights/b.pth'])\n"
        "    return {'teacher.cache.path': 'maps'}\n"
    )
    teacher = {"arch": "test_resnet", "weights": f"{weights}/b.pth"}
    config = tiny_config(tune={"space_function": f"{path}:space"}, teacher=teacher)
    space = open_space(config)
    study = optuna.create_study()
    own = space.own_values(config)
    study.enqueue_trial(own)
    trial = study.ask()
    values = drawn(space, trial)
    assert trial.params == own == {"teacher.weights": "weights/b.pth"}
    assert values == {
        "teacher.weights": f"{weights}/b.pth",
        "teacher.cache.path": f"{weights.parent}/maps",
    }


RETURNS = "def space(trial):\n    return {'teacher.weights': 'weights/absent.pth'}\n"


@pytest.mark.parametrize("function", [False, True])
def test_weights_that_do_not_exist_are_refused_before_a_trial_starts(
    weights: Path, function: bool
) -> None:
    path = weights.parent / "my_space.py"
    path.write_text(RETURNS)
    rule = {"teacher.weights": {"choice": ["weights/a.pth", "weights/absent.pth"]}}
    tune = {"space_function": f"{path}:space"} if function else {"space": rule}
    config = with_absolute_choices(tiny_config(tune=tune))
    with pytest.raises(ConfigError, match=f"teacher.weights: there is no {weights}/absent.pth;"):
        open_space(config)


def test_ranges_in_words() -> None:
    words = {n: in_words(d) for n, d in open_space(searching()).distributions.items()}
    assert words["loss.temperature"] == "0.03 .. 0.5 (log)"
    assert words["teacher.adaptor.rule"] == "gate | tangent | naive"


SETTING = """
import numpy
def numbers(trial):
    trial.suggest_float("loss.temperature", 0.1, 0.2)
    return {"student.ema": numpy.float32(0.5)}

def many(trial):
    return {"train.epochs": 5 * trial.suggest_int("train.epochs", 2, 4)}

def conditional(trial):
    deep = trial.suggest_int("student.mhsa.depth", 0, 1)
    trial.suggest_int("train.epochs", 2, 4 if deep else 20)

def words(trial):
    trial.suggest_float("loss.temperature", 0.1, 0.2)
    return {"train.epochs": "many" if trial.number % 2 else 3}
"""


def test_what_a_study_cannot_store_is_refused_before_a_trial_starts(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(SETTING)
    config = tiny_config(tune={"space_function": f"{tmp_path}/space.py:numbers"})
    with pytest.raises(ConfigError, match=r"student\.ema.*float32.*float\(x\) for numpy's"):
        open_space(config)


@pytest.mark.parametrize(("name", "most"), [("many", 20), ("conditional", 20), ("words", 3)])
def test_the_longest_trial_of_a_function_is_known(name: str, most: int, tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(SETTING)
    config = tiny_config(tune={"space_function": f"{tmp_path}/space.py:{name}"})
    assert open_space(config).most_epochs == most


def test_epochs_that_a_trial_was_refused_for_are_not_told() -> None:
    config = tiny_config()
    assert epochs_of({"train.epochs": "many"}, config) == config.train.epochs
