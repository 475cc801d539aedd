"""Small inputs for tests: configurations, images, vectors."""

from typing import Any

import torch
import torch.nn.functional as F

from pcd_ray.config import Config, config_from_values


def tiny_config(**sections: dict[str, Any]) -> Config:
    """Return a run of seconds: 64 px, tiny timm networks, a short queue; sections override."""
    tiny: dict[str, dict[str, Any]] = {
        "augment": {"image_size_px": 64},
        "teacher": {"arch": "test_resnet", "head": "none"},
        "student": {"backbone": "test_resnet"},
        "loss": {"queue_size": 64},
        "optim": {"warmup_epochs": 1},
        "train": {"global_batch_size": 8, "epochs": 2},
    }
    for name, values in sections.items():
        tiny[name] = tiny.get(name, {}) | values
    return config_from_values(tiny)


def images(seed: int, count: int, size_px: int) -> torch.Tensor:
    """Return (count, size_px, size_px, 3) uint8 noise."""
    random = torch.Generator().manual_seed(seed)
    shape = (count, size_px, size_px, 3)
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def unit_rows(
    seed: int, count: int, width: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return (count, width) random unit vectors."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=random, dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)
