"""The training loop, pure torch: an iterable of views in, finished steps out.

It knows neither Ray nor storage: who drives it logs, checkpoints and evaluates between steps.

Shapes: B images per worker and step, D embedding channels.
"""

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray.data.plan import SeenAudit
from pcd_ray.distill.diagnostics import diagnose
from pcd_ray.distill.feature_queue import FeatureQueue, gather_rows
from pcd_ray.distill.step import DistillSettings, StepResult, ViewBatch, distill_step
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.errors import TrainingError
from pcd_ray.seeds import derive_seed
from pcd_ray.train import metrics as names
from pcd_ray.train.optim import Schedule, set_learning_rate

HostBatch = Mapping[str, np.ndarray[Any, Any]]
"""Views on the host: ``student_view`` (B, S, S, 3) uint8 and so on, as the data path ships them."""


_CALMER = "Lower optim.base_lr, lengthen optim.warmup_epochs, or set optim.clip_grad_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the loop needs to know besides the method's own settings."""

    schedule: Schedule
    images_per_epoch: int
    global_batch_size: int
    accumulation_steps: int
    clip_grad_norm: float
    log_every_steps: int
    seed: int


@dataclass(slots=True)
class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    student: nn.Module
    """The student, wrapped for several ranks or not."""
    optimizer: torch.optim.Optimizer
    queue: FeatureQueue
    step: int = 0
    """Optimiser steps done."""
    audit: SeenAudit = field(default_factory=SeenAudit)
    """What this rank has read."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a checkpoint; a collective: every rank calls it.

        BatchNorm statistics are averaged over ranks first. They are running means, so averaging
        them now or later gives the same: checkpoints do not change a run.

        Raises:
            TrainingError: the student holds a number that is not finite; nobody could go on from
                such a checkpoint.
        """
        student = unwrapped(self.student)
        average_batchnorm(student)
        values = student.state_dict()
        _check_finite(values, self.step)
        self.audit = _merged_audit(self.audit)
        return {
            "student": values,
            "optimizer": self.optimizer.state_dict(),
            "queue": self.queue.state_dict(),
            "step": self.step,
            "audit": self.audit.state() if _rank() == 0 else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        unwrapped(self.student).load_state_dict(state["student"], strict=True)
        settings = [_without_params(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # the run's options hold, not those of the stored groups
        self.queue.load_state_dict(state["queue"])
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
    state: TrainState,
    teacher: FrozenTeacher,
    batches: Iterable[HostBatch],
    distill: DistillSettings,
    settings: LoopSettings,
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
        watched = train_step(state, teacher, views_of(host, device), distill, settings, watch=logs)
        state.audit.add(host["epoch"], host["row"])
        clock.add(watched.pop("loss"))
        metrics = None
        if logs:
            metrics = logged_metrics(watched, clock) | {
                names.LEARNING_RATE: learning_rate,
                names.QUEUE_FILL: 100 * state.queue.fill,
                names.PEAK_GIB: peak_gib(device),
            }
            clock.restart()
        yield StepDone(state.step, _epoch_ended(state.step, settings), metrics)
        clock.resume()


def train_step(
    state: TrainState,
    teacher: FrozenTeacher,
    views: ViewBatch,
    distill: DistillSettings,
    settings: LoopSettings,
    *,
    watch: bool,
) -> dict[str, Tensor]:
    """Update the student, then the queue.

    Returns:
        ``loss``, detached and still on the device, and what `diagnose` says when ``watch``.

    Raises:
        TrainingError: the loss is not finite on some rank; nothing was updated.
    """
    state.optimizer.zero_grad(set_to_none=True)
    parts = views.split(settings.accumulation_steps)
    results: list[StepResult] = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        # gradients are averaged over ranks with the last part, as its forward pass announces
        with _no_sync(state.student, not last):
            result = distill_step(state.student, teacher, state.queue.negatives, part, distill)
            results.append(result)
            verdict = _FiniteVerdict(results) if last else None  # travels meanwhile
            (result.loss / len(parts)).backward()
    assert verdict is not None
    verdict.check(state.step, state.optimizer.param_groups[0]["lr"])
    watched = {"loss": torch.stack([result.loss.detach() for result in results]).mean()}
    if watch:
        watched |= diagnose(results[-1], state.queue.negatives, distill)
        watched["grad_norm"] = _gradient_norm(state.student)
    if settings.clip_grad_norm:
        nn.utils.clip_grad_norm_(state.student.parameters(), settings.clip_grad_norm)
    state.optimizer.step()
    state.queue.push(gather_rows(torch.cat([result.keys for result in results])))
    state.step += 1
    return watched


def views_of(host: HostBatch, device: torch.device) -> ViewBatch:
    """Move a host batch to the training device, as uint8."""

    def moved(name: str) -> Tensor:
        tensor = torch.from_numpy(host[name])
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    student = moved("student_view")
    teacher = moved("teacher_view") if "teacher_view" in host else student
    return ViewBatch(student, teacher, moved("student_box"), moved("teacher_box"))


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


def logged_metrics(watched: Mapping[str, Tensor], clock: "_Clock") -> dict[str, float]:
    """Return what a logging step shows under public names, averaged over ranks; a collective."""
    scalars = {
        names.GRAD_NORM if name == "grad_norm" else f"train/{name}": value
        for name, value in watched.items()
    }
    means = names.mean_over_ranks(scalars | clock.means())
    means[names.DATA_WAIT] = 100 * means[names.DATA_WAIT_S] / means[names.STEP_S]
    means[names.IMAGES_PER_S] = clock.global_batch_size / means[names.STEP_S]
    return means


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process, in GiB: the device's, or on CPU the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Clock:
    """Where the time between two logging steps went, and the mean loss."""

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.restart()

    def restart(self) -> None:
        self._losses: list[Tensor] = []
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

    def add(self, loss: Tensor) -> None:
        """Count a finished step."""
        self._losses.append(loss)
        now = time.perf_counter()
        self._elapsed_s += now - self._since
        self._since = now

    def means(self) -> dict[str, Tensor]:
        """Return means per step since the last restart."""
        loss = torch.stack(self._losses).mean()
        steps = len(self._losses)
        return {
            names.LOSS: loss,
            names.STEP_S: loss.new_tensor(self._elapsed_s / steps),
            names.DATA_WAIT_S: loss.new_tensor(self._waited_s / steps),
        }


class _FiniteVerdict:
    """Whether the loss is finite on all ranks, asked before the backward pass, read after it.

    The question travels while gradients are computed, and on a GPU the answer is waited for when
    the backward pass is already queued: the check costs no idle time.
    """

    def __init__(self, results: list[StepResult]) -> None:
        losses = torch.stack([result.loss.detach() for result in results])
        self._finite = torch.isfinite(losses).all().float()
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
