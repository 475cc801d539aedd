"""Fine-tune a network on labelled images: the loop, pure torch.

It knows neither Ray nor storage: who drives it logs and checkpoints between steps. SGD, a schedule
per step, batches that hold each image once per epoch whatever the number of ranks.

Shapes: N training images, B images per step over all ranks.
"""

import dataclasses
import functools
import hashlib
import json
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray.data.plan import EpochPlan, rank_span
from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings
from pcd_ray.seeds import derive_seed

_BATCHES_AHEAD = 2  # that are decoded while the network computes


class FinetuneTask(Protocol):
    """What is learned, on which images: a dataclass of plain data, pickled to the workers.

    Its fields identify it (see `fingerprint`); fields declared ``compare=False`` do not.
    """

    @property
    def num_images(self) -> int:
        """N."""

    def build(self) -> nn.Module:
        """Return the network with its first weights, on the CPU, equal whenever it is called.

        In train mode it maps a batch to losses by name, mean over the images of the batch; their
        sum is minimised. Every parameter that wants a gradient gets one in every step.
        """

    def example(self, index: int, seed: int) -> Any:
        """Return an image in [0, N), decoded and augmented; a function of ``(index, seed)`` alone.

        It is called from several threads.
        """

    def collate(self, examples: list[Any], device: torch.device) -> Any:
        """Return a batch for the network, on its device."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return groups for SGD; ``lr_scale`` multiplies the rate, ``weight_decay`` replaces it."""


@dataclass(slots=True)
class FinetuneState:
    """All that changes while fine-tuning, and so all that a checkpoint holds."""

    model: nn.Module
    """The network in train mode, wrapped for several ranks or not."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimiser steps done."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a checkpoint.

        Raises:
            EvaluationError: the network holds a number that is not finite.
        """
        weights = unwrapped(self.model).state_dict()
        bad = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise EvaluationError(
                f"fine-tuning: {bad[0]} is not finite after step {self.step}; it was not stored. "
                "Lower the learning rate, lengthen its warm-up, or clip gradients"
            )
        return {"model": weights, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        unwrapped(self.model).load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


@dataclass(frozen=True, slots=True)
class FinetuneStep:
    """A finished optimiser step."""

    step: int
    """Optimiser steps done, this one included."""
    learning_rate: float
    losses: dict[str, float] | None
    """Each loss of this step, mean over ranks, at logging steps and at the last one."""


def new_state(
    task: FinetuneTask, settings: FinetuneSettings, *, device: torch.device
) -> FinetuneState:
    """Return the task's network on a device, wrapped where there are several ranks, and SGD."""
    model = task.build()
    ranks = _ranks()
    if settings.sync_batchnorm and ranks > 1 and device.type == "cuda":
        model = synchronised(model)
    model = model.to(device).train()
    groups = [{"lr_scale": 1.0, **group} for group in task.parameter_groups(model)]
    optimizer = torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    if ranks > 1:  # statistics of BatchNorm are rank 0's at the start of every step
        device_ids = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    return FinetuneState(model, optimizer)


def synchronised(model: nn.Module) -> nn.Module:
    """Return the network with BatchNorm whose statistics are over all ranks; timm's kinds, too."""
    converted = convert_sync_batchnorm(model)
    assert isinstance(converted, nn.Module)
    return converted


def finetune_steps(
    task: FinetuneTask,
    settings: FinetuneSettings,
    state: FinetuneState,
    *,
    device: torch.device,
    threads: int = 2,
) -> Generator[FinetuneStep]:
    """Train from the state's step to the last one; yield after each optimiser step.

    Args:
        task: what is learned.
        settings: how.
        state: from `new_state`, perhaps loaded; it moves on.
        device: of the network.
        threads: that decode images of the next batches meanwhile.

    Raises:
        EvaluationError: a loss is not finite on some rank; the step was not taken.
        ConfigError: the batch does not split over the ranks.
    """
    examples = example_batches(task, settings, start_step=state.step, threads=threads)
    with closing(examples):
        for batch in examples:
            # a seed for each step, so that dropout does not depend on where a run was interrupted
            torch.manual_seed(derive_seed(settings.seed, "finetune_step", state.step, _rank()))
            learning_rate = settings.learning_rate(state.step)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            losses = _take_step(state, task.collate(batch, device), settings, device)
            last = state.step == settings.steps
            logs = last or state.step % settings.log_every_steps == 0
            yield FinetuneStep(state.step, learning_rate, _over_ranks(losses) if logs else None)


def example_batches(
    task: FinetuneTask, settings: FinetuneSettings, *, start_step: int, threads: int
) -> Generator[list[Any]]:
    """Yield this rank's examples of each step to the last one, decoded ahead by threads."""
    plan = EpochPlan(((task.num_images, 1.0),), derive_seed(settings.seed, "finetune_order"))
    pool = ThreadPoolExecutor(threads)

    def begun(step: int) -> list[Future[Any]]:
        span = rank_span(step, _rank(), _ranks(), settings.global_batch_size)
        drawn = zip(*(part.tolist() for part in plan.rows(*span)), strict=True)
        return [
            pool.submit(task.example, row, derive_seed(settings.seed, "finetune_image", epoch, row))
            for epoch, row in drawn
        ]

    ahead: deque[list[Future[Any]]] = deque()
    try:
        for step in range(start_step, settings.steps):
            while len(ahead) <= _BATCHES_AHEAD and step + len(ahead) < settings.steps:
                ahead.append(begun(step + len(ahead)))
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside its wrapper."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def fingerprint(*values: Any) -> str:
    """Return 16 hex digits that differ where plain data differs: what a stored run is known by.

    Takes dataclasses (fields declared ``compare=False`` left out), mappings, sequences, tensors,
    texts, numbers, booleans and None.

    Raises:
        TypeError: something else is among them, which might differ from process to process.
    """
    digest = hashlib.sha256(json.dumps(_plain(values)).encode())
    return digest.hexdigest()[:16]


def _take_step(
    state: FinetuneState, batch: Any, settings: FinetuneSettings, device: torch.device
) -> dict[str, Tensor]:
    """Update the network once; return its losses, detached and still on the device."""
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        losses: dict[str, Tensor] = state.model(batch)
    total = functools.reduce(torch.add, losses.values())
    total.backward()
    _check_finite(losses, state)
    if settings.clip_grad_norm:
        nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {name: loss.detach() for name, loss in losses.items()}


def _check_finite(losses: Mapping[str, Tensor], state: FinetuneState) -> None:
    """Refuse a step whose loss is not finite on some rank; a collective."""
    finite = torch.stack([torch.isfinite(loss.detach()) for loss in losses.values()]).float()
    if _ranks() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not bool(finite.all()):
        named = ", ".join(name for name, ok in zip(losses, finite.tolist(), strict=True) if not ok)
        rate = state.optimizer.param_groups[0]["lr"]
        raise EvaluationError(
            f"fine-tuning: the loss ({named}) is not finite at step {state.step} with learning "
            f"rate {rate:.4g}; the step was not taken. Lower the learning rate, lengthen its "
            "warm-up, or clip gradients"
        )


def _over_ranks(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Return losses averaged over ranks; a collective."""
    values = torch.stack([loss.float() for loss in losses.values()])
    if _ranks() > 1:
        dist.all_reduce(values)
        values /= _ranks()
    return dict(zip(losses, values.tolist(), strict=True))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        sha256 = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return [str(content.dtype), list(content.shape), sha256]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [field.name for field in dataclasses.fields(value) if field.compare]
        return [type(value).__name__, {name: _plain(getattr(value, name)) for name in kept}]
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is no plain data; declare its field compare=False")


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
