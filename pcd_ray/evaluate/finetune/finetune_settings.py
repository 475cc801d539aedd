"""How a network is fine-tuned, and what of it numbers follow from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pcd_ray.errors import ConfigError

_STEP_DECAY = 0.1  # of the learning rate at each milestone


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """How a network is fine-tuned."""

    steps: int
    """Optimiser steps in all."""
    global_batch_size: int
    """Images per step, over all workers."""
    lr: float
    """Learning rate at the start, behind the warm-up."""
    momentum: float
    weight_decay: float
    schedule: Literal["poly", "step"]
    """``poly``: lr (1 - t / steps)^poly_power; ``step``: a tenth at each milestone."""
    poly_power: float
    milestones: tuple[int, ...]
    """Steps done when the rate falls, of ``step``."""
    warmup_steps: int
    """Steps of linear warm-up from 0, by which the schedule is multiplied."""
    clip_grad_norm: float
    """Largest norm of the gradient; 0 leaves it."""
    seed: int
    precision: Literal["fp32", "bf16"]
    """``bf16``: autocast to bfloat16."""
    sync_batchnorm: bool
    """BatchNorm statistics over all workers; cuda with several workers, else no effect."""
    checkpoint_every_steps: int
    """0: at the end alone."""
    log_every_steps: int

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.schedule == "poly":
            share = (1 - step / self.steps) ** self.poly_power
        else:
            share = _STEP_DECAY ** sum(step >= milestone for milestone in self.milestones)
        return float(self.lr * share * min(1.0, (step + 1) / (self.warmup_steps + 1)))

    def facts(self, *, num_workers: int, device: str) -> dict[str, Any]:
        """Return all that numbers follow from, besides the seed, as plain data.

        Batches of a worker count: losses of a detector are means over a worker's images, and
        BatchNorm sees a worker's images alone where statistics are not synchronised.
        """
        left_out = ("seed", "sync_batchnorm", "checkpoint_every_steps", "log_every_steps")
        facts = {name: value for name, value in asdict(self).items() if name not in left_out}
        mine = self.global_batch_size // num_workers
        whole = num_workers == 1 or (self.sync_batchnorm and device == "cuda")
        return {
            **facts,
            "workers": num_workers,
            "images_per_worker": mine,
            "batchnorm_images": self.global_batch_size if whole else mine,
        }


def check_batch(option: str, global_batch_size: int, num_workers: int) -> None:
    """Refuse a batch that does not split over the workers, which are not elastic here.

    Raises:
        ConfigError: it does not; the values next to it do.
    """
    rest = global_batch_size % num_workers
    if rest:
        below, above = global_batch_size - rest, global_batch_size - rest + num_workers
        fitting = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{option}={global_batch_size} does not split over train.num_workers={num_workers}; "
            f"use {fitting}"
        )
