"""Optimiser, parameter groups, and the learning rate of each step."""

import math
from dataclasses import dataclass

import torch
from timm.optim.lars import Lars
from torch import nn

BATCH_OF_BASE_LR = 256
"""Images per step that ``optim.base_lr`` is stated for."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up from 0, then a cosine; per step, in floating point."""

    peak_lr: float
    warmup_steps: float
    total_steps: int
    final_fraction: float

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        span = max(1.0, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / span)))
        return self.peak_lr * (self.final_fraction + (1 - self.final_fraction) * cosine)


def peak_learning_rate(base_lr: float, global_batch_size: int) -> float:
    """Scale a rate per 256 images to the global batch, once and in floating point."""
    return base_lr * global_batch_size / BATCH_OF_BASE_LR


def parameter_groups(student: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Return two groups: weights with decay; all others without, which LARS does not adapt.

    Others are biases, norms, and what a timm model inside the student names in its
    ``no_weight_decay()``: class tokens, positions, tables of relative positions.
    """
    named = {
        f"{path}.{name}".lstrip(".")
        for path, module in student.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and name not in named]
    others = [p for name, p in trained if p.ndim <= 1 or name in named]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_optimizer(name: str, student: nn.Module, *, weight_decay: float) -> torch.optim.Optimizer:
    """Return LARS (momentum 0.9, trust coefficient 1e-3) or AdamW; the rate is set per step."""
    groups = parameter_groups(student, weight_decay=weight_decay)
    if name == "lars":
        groups[0]["always_adapt"] = True  # timm's LARS would be plain SGD without weight decay
        optimizer: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=0.9, trust_coeff=1e-3)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
