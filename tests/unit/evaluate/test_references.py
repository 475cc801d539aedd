"""The level lines of a run's kNN panel are of the sets, crops and neighbours it has now."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config
from pcd_ray.evaluate.figures import loss_curve
from pcd_ray.evaluate.references import store_references, stored_references
from pcd_ray.evaluate.run_report import write_report

EVAL: dict[str, Any] = {"knn_train": "a", "knn_test": "b", "every_epochs": 1}
SETS = ["c" * 64, "d" * 64]
FOUND = {"teacher": 60.0, "untrained": 20.0}
JUDGED = {"untrained": 33.0, "student": 44.0, "teacher": 55.0}
HISTORY = [{"step": step, "eval/knn_top1_pct": 20.0 + step} for step in range(5)]
PLAN = {
    "backbone_parameters": 1,
    "teacher": {"arch": "a", "source": "b", "licence": "c"},
    "images": 8,
    "global_batch_size": 4,
    "num_workers": 1,
    "device": "cpu",
    "law_error": 1e-16,
    "chance_loss": 4.0,
}


def run(root: Path, **changes: Any) -> tuple[RunFolder, Config]:
    config = tiny_config(run={"root": str(root), "name": "run"}, eval=EVAL | changes)
    return RunFolder.of(config), config


def curves_of(folder: RunFolder, config: Config) -> bytes:
    summary = {"plan": PLAN, "step": 4, "training_s": 1.0, "knn_top1": JUDGED}
    write_report(folder, config, summary, HISTORY)
    return Path(folder.file("figures", "loss_curve.png")).read_bytes()


def drawn(scores: dict[str, float]) -> bytes:
    lines = {"Student, untrained": scores["untrained"], "Teacher": scores["teacher"]}
    return loss_curve(HISTORY, knn_references=lines)


@pytest.mark.parametrize(
    "changes", [{"knn_train": "c"}, {"knn_test": "c"}, {"knn_k": 5}, {"image_size_px": 96}]
)
def test_references_count_for_what_they_were_measured_on_alone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder, config = run(tmp_path)
    assert stored_references(folder, config) is None
    store_references(folder, config, FOUND, SETS)
    assert stored_references(folder, config) == stored_references(folder, config, SETS) == FOUND
    assert stored_references(folder, config, [SETS[0], "e" * 64]) is None  # other images since
    assert stored_references(*run(tmp_path, every_epochs=7, image_size_px=64)) == FOUND
    assert stored_references(*run(tmp_path, **changes)) is None


def test_a_file_that_does_not_say_what_it_was_measured_on_does_not_count(tmp_path: Path) -> None:
    folder, config = run(tmp_path)
    path = Path(folder.file("references.json"))
    path.parent.mkdir()
    path.write_text(json.dumps({"eval/knn_top1_pct": FOUND}))
    assert stored_references(folder, config) is None


def test_a_report_draws_references_of_the_same_sets_and_else_what_was_judged(
    tmp_path: Path,
) -> None:
    folder, config = run(tmp_path)
    assert curves_of(folder, config) == drawn(JUDGED)
    store_references(folder, config, FOUND, SETS)
    assert curves_of(folder, config) == drawn(FOUND)
    assert curves_of(*run(tmp_path, knn_test="c")) == drawn(JUDGED)
