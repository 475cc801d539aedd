"""Real Ray: fine-tuning that finishes, is taken up again, loses a worker, or cannot go on."""

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_parts
import processes
import pytest
import torch
from finetune_parts import SmallTask, finetune_settings, trained_state
from processes import train_workers, wait_for

from pcd_ray.checkpoint import checkpoint_steps
from pcd_ray.config import Config, config_from_values
from pcd_ray.data.plan import EpochPlan
from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings
from pcd_ray.evaluate.finetune.ray_finetune import finetune, folder_of
from pcd_ray.evaluate.judging import Place
from pcd_ray.seeds import derive_seed

pytestmark = pytest.mark.usefixtures("ray_session")

CONFIG = config_from_values({"train": {"threads_per_worker": 1, "keep_last": 2}})
TASK = SmallTask(batchnorm=True)


@pytest.fixture(scope="module", autouse=True)
def tasks_of_tests() -> Iterator[None]:
    """Let workers have classes of tests, which they cannot import."""
    from ray import cloudpickle

    modules = (finetune_parts, processes, sys.modules[__name__])
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@dataclass(frozen=True)
class GatedTask(SmallTask):
    """One image does not come before there is a file."""

    awaited: int = 0
    gate: str = ""

    def example(self, index: int, seed: int) -> Any:
        if index == self.awaited:
            wait_for(Path(self.gate).exists, timeout_s=300)
        return super().example(index, seed)


def place_in(folder: Path) -> Place:
    return Place(str(folder), str(folder))


def run(
    task: SmallTask, settings: FinetuneSettings, folder: Path, config: Config = CONFIG
) -> tuple[dict[str, torch.Tensor], str]:
    with contextlib.redirect_stderr(io.StringIO()) as console:
        trained = finetune(
            task,
            settings,
            place=place_in(folder),
            num_workers=1,
            device="cpu",
            config=config,
        )
    return trained.weights, console.getvalue()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_it_is_the_loop_and_a_finished_one_is_taken_as_it_is(tmp_path: Path) -> None:
    settings = finetune_settings()
    weights, console = run(TASK, settings, tmp_path)
    assert_equal(weights, trained_state(TASK, settings).state_dict()["model"])
    assert "fine-tuning from step 0 of 7" in console
    assert "step 7/7 |" in console
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 8)]
    assert set(json.loads(lines[0])) == {"step", "class", "norm", "lr"}
    assert checkpoint_steps(folder_of(TASK, settings, folder=place_in(tmp_path).work)) == [6, 7]
    again, console = run(TASK, settings, tmp_path)
    assert_equal(again, weights)
    assert console == ""


def test_a_changed_setting_starts_anew_and_leaves_what_is_there(tmp_path: Path) -> None:
    settings = finetune_settings(log_every_steps=5)
    places = {
        folder_of(task, each, folder=str(tmp_path)).uri
        for task, each in (
            (TASK, settings),
            (TASK, finetune_settings(log_every_steps=2, checkpoint_every_steps=1)),
            (TASK, finetune_settings(lr=0.2)),
            (SmallTask(num_images=9), settings),
        )
    }
    assert len(places) == 3  # how often is logged and stored makes no difference


def test_a_killed_worker_is_started_again_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = finetune_settings(steps=12, checkpoint_every_steps=3)
    order = derive_seed(settings.seed, "finetune_order")
    (awaited,) = EpochPlan(((100, 1.0),), order).rows(40, 41)[1].tolist()  # of step 10
    gate = tmp_path / "gate"
    task = GatedTask(100, batchnorm=True, awaited=awaited, gate=str(gate))
    place = folder_of(task, settings, folder=place_in(tmp_path).work)
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: 9 in checkpoint_steps(place), timeout_s=300)
        (victim,) = train_workers(os.getpid())
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)
        gate.touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    weights, console = run(task, settings, tmp_path)
    killer.join()
    assert killed
    assert "fine-tuning from step 9 of 12" in console
    assert_equal(weights, trained_state(task, settings).state_dict()["model"])


def test_an_error_that_trying_again_cannot_mend_ends_it_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"not finite at step [0-2] with learning rate"):
        run(SmallTask(poison=4), finetune_settings(), tmp_path)
