"""The page of a run says how its student was distilled."""

from pathlib import Path

import pytest
from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.evaluate.run_report import write_report

PLAN = {
    "backbone_parameters": 1,
    "teacher": {"arch": "a", "source": "b", "licence": "c"},
    "images": 8,
    "global_batch_size": 4,
    "num_workers": 1,
    "device": "cpu",
    "law_error": 1e-16,
    "chance_loss": 1.25,
}
HISTORY = [{"step": step, "train/loss": 2.0 - step} for step in range(2)]


@pytest.mark.parametrize(
    ("kind", "title", "note"),
    [
        ("pixel", "test_resnet pixel by pixel: run", "compares pixels. Losses of other kinds, "),
        ("image", "test_resnet image by image: run", "compares pooled images. Losses of other "),
        ("mse", "test_resnet by regression of pixels: run", "squared distance of unit vectors"),
    ],
)
def test_a_report_says_what_was_compared_and_what_chance_costs(
    kind: str, title: str, note: str, tmp_path: Path
) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "run"}, loss={"kind": kind})
    summary = {"plan": PLAN, "step": 1, "training_s": 1.0}
    page = Path(write_report(RunFolder.of(config), config, summary, HISTORY)).read_text()
    assert title in page
    assert note in page
    assert "costs 1.25 here." in page
    assert ("temperatures" in page) == (kind != "mse")
