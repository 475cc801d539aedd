"""Sections ``optim`` and ``train``: optimiser and schedule, loop and workers."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict

from pcd_ray.config.checks import FORBID, require, require_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser and schedule; the defaults are [code]'s."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    name: Literal["lars", "adamw"] = "lars"
    """LARS (momentum 0.9, trust coefficient 1e-3) or AdamW."""
    base_lr: float = 1.0
    """Learning rate per 256 images of the global batch."""
    weight_decay: float = 1e-5
    """Decay of weights; none on biases and norms."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0, in epochs; fractions count."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end of the cosine, as a share of its peak."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 leaves it."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, "optim.base_lr", self.base_lr, "> 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, ">= 0")
        require(
            0 <= self.final_lr_fraction <= 1,
            "optim.final_lr_fraction",
            self.final_lr_fraction,
            "in [0, 1]",
        )
        require(self.clip_grad_norm >= 0, "optim.clip_grad_norm", self.clip_grad_norm, ">= 0")


def _number_or_pair(value: Any) -> Any:
    """Let a list of two through as a pair, and refuse in one message what is no whole number."""
    numbers = value if (pair := isinstance(value, list | tuple)) else [value]
    if not all(type(number) is int for number in numbers) or (pair and len(numbers) != 2):
        raise ValueError(
            f"train.num_workers={value!r}: give a whole number, or [least, most] of an elastic run"
        )
    return tuple(numbers) if pair else value


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop and its workers."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    epochs: int = 100
    """Passes over the packed images. [code]"""
    global_batch_size: int = 1024
    """Images per optimiser step, over all workers and accumulation steps. [code]"""
    accumulation_steps: int = 1
    """Forward and backward passes per optimiser step; more where fewer workers than the most of
    ``num_workers`` run, so that a pass holds no more images."""
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_number_or_pair)] = 1
    """Ray Train workers; one GPU each when ``device`` is cuda. ``[least, most]``: as many of these
    as the cluster holds, more or fewer as machines come and go; the global batch stays."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; ``auto`` takes cuda when the cluster has GPUs, or its autoscaler may
    bring some."""
    cpus_per_worker: float = 0.0
    """CPUs each worker reserves; 0 decides by the cluster, so that Ray Data always has room: none
    on a single machine of up to four, else an equal part of half of its node's, or of all where no
    data tasks run; at most one beside a GPU."""
    threads_per_worker: int = 0
    """Torch threads per worker; 0: the node's cores divided by its workers."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes where networks compute (training, judging, teachers' maps), e.g.
    ``{pool: train}``; empty: all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: autocast to bfloat16; gates, norms and the loss stay in float32. CPUs without
    AVX-512 compute it in software, several times slower than ``fp32``."""
    channels_last: bool = False
    """Store maps with channels innermost."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all workers (cuda only)."""
    compile: bool = False
    """Compile the student and the teacher with torch.compile."""
    log_every_steps: int = 10
    """Optimiser steps between two lines of metrics."""
    checkpoint_every_steps: int = 0
    """Optimiser steps between checkpoints, besides those at each epoch; 0: epochs and minutes."""
    checkpoint_every_minutes: float = 15.0
    """Minutes of training, at most, that a stopped or lost run does again; 0: epochs and steps
    alone. Looked at whenever metrics are logged."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 0
    """Checkpoints kept besides, those that scored best while training; 0: none. Taken are those of
    epochs after which the score was measured, by ``eval.every_epochs`` or
    ``eval.probe_every_epochs``. ``RUN/best`` names the first of them, e.g. for ``export``."""
    keep_best_by: Literal["knn_top1", "segmentation_miou"] = "knn_top1"
    """Score of ``keep_best``; never the loss, which says little of a student."""
    max_failures: int = 3
    """Times that a failed worker group is started again from the last checkpoint."""
    max_preemptions: int = -1
    """Times that it is started again because its machines were taken away (spot machines), which
    ``max_failures`` does not count; -1: any."""
    start_timeout_s: float = 30.0
    """Seconds that a group of workers waits for its machines. Then it is counted anew how many
    there are: what an elastic run waits after a loss before it goes on with fewer."""
    resize_check_s: float = 300.0
    """Seconds between two looks whether an elastic run could have more workers; growing repeats
    the steps since the last checkpoint."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "accumulation_steps"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in ("log_every_steps", "keep_last", "start_timeout_s", "resize_check_s"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in (
            "cpus_per_worker",
            "threads_per_worker",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "keep_best",
            "max_failures",
        ):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), ">= 0")
        require(self.max_preemptions >= -1, "train.max_preemptions", self.max_preemptions, ">= -1")
        require_labels(self.node_labels, "train.node_labels")
        self._check_workers()

    def _check_workers(self) -> None:
        least, most = self.min_workers, self.max_workers
        wanted = "> 0" if least == most else "[least, most] with 1 <= least <= most"
        require(1 <= least <= most, "train.num_workers", self.num_workers, wanted)
        batch, parts = self.global_batch_size, most * self.accumulation_steps
        if batch % parts:
            lower = batch - batch % parts
            fix = f"use {lower + parts}" if lower == 0 else f"use {lower} or {lower + parts}"
            raise ValueError(
                f"train.global_batch_size={batch} does not split over train.num_workers="
                f"{most} x train.accumulation_steps={self.accumulation_steps}; {fix}"
            )

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run goes with: what the cluster must hold to begin."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Most workers that the run takes."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def batch_size_per_worker(self) -> int:
        """Images that one worker takes per optimiser step; the most, with the fewest workers."""
        return -(-self.global_batch_size // self.min_workers)
