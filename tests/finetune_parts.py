"""A small task and settings for tests of fine-tuning: noise of 8 px, four classes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.evaluate.finetune.finetune import FinetuneState, finetune_steps, new_state
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings

CPU = torch.device("cpu")
CLASSES = 4


class SmallNet(nn.Module):
    """Two convolutions and a classifier; without BatchNorm, images do not see one another."""

    def __init__(self, *, batchnorm: bool, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        features = self.dropout(self.norm(self.first(images)).relu()).mean(dim=(2, 3))
        logits = self.head(features)
        return {
            "class": F.cross_entropy(logits, labels),
            "norm": 0.01 * features.square().sum(dim=1).mean(),
        }


@dataclass(frozen=True)
class SmallTask:
    """Classify noise; the view of an image depends on its seed."""

    num_images: int = 10
    batchnorm: bool = False
    dropout: float = 0.0
    poison: int = -1
    """An image whose pixels are infinite."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return SmallNet(batchnorm=self.batchnorm, dropout=self.dropout).double()

    def example(self, index: int, seed: int) -> tuple[Tensor, int]:
        fixed = torch.Generator().manual_seed(index)
        view = torch.Generator().manual_seed(seed)
        image = torch.randn(3, 8, 8, generator=fixed, dtype=torch.float64)
        image += 0.1 * torch.randn(3, 8, 8, generator=view, dtype=torch.float64)
        return image / (index != self.poison), index % CLASSES

    def collate(self, examples: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
        images, labels = zip(*examples, strict=True)
        return torch.stack(images).to(device), torch.tensor(labels, device=device)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        head = list(model.get_submodule("head").parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
        return [{"params": rest}, {"params": head, "lr_scale": 10.0, "weight_decay": 0.0}]


def finetune_settings(**changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {
        "steps": 7,
        "global_batch_size": 4,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "schedule": "poly",
        "poly_power": 0.9,
        "milestones": (),
        "warmup_steps": 2,
        "clip_grad_norm": 0.0,
        "seed": 3,
        "precision": "fp32",
        "sync_batchnorm": False,
        "checkpoint_every_steps": 2,
        "log_every_steps": 1,
    }
    return FinetuneSettings(**(values | changes))


def trained_state(
    task: SmallTask, settings: FinetuneSettings, *, stop: int | None = None, stored: Any = None
) -> FinetuneState:
    """Train from the start or from a stored state, to a step or to the last one."""
    state = new_state(task, settings, device=CPU)
    if stored is not None:
        state.load_state_dict(stored)
    for done in finetune_steps(task, settings, state, device=CPU):
        if done.step == stop:
            break
    return state
