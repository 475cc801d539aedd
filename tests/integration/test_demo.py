"""The demo from an installed wheel, made quick: scenes, teacher, student, judging and report."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
from tiny_run import changed

from pcd_ray.config import Config, config_from_file
from pcd_ray.errors import ConfigError, EvaluationError, ShardError
from pcd_ray.evaluate import eval_sets
from pcd_ray.export import export
from pcd_ray.ray_demo import QUICK, demo
from pcd_ray.train.ray_launch import train

ROOT = Path(__file__).parents[2]
NETWORKS = ("untrained", "student", "teacher")
TINY = (
    "augment.image_size_px=32",
    "eval.segmentation_size_px=48",
    "eval.segment.probe_steps=30",
    "optim.warmup_epochs=0.5",
    "train.epochs=1",
    "train.log_every_steps=1",
)


@dataclass(frozen=True)
class Demo:
    """What the demo left behind."""

    path: Path
    printed: dict[str, Any]

    @property
    def config(self) -> Config:
        return config_from_file(str(self.path / "config.yaml"))


def installed_wheel(folder: Path) -> Path:
    """Build the package's wheel from a copy, offline; return a folder that it is installed in."""
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    shutil.copytree(ROOT / "pcd_ray", source / "pcd_ray")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--no-input"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    return site


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo as a user runs it who has installed the package: no checkout is at hand."""
    folder = tmp_path_factory.mktemp("elsewhere")
    start = ROOT / "tests" / "process_start"
    path = os.pathsep.join([str(start), str(installed_wheel(tmp_path_factory.mktemp("wheel")))])
    found = subprocess.run(
        [sys.executable, "-m", "pcd_ray", "demo", "--quick", "--json", *TINY],
        cwd=folder, env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    return Demo(folder / "runs" / "demo_quick", json.loads(found.stdout))


def test_its_summary_has_the_scores_of_all_three_networks_in_percent(result: Demo) -> None:
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary == result.printed
    scores = {name: value for name, value in summary.items() if isinstance(value, dict)}
    assert scores.pop("seconds").keys() == {"scenes_and_pack", "teacher", "distil_and_judge"}
    assert scores.keys() == {"segmentation_miou", "knn_top1", "knn_k1_top1"}
    for values in scores.values():
        assert tuple(values) == NETWORKS
        assert all(math.isfinite(value) and 0 <= value <= 100 for value in values.values())
    assert summary["step"] == 2
    assert summary["path"] == str(result.path)


def test_its_report_and_pictures_are_there(result: Demo) -> None:
    folder = result.path
    pixel = ("similarity", "receptive_fields", "attention_student")
    for name in ("loss_curve", "views", "pca_maps", "segmentation", *pixel):
        picture = (folder / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG"), name
    page = Path(result.printed["report"]).read_text()
    assert page.count("data:image/png;base64,") == 8
    for words in ("mIoU %, validation", "kNN on pooled features", "striped square"):
        assert words in page


def test_an_export_of_it_carries_its_scores(result: Demo) -> None:
    with safetensors.safe_open(export(str(result.path)).path, "pt") as file:
        metrics = json.loads(file.metadata()["metrics"])
    assert metrics["segmentation_miou"] == result.printed["segmentation_miou"]["student"]
    assert metrics["knn_top1"] == result.printed["knn_top1"]["student"]


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_cannot_be_judged_by_one_score_keeps_the_others_and_says_so(
    result: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(result.path, tmp_path / "demo_quick")
    probe = tmp_path / "demo_quick" / "scenes" / "segmentation"
    sections = {"run": {"root": str(tmp_path)}, "eval": {"segmentation": str(probe)}}
    config = changed(result.config, **sections)
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
    summary = json.loads((tmp_path / "demo_quick" / "summary.json").read_text())
    assert summary["knn_top1"] == result.printed["knn_top1"]
    assert "segmentation_miou" not in summary
    assert "val_0001.png" in summary["not_judged"]["segmentation"]
    page = (tmp_path / "demo_quick" / "report.html").read_text()
    assert "Not judged: segmentation" in page
    assert page.count("data:image/png;base64,") == 7
    mask.write_bytes(good)
    again = train(config).metrics
    assert not {"not_judged", "not_evaluated"} & again.keys()
    # points: with other numbers of threads the probe's float32 sums are rounded otherwise
    miou = pytest.approx(result.printed["segmentation_miou"], abs=1)
    assert again["segmentation_miou"] == miou
    classes = again["segmentation_classes"]
    assert len(classes) == 7
    assert all(tuple(values) == NETWORKS for values in classes.values())


def written(folder: Path) -> dict[Path, int]:
    """Return when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_seed_or_size_is_refused_before_a_scene_is_touched(result: Demo) -> None:
    before = written(result.path)
    config = result.config
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 1.*another run\.name"):
        demo(changed(config, run={"seed": 1}), QUICK)
    with pytest.raises(ConfigError, match=r"train_scenes: 128 -> 1600"):
        demo(config)
    assert written(result.path) == before
