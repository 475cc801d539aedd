"""The training loop, pure torch: an iterable of views in, finished steps out.

It knows neither Ray nor storage: who drives it logs, checkpoints and evaluates between steps.

Shapes: B images per worker and step, D embedding channels.
"""

import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray import metric_names as names
from pcd_ray.data.plan import SeenAudit, rank_sizes
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
from pcd_ray.distill.student import Student
from pcd_ray.errors import TrainingError
from pcd_ray.seeds import derive_seed
from pcd_ray.train.metrics import mean_over_ranks
from pcd_ray.train.optim import Schedule, set_learning_rate

HostBatch = Mapping[str, np.ndarray[Any, Any]]
"""Views on the host: ``student_view`` (B, S, S, 3) uint8 and so on, as the data path ships them."""


_STORED_MAPS = ("teacher_map", "teacher_2_map")  # in the order of the branches
_CALMER = "Lower optim.base_lr, lengthen optim.warmup_epochs, or set optim.clip_grad_norm"


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


@dataclass(slots=True)
class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    student: nn.Module
    """The student, wrapped for several ranks or not."""
    optimizer: torch.optim.Optimizer
    branches: Sequence[Branch]
    """Whom it learns from, in the order of its heads; their queues change."""
    step: int = 0
    """Optimiser steps done."""
    audit: SeenAudit = field(default_factory=SeenAudit)
    """What this rank has read."""
    average: ModelEmaV3 | None = None
    """Moving average of the student, from `moving_average`."""

    @property
    def judged(self) -> Student:
        """The student that is judged and exported: the moving average where one is kept."""
        if self.average is None:
            return unwrapped(self.student)
        module = self.average.module
        assert isinstance(module, Student)
        return module

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a checkpoint; a collective: every rank calls it.

        BatchNorm statistics are averaged over ranks first. They are running means, so averaging
        them now or later gives the same: checkpoints do not change a run.

        Raises:
            TrainingError: the student holds a number that is not finite; nobody could go on from
                such a checkpoint.
        """
        networks = {"student": unwrapped(self.student)}
        if self.average is not None:
            networks["average"] = self.judged
        for network in networks.values():
            average_batchnorm(network)
        values = {name: network.state_dict() for name, network in networks.items()}
        for weights in values.values():
            _check_finite(weights, self.step)
        self.audit = _merged_audit(self.audit)
        return values | {
            "optimizer": self.optimizer.state_dict(),
            "queues": [_queue_state(branch) for branch in self.branches],
            "step": self.step,
            "audit": self.audit.state() if _rank() == 0 else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state.

        A new moving average starts at its student, a queue that it does not hold as it is.
        """
        unwrapped(self.student).load_state_dict(state["student"], strict=True)
        if self.average is not None:
            weights = state.get("average", state["student"])
            self.average.module.load_state_dict(weights, strict=True)
        settings = [_without_params(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # the run's options hold, not those of the stored groups
        for branch, queue in zip(self.branches, state["queues"], strict=True):
            if branch.queue is not None and queue is not None:
                branch.queue.load_state_dict(queue)
        self.step = int(state["step"])
        self.audit = SeenAudit(state["audit"] if _rank() == 0 else [])


@dataclass(frozen=True, slots=True)
class StepDone:
    """A finished optimiser step."""

    step: int
    """Optimiser steps done, this one included."""
    epoch_ended: int | None
    """Number of the epoch whose last image this step has read, from 0; None: none ended."""
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
    clock = _Clock(settings.global_batch_size)
    for host in clock.waited(batches):
        # a seed for each step, so that nothing random depends on where a run was interrupted
        torch.manual_seed(derive_seed(settings.seed, "step", state.step, _rank()))
        learning_rate = settings.schedule.learning_rate(state.step)
        set_learning_rate(state.optimizer, learning_rate)
        number = state.step + 1
        logs = number % settings.log_every_steps == 0 or number == settings.schedule.total_steps
        watched = train_step(state, views_of(host, device), settings, watch=logs)
        state.audit.add(host["epoch"], host["row"])
        clock.add({name: watched.pop(name) for name in _loss_names(state.branches)})
        metrics = None
        if logs:
            weight = len(host["row"]) * _num_ranks() / settings.global_batch_size
            metrics = logged_metrics(watched, clock, weight=weight) | {
                names.LEARNING_RATE: learning_rate,
                names.PEAK_GIB: peak_gib(device),
            }
            if (queue := state.branches[0].queue) is not None:  # as full as all
                metrics[names.QUEUE_FILL] = 100 * queue.fill
            clock.restart()
        yield StepDone(state.step, _epoch_ended(state.step, settings), metrics)
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
    sizes = rank_sizes(_num_ranks(), settings.global_batch_size)
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
            (loss * (size * _num_ranks() / batch_size)).backward()
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


def wrap_student(student: Student, *, device: torch.device, compiled: bool) -> nn.Module:
    """Wrap the student, and nothing else, for several ranks."""
    module: nn.Module = torch.compile(student) if compiled else student  # type: ignore[assignment]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # statistics are averaged when they are needed, not every step
        gradient_as_bucket_view=True,
    )


def moving_average(student: Student, *, decay: float) -> ModelEmaV3 | None:
    """Return a copy of the student that follows it, a <- d a + (1 - d) s; None: ``decay`` is 0.

    After step t (from 1) d is the smaller of ``decay`` and 1 - t^(-2/3): timm's warm-up, so that
    short runs forget their first weights. BatchNorm statistics are averaged like weights, for these
    weights have had no batches of their own; counters are copied. Weights are equal on all ranks as
    the student's are, statistics once `average_batchnorm` has made them so: all of it is linear.
    """
    if not decay:
        return None
    average: ModelEmaV3 = ModelEmaV3(student, decay=decay, use_warmup=True).requires_grad_(False)
    return average


def unwrapped(module: nn.Module) -> Student:
    """Return the student inside its wrappers."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    inner = getattr(inner, "_orig_mod", inner)
    assert isinstance(inner, Student)
    return inner


@torch.no_grad()
def average_batchnorm(student: nn.Module) -> None:
    """Replace BatchNorm statistics by their mean over ranks; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # of the norms alone: a mean over three ranks moves constants in their last bit
    buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def logged_metrics(
    watched: Mapping[str, Tensor], clock: "_Clock", *, weight: float = 1.0
) -> dict[str, float]:
    """Return what a logging step shows under public names, averaged over ranks; a collective.

    Args:
        watched: what was seen of this rank's images.
        clock: where its time went.
        weight: this rank's images, as a share of the mean over ranks.
    """
    means = mean_over_ranks({**watched, **clock.means()}, weight=weight)
    means[names.DATA_WAIT] = 100 * means[names.DATA_WAIT_S] / means[names.STEP_S]
    means[names.IMAGES_PER_S] = clock.global_batch_size / means[names.STEP_S]
    return means


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process, in GiB: the device's, or on CPU the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Clock:
    """Where the time between two logging steps went, and the mean losses."""

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.restart()

    def restart(self) -> None:
        self._losses: list[Mapping[str, Tensor]] = []
        self._waited_s = 0.0
        self._elapsed_s = 0.0
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Leave out what happened since the step ended: logging, checkpoints, evaluation."""
        self._since = time.perf_counter()

    def waited(self, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
        """Yield batches and time the wait for each."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - start
            yield batch

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count a finished step."""
        self._losses.append(losses)
        now = time.perf_counter()
        self._elapsed_s += now - self._since
        self._since = now

    def means(self) -> dict[str, Tensor]:
        """Return means per step since the last restart."""
        steps = len(self._losses)
        means = {
            name: torch.stack([losses[name] for losses in self._losses]).mean()
            for name in self._losses[0]
        }
        loss = means[names.LOSS]
        return means | {
            names.STEP_S: loss.new_tensor(self._elapsed_s / steps),
            names.DATA_WAIT_S: loss.new_tensor(self._waited_s / steps),
        }


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
                f"the step was not taken. {_CALMER}"
            )


def _queue_state(branch: Branch) -> dict[str, Any] | None:
    return None if branch.queue is None else branch.queue.state_dict()


def _loss_names(branches: Sequence[Branch]) -> list[str]:
    """Return the name of the loss, then those of the branches' own where there are several."""
    own = [names.of_branch(names.LOSS, number) for number in range(1, len(branches) + 1)]
    return [names.LOSS, *(own if len(own) > 1 else [])]


def _check_finite(values: Mapping[str, Tensor], step: int) -> None:
    finite = torch.stack([torch.isfinite(value).all() for value in values.values()])
    if not bool(finite.all()):
        first = next(name for name, ok in zip(values, finite.tolist(), strict=True) if not ok)
        raise TrainingError(
            f"the student's {first} is not finite after step {step}; it was not stored. {_CALMER}"
        )


def _no_sync(student: nn.Module, active: bool) -> Any:
    if active and isinstance(student, DistributedDataParallel):
        return student.no_sync()
    return torch.enable_grad()


def _gradient_norm(student: nn.Module) -> Tensor:
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def _epoch_ended(step: int, settings: LoopSettings) -> int | None:
    size, batch = settings.images_per_epoch, settings.global_batch_size
    epoch = step * batch // size
    return epoch - 1 if epoch > (step - 1) * batch // size else None


def _merged_audit(audit: SeenAudit) -> SeenAudit:
    """Sum all ranks' audits on rank 0; the others start anew, so that nothing counts twice."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return audit
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, audit.state())
    return (
        SeenAudit().merge([SeenAudit(state) for state in states]) if _rank() == 0 else SeenAudit()
    )


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
