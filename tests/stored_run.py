"""A run on storage as the trainer leaves it, made without training."""

from pathlib import Path
from typing import Any

import torch
from tiny import images, tiny_config

from pcd_ray.checkpoint import RunFolder, checkpoint_name, save_checkpoint, to_host
from pcd_ray.config import Config
from pcd_ray.distill.build import build_student
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.student import Student

TEACHER = {
    "arch": "resnet50",
    "source": "teacher.safetensors",
    "licence": "CC-BY-NC-4.0",
    "head": "published",
    "sha256": "5" * 64,
}


def seen_student(config: Config) -> Student:
    """Return a student whose BatchNorm has seen data, in eval mode."""
    student = build_student(config, [[MlpShape((6,))]])
    with torch.no_grad():
        student.train()(images(0, 4, config.augment.image_size_px))
    return student.eval()


def store_run(root: Path, *steps: int, **sections: dict[str, Any]) -> tuple[RunFolder, Student]:
    """Write checkpoints of a run under ``root``; return its folder and its student."""
    run = {"root": str(root), "name": "stored", **sections.pop("run", {})}
    config = tiny_config(run=run, **sections)
    student = seen_student(config)
    return store_student(config, student, *steps), student


def store_student(
    config: Config, student: Student, *steps: int, average: Student | None = None
) -> RunFolder:
    """Write checkpoints that hold a student, and its moving average where there is one."""
    folder = RunFolder.of(config)
    averages = {} if average is None else {"average": average.state_dict()}
    queue = FeatureQueue(8, 6, seed=0, device=torch.device("cpu"))
    state = averages | {
        "student": student.state_dict(),
        "optimizer": {},
        "queues": [None if config.loss.kind == "mse" else queue.state_dict()],
        "audit": [],
    }
    backbone = student.backbone
    for step in steps:
        about = {
            "step": step,
            "total_steps": max(steps),
            "epoch": step / 10,
            "teacher": TEACHER,
            "law_error": 1e-16,
            "student": {
                "backbone": backbone.name,
                "mean": (backbone.mean.flatten() / 255).tolist(),
                "std": (backbone.std.flatten() / 255).tolist(),
            },
            "data_sha256": "d" * 64,
            "metrics": {"train/loss": 1.5},
            "version": "0.1.0",
        }
        uri = folder.file("checkpoints", checkpoint_name(step))
        save_checkpoint(uri, to_host(state | {"step": step}), about, config)
    return folder
