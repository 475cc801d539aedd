"""The README's commands, with places as a user types them: relative to where they stand."""

from pathlib import Path

import pytest
from tiny_run import write_images, write_teacher

from pcd_ray.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")


def test_relative_places_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "photos", 16, seed=0)
    write_teacher(tmp_path / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)  # workers stand in folders of their own
    options = [
        "data.shards=shards",
        "augment.image_size_px=32",
        "teacher.arch=test_resnet",
        "teacher.weights=teacher.safetensors",
        "student.backbone=test_resnet",
        "loss.queue_size=64",
        "optim.warmup_epochs=0.1",
        "train.epochs=1",
        "train.global_batch_size=8",
        "export.path=out/student.safetensors",
    ]
    assert main(["pack", "data.sources=photos", "data.shards=shards"]) == 0
    assert main(["train", *options, "--dry-run"]) == 0
    assert main(["train", *options]) == 0
    assert main(["inspect", "runs/pcd"]) == 0
    assert main(["export", "runs/pcd", "export.path="]) == 0
    assert (tmp_path / "runs/pcd/exported/test_resnet.safetensors").is_file()
    assert (tmp_path / "runs/pcd/report.html").is_file()
    monkeypatch.chdir(tmp_path / "photos")
    assert main(["export", "../runs/pcd"]) == 0  # where it was asked for when the run began
    assert (tmp_path / "out/student.safetensors").is_file()
