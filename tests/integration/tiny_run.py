"""A run of a minute: coloured JPEGs, a teacher with an MLP head, 22 steps of two workers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pcd_ray import storage
from pcd_ray.config import Config, SourceConfig, config_from_values
from pcd_ray.data.ray_pack import pack
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.weights import save_teacher

NUM_IMAGES, BATCH, EPOCHS = 44, 4, 2
STEPS = EPOCHS * NUM_IMAGES // BATCH
CLASSES = ("blue", "green", "red")


def write_images(folder: Path, count: int, *, seed: int) -> str:
    """Write JPEGs of three classes of colour; each has its own stripes."""
    random = np.random.default_rng(seed)
    for number in range(count):
        label = number % 3
        pixels = random.integers(0, 90, (40, 48, 3)).astype(np.uint8)
        pixels[:, :: 2 + number % 5, 2 - label] += 120
        path = folder / CLASSES[label] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return str(folder)


def write_teacher(path: Path, *, seed: int = 0) -> str:
    torch.manual_seed(seed)
    backbone = build_backbone("test_resnet")
    width = int(backbone.body.num_features)
    head = nn.Sequential(
        nn.Linear(width, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)
    )
    save_teacher(str(path), backbone, head.eval(), activation="relu", licence="MIT")
    return str(path)


def prepare(root: Path) -> Config:
    """Write images, shards and a teacher under ``root``; return the run on them."""
    config = prepare_unpacked(root)
    pack(config.data, seed=config.run.seed)
    return config


def prepare_unpacked(root: Path) -> Config:
    """Write images and a teacher under ``root``; return the run on shards to be packed."""
    write_images(root / "train", NUM_IMAGES, seed=0)
    write_images(root / "test", 12, seed=1)
    write_teacher(root / "teacher.safetensors")
    return run_under(str(root))


def run_under(root: str) -> Config:
    """Return the run on what `prepare` writes under a folder or a bucket's prefix."""
    train, test = storage.join(root, "train"), storage.join(root, "test")
    config = config_from_values(
        {
            "run": {"root": storage.join(root, "runs"), "name": "reference"},
            "data": {
                "sources": train,
                "shards": storage.join(root, "shards"),
                "images_per_task": 8,
            },
            "augment": {"image_size_px": 32},
            "teacher": {
                "arch": "test_resnet",
                "weights": storage.join(root, "teacher.safetensors"),
                "kwargs": {"output_stride": 8},
            },
            "student": {
                "backbone": "test_resnet",
                "output_stride": 8,
                "mhsa": {"heads": 4},
                "ema": 0.9,
            },
            "loss": {"queue_size": 32},
            "optim": {"name": "adamw", "base_lr": 0.03, "warmup_epochs": 0.5},
            "train": {
                "epochs": EPOCHS,
                "global_batch_size": BATCH,
                "num_workers": 2,
                "device": "cpu",
                "threads_per_worker": 1,
                "log_every_steps": 2,
                "checkpoint_every_steps": 4,
            },
            "scale": {"cpu_ms_per_image": 1.0},  # else it is measured, and summaries differ
            "eval": {
                "every_epochs": 1,
                "knn_train": train,
                "knn_test": test,
                "knn_k": 5,
                "pictures": False,  # half of the work of judging such a run
            },
        }
    )
    assert isinstance(config.data.sources[0], SourceConfig)
    return config


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a config with other values, checked anew."""
    from pcd_ray.config import config_to_values

    values = config_to_values(config)
    return config_from_values(
        {k: (v or {}) | sections[k] if k in sections else v for k, v in values.items()}
    )
