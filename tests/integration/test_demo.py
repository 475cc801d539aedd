"""The demo, made tiny: scenes, teacher, student, judging and report in one go."""

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors
from tiny import tiny_config
from tiny_run import changed

from pcd_ray.config import Config, config_from_file
from pcd_ray.errors import ConfigError, EvaluationError, ShardError
from pcd_ray.evaluate import eval_sets
from pcd_ray.export import export
from pcd_ray.ray_demo import DemoResult, DemoSize, demo
from pcd_ray.train.ray_launch import train

pytestmark = pytest.mark.usefixtures("ray_session")

NETWORKS = ("untrained", "student", "teacher")
SIZE = DemoSize(
    train_scenes=16,
    test_scenes=8,
    probe_scenes=(4, 3),
    scene_px=48,
    pictures=70,
    teacher_steps=2,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(
        run={"root": str(tmp_path_factory.mktemp("runs")), "name": "demo"},
        augment={"image_size_px": 32},
        teacher={"kwargs": {"output_stride": 8}, "head": "published"},
        student={"kwargs": {"output_stride": 8}, "mhsa": {"heads": 4}},
        optim={"name": "adamw", "base_lr": 0.01, "warmup_epochs": 0.5},
        train={"epochs": 1, "global_batch_size": 8, "device": "cpu", "log_every_steps": 1},
    )


@pytest.fixture(scope="module")
def result(config: Config, ray_session: None) -> DemoResult:
    del ray_session
    return demo(config, SIZE)


def test_its_summary_has_the_scores_of_all_three_networks_in_percent(result: DemoResult) -> None:
    summary = json.loads((Path(result.run.path) / "summary.json").read_text())
    assert summary == result.summary()
    scores = {name: value for name, value in summary.items() if isinstance(value, dict)}
    assert scores.pop("seconds").keys() == {"scenes_and_pack", "teacher", "distil_and_judge"}
    assert scores.keys() == {"segmentation_miou", "knn_top1", "knn_k1_top1"}
    for values in scores.values():
        assert tuple(values) == NETWORKS
        assert all(math.isfinite(value) and 0 <= value <= 100 for value in values.values())
    assert summary["step"] == 2
    assert summary["path"] == result.run.path


def test_its_report_and_pictures_are_there(result: DemoResult) -> None:
    folder = Path(result.run.path)
    pixel = ("similarity", "receptive_fields", "attention_student")
    for name in ("loss_curve", "views", "pca_maps", "segmentation", *pixel):
        picture = (folder / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG"), name
    page = Path(result.summary()["report"]).read_text()
    assert page.count("data:image/png;base64,") == 8
    for words in ("mIoU %, validation", "kNN on pooled features", "striped square"):
        assert words in page
    classes = result.run.metrics["segmentation_classes"]
    assert len(classes) == 7
    assert all(tuple(values) == NETWORKS for values in classes.values())


def test_an_export_of_it_carries_its_scores(result: DemoResult) -> None:
    with safetensors.safe_open(export(result.run.path).path, "pt") as file:
        metrics = json.loads(file.metadata()["metrics"])
    assert metrics["segmentation_miou"] == result.summary()["segmentation_miou"]["student"]
    assert metrics["knn_top1"] == result.summary()["knn_top1"]["student"]


def test_a_run_that_cannot_be_judged_by_one_score_keeps_the_others_and_says_so(
    result: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(result.run.path, tmp_path / "demo")
    whole = config_from_file(f"{result.run.path}/config.yaml")
    probe = tmp_path / "demo" / "scenes" / "segmentation"
    config = changed(whole, run={"root": str(tmp_path)}, eval={"segmentation": str(probe)})
    mask = probe / "masks" / "val_0001.png"
    good = mask.read_bytes()
    mask.write_bytes(good[:50])
    with pytest.raises(
        ShardError, match=r"eval\.segmentation: \S+val_0001\.png: cannot be decoded"
    ):
        train(config)
    monkeypatch.setattr(eval_sets, "PROBE_SAMPLE", 2)  # it is none of these two
    message = (
        r"written without segmentation \(eval\.segmentation: \S+val_0001\.png: .*the same command"
    )
    with pytest.raises(EvaluationError, match=message):
        train(config)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["knn_top1"] == result.run.metrics["knn_top1"]
    assert "segmentation_miou" not in summary
    assert "val_0001.png" in summary["not_judged"]["segmentation"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Not judged: segmentation" in page
    assert page.count("data:image/png;base64,") == 7
    mask.write_bytes(good)
    again = train(config).metrics
    assert "not_judged" not in again
    assert "not_evaluated" not in again
    assert again["segmentation_miou"] == result.run.metrics["segmentation_miou"]


def written(folder: Path) -> dict[Path, int]:
    """Return when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_seed_or_size_is_refused_before_a_scene_is_touched(
    config: Config, result: DemoResult
) -> None:
    folder = Path(result.run.path)
    before = written(folder)
    other = changed(config, run={"seed": 1})
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 1.*another run\.name"):
        demo(other, SIZE)
    with pytest.raises(ConfigError, match=r"scene_px: 48 -> 112"):
        demo(config)
    assert written(folder) == before
