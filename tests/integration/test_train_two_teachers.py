"""A run with two tiny teachers of different widths, through Ray."""

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from tiny_run import NUM_IMAGES, STEPS, changed, prepare, write_teacher

from pcd_ray.checkpoint import RunFolder, find_checkpoint
from pcd_ray.config import Config
from pcd_ray.errors import CheckpointError
from pcd_ray.export import export
from pcd_ray.inspection import inspect
from pcd_ray.train.ray_launch import TrainResult, dry_run, train
from pcd_ray.train.run_plan import RunPlan


@dataclass
class Run:
    """A run that was stopped after an epoch and has gone on."""

    alone: Config
    config: Config
    plan: RunPlan
    result: TrainResult
    console: str
    kept: dict[str, bytes]
    """What lay in the folder after the epoch and must stay as it was."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)


KEPT = ("teacher_head.safetensors", "teacher_2_head.safetensors", "references.json")


def kept_in(folder: RunFolder) -> dict[str, bytes]:
    return {name: Path(folder.file(name)).read_bytes() for name in KEPT}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Run:
    del ray_session
    root = tmp_path_factory.mktemp("two")
    prepared = prepare(root)
    fit = {"dim": 12, "hidden": 24, "images": 20, "views": 3, "steps": 20}
    second = {
        "weights": write_teacher(root / "second.safetensors", seed=1),
        "head": "pca",
        "kwargs": {"output_stride": 8},
        "fit": {"dim": 8, "images": 20},
        "licence": "CC0-1.0",
        "weight": 0.5,
    }
    alone = changed(prepared, teacher={"head": "contrastive", "fit": fit})
    config = changed(alone, teacher_2=second)
    plan = dry_run(config)
    with contextlib.redirect_stderr(io.StringIO()) as console:
        train(changed(config, train={"epochs": 1, "num_workers": 1}))
        kept = kept_in(RunFolder.of(config))
        result = train(changed(config, run={"allow_changes": True}))
    return Run(alone, config, plan, result, console.getvalue(), kept)


def test_the_plan_says_what_both_are(run: Run) -> None:
    plan = run.plan.summary()
    assert (plan["embedding_width"], plan["teacher_2"]["embedding_width"]) == (12, 8)
    assert plan["teacher_2"]["weight"] == 0.5
    assert plan["teacher_2"]["sha256"] == ""  # its head is still to be fitted
    assert plan["loss_grid"] == (4, 4)
    assert run.result.metrics["plan"]["teacher_2"]["licence"] == "CC0-1.0"


def test_each_has_its_head_and_its_queue_also_after_a_stop(run: Run) -> None:
    assert run.console.count("fitting the teacher's 12-wide contrastive head") == 1
    assert re.search(r"the head finds \d+% of images by another view of them", run.console)
    assert run.console.count("fitting the teacher_2's 8-wide pca head") == 1
    assert f"resumed at step {STEPS // 2} of {STEPS}" in run.console
    fitted = safetensors.torch.load_file(run.folder.fitted_head("teacher"))
    assert fitted["3.weight"].shape == (12, 24)
    queues = find_checkpoint(run.folder.uri).state["queues"]
    assert [queue["negatives"].shape[1] for queue in queues] == [12, 8]
    assert {queue["num_pushed"] for queue in queues} == {2 * NUM_IMAGES}
    assert all(torch.isfinite(queue["negatives"]).all() for queue in queues)


def test_what_is_fitted_and_measured_once_is_used_when_the_run_goes_on(run: Run) -> None:
    assert kept_in(run.folder) == run.kept
    assert run.console.count("kNN top-1: teacher") == 1


def test_the_loss_is_the_weighted_sum_in_every_line(run: Run) -> None:
    lines = [line for line in run.result.history if "train/loss" in line]
    assert len(lines) == STEPS // 2 + 1  # the first sitting logs its last step too
    for line in lines:
        total = line["train/loss_1"] + 0.5 * line["train/loss_2"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)


def test_checkpoint_export_and_inspection_name_both_with_licence_and_hash(run: Run) -> None:
    about = find_checkpoint(run.folder.uri).about
    assert [about[name]["licence"] for name in ("teacher", "teacher_2")] == ["MIT", "CC0-1.0"]
    facts = inspect(run.folder.uri).facts
    assert [facts[name]["head"] for name in ("teacher", "teacher_2")] == ["contrastive", "pca"]
    with safetensors.safe_open(export(run.folder.uri).path, "pt") as file:
        known = file.metadata()
    assert (known["teacher_licence"], known["teacher_2_licence"]) == ("MIT", "CC0-1.0")
    assert known["teacher_2_sha256"] == about["teacher_2"]["sha256"]
    assert known["teacher_2"] == "second.safetensors"


def test_both_are_judged_beside_the_student(run: Run) -> None:
    networks = {"untrained", "student", "teacher", "teacher_2"}
    assert set(run.result.metrics["knn_top1"]) == networks
    references = json.loads(Path(run.folder.file("references.json")).read_text())
    assert set(references["eval/knn_top1_pct"]) == networks - {"student"}
    page = Path(run.folder.file("report.html")).read_text()
    assert "Second teacher" in page
    assert "CC0-1.0" in page


def test_another_second_teacher_or_none_is_refused(run: Run, tmp_path: Path) -> None:
    again = changed(run.config, run={"allow_changes": False})
    assert dry_run(again).teacher_2 is not None
    other = {"weights": write_teacher(tmp_path / "other.safetensors", seed=2), "head": "auto"}
    with pytest.raises(CheckpointError, match=r"teacher_2\.head: 'pca' -> 'auto'"):
        dry_run(changed(again, teacher_2=other))
    first = {"weights": other["weights"]}
    with pytest.raises(CheckpointError, match=r"\n  teacher\.weights: the weights of \S+ are oth"):
        dry_run(changed(again, teacher=first))
    same_head = {"weights": other["weights"]}  # which was fitted to other weights
    with pytest.raises(CheckpointError, match=r"teacher_2\.weights: the weights of \S+ are others"):
        dry_run(changed(again, teacher_2=same_head))
    with pytest.raises(CheckpointError, match="teacher_2: given -> none"):
        dry_run(run.alone)
