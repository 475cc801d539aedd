"""The training loop, pure torch: an iterable of views in, finished steps out.

It knows neither Ray nor storage: who drives it logs, checkpoints and evaluates between steps.

Shapes: B images per worker and step, D embedding channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray import metric_names as names
from pcd_ray.data.plan import rank_sizes
from pcd_ray.distill.diagnostics import diagnose_branches
from pcd_ray.distill.feature_queue import gather_rows
from pcd_ray.distill.step import (
    Branch,
    StepResult,
    ViewBatch,
    distill_step,
    total_pairs,
    weighted_sum,
)
from pcd_ray.errors import TrainingError
from pcd_ray.seeds import derive_seed
from pcd_ray.train.clock import Clock, logged_metrics, peak_gib
from pcd_ray.train.optim import Schedule, set_learning_rate
from pcd_ray.train.ranks import num_ranks, this_rank
from pcd_ray.train.state import CALM_ADVICE, TrainState, unwrapped

HostBatch = Mapping[str, np.ndarray[Any, Any]]
"""Views on the host: ``student_view`` (B, S, S, 3) uint8 and so on, as the data path ships them."""


_STORED_MAPS = ("teacher_map", "teacher_2_map")  # in the order of the branches


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the loop needs to know besides the branches' own settings."""

    schedule: Schedule
    images_per_epoch: int
    global_batch_size: int
    accumulation_steps: int
    """Forward and backward passes per optimiser step, as many on every rank."""
    clip_grad_norm: float
    log_every_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A finished optimiser step."""

    step: int
    """Optimiser steps done, this one included."""
    epochs_ended: range
    """Numbers of the epochs whose last image this step has read, from 0; mostly none or one."""
    metrics: dict[str, float] | None
    """Means over ranks, at logging steps and at the last one."""


def train_steps(
    state: TrainState, batches: Iterable[HostBatch], settings: LoopSettings
) -> Iterator[StepDone]:
    """Train on one batch after another; yield after each optimiser step.

    Raises:
        TrainingError: the loss is not finite on some rank; the step was not taken.
    """
    device = next(state.student.parameters()).device
    clock = Clock(settings.global_batch_size)
    for host in clock.waited(batches):
        # a seed for each step, so that nothing random depends on where a run was interrupted
        torch.manual_seed(derive_seed(settings.seed, "step", state.step, this_rank()))
        learning_rate = settings.schedule.learning_rate(state.step)
        set_learning_rate(state.optimizer, learning_rate)
        number = state.step + 1
        logs = number % settings.log_every_steps == 0 or number == settings.schedule.total_steps
        watched = train_step(state, views_of(host, device), settings, watch=logs)
        state.audit.add(host["epoch"], host["row"])
        clock.add({name: watched.pop(name) for name in _loss_names(state.branches)})
        metrics = None
        if logs:
            weight = len(host["row"]) * num_ranks() / settings.global_batch_size
            metrics = logged_metrics(watched, clock, weight=weight) | {
                names.LEARNING_RATE: learning_rate,
                names.PEAK_GIB: peak_gib(device),
            }
            if (queue := state.branches[0].queue) is not None:  # as full as all
                metrics[names.QUEUE_FILL] = 100 * queue.fill
            clock.restart()
        yield StepDone(state.step, _epochs_ended(state.step, settings), metrics)
        clock.resume()


def train_step(
    state: TrainState, views: ViewBatch, settings: LoopSettings, *, watch: bool
) -> dict[str, Tensor]:
    """Update the student, then the queues.

    Returns:
        Means over this rank's images, detached and still on the device: the loss, and each branch's
        own where there are several; when ``watch`` also what `diagnose_branches` says.

    Raises:
        TrainingError: the loss is not finite on some rank; nothing was updated.
    """
    state.optimizer.zero_grad(set_to_none=True)
    branches = state.branches
    results = _passes(state, views, settings)
    own = [
        torch.stack([r.loss.detach() * (len(r.keys) / len(views.student)) for r in each]).sum()
        for each in zip(*results, strict=True)
    ]
    watched = dict(zip(_loss_names(branches), (weighted_sum(own, branches), *own), strict=False))
    if watch:
        watched |= diagnose_branches(results[-1], branches)
        watched[names.GRAD_NORM] = _gradient_norm(state.student)
    if settings.clip_grad_norm:
        nn.utils.clip_grad_norm_(state.student.parameters(), settings.clip_grad_norm)
    state.optimizer.step()
    sizes = rank_sizes(num_ranks(), settings.global_batch_size)
    for branch, each in zip(branches, zip(*results, strict=True), strict=True):
        if branch.queue is not None:
            branch.queue.push(gather_rows(torch.cat([result.keys for result in each]), sizes))
    state.step += 1
    if state.average is not None:
        state.average.update(unwrapped(state.student), step=state.step)
    return watched


def _passes(state: TrainState, views: ViewBatch, settings: LoopSettings) -> list[list[StepResult]]:
    """Run a rank's batch forward and backward in parts; return what each part, each branch gave.

    Gradients become those of the mean over all images of the global batch, however many a rank or
    a part has: a part of m of G images weighs m * R / G, and gradients are averaged over R ranks.

    Raises:
        TrainingError: the loss is not finite on some rank.
    """
    branches, batch_size = state.branches, settings.global_batch_size
    parts = views.split(settings.accumulation_steps)
    totals = [total_pairs(views, branch.settings) for branch in branches]
    results: list[list[StepResult]] = []
    losses: list[Tensor] = []
    for index, part in enumerate(parts):
        last, size = index == len(parts) - 1, len(part.student)
        num_pairs = [None if t is None else t * (size / batch_size) for t in totals]
        # gradients are averaged over ranks with the last part, as its forward pass announces
        with _no_sync(state.student, not last):
            results.append(distill_step(state.student, branches, part, num_pairs=num_pairs))
            loss = weighted_sum([result.loss for result in results[-1]], branches)
            losses.append(loss.detach())
            verdict = _FiniteVerdict(losses) if last else None  # travels meanwhile
            (loss * (size * num_ranks() / batch_size)).backward()
    assert verdict is not None
    verdict.check(state.step, state.optimizer.param_groups[0]["lr"])
    return results


def views_of(host: HostBatch, device: torch.device) -> ViewBatch:
    """Move a host batch to the training device, as uint8, and stored maps as float16."""

    def moved(name: str) -> Tensor:
        tensor = torch.from_numpy(host[name])
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    student = moved("student_view")
    teacher = moved("teacher_view") if "teacher_view" in host else student
    maps = tuple(moved(name) for name in _STORED_MAPS if name in host)
    return ViewBatch(student, teacher, moved("student_box"), moved("teacher_box"), maps)


class _FiniteVerdict:
    """Whether the loss is finite on all ranks, asked before the backward pass, read after it.

    The question travels while gradients are computed, and on a GPU the answer is waited for when
    the backward pass is already queued: the check costs no idle time.
    """

    def __init__(self, losses: list[Tensor]) -> None:
        self._finite = torch.isfinite(torch.stack(losses)).all().float()
        self._sent = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._sent = dist.all_reduce(self._finite, op=dist.ReduceOp.MIN, async_op=True)

    def check(self, step: int, learning_rate: float) -> None:
        if self._sent is not None:
            self._sent.wait()
        if not bool(self._finite):
            raise TrainingError(
                f"the loss is not finite at step {step} with learning rate {learning_rate:.4g}; "
                f"the step was not taken. {CALM_ADVICE}"
            )


def _loss_names(branches: Sequence[Branch]) -> list[str]:
    """Return the name of the loss, then those of the branches' own where there are several."""
    own = [names.of_branch(names.LOSS, number) for number in range(1, len(branches) + 1)]
    return [names.LOSS, *(own if len(own) > 1 else [])]


def _no_sync(student: nn.Module, active: bool) -> Any:
    if active and isinstance(student, DistributedDataParallel):
        return student.no_sync()
    return torch.enable_grad()


def _gradient_norm(student: nn.Module) -> Tensor:
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def _epochs_ended(step: int, settings: LoopSettings) -> range:
    size, batch = settings.images_per_epoch, settings.global_batch_size
    return range((step - 1) * batch // size, step * batch // size)
