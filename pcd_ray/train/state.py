"""What changes while training, and so what a checkpoint holds: student, average, queues, audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray.data.plan import SeenAudit
from pcd_ray.distill.step import Branch
from pcd_ray.distill.student import Student
from pcd_ray.errors import TrainingError
from pcd_ray.train.ranks import gathered, num_ranks, this_rank

CALM_ADVICE = "Lower optim.base_lr, lengthen optim.warmup_epochs, or set optim.clip_grad_norm"
"""What helps against losses and weights that are not finite."""


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
        them now or later gives the same but for rounding. Of runs whose checkpoints fall at other
        steps, weights and queues end equal to the bit, statistics over several ranks but for their
        last bits.

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
            "audit": self.audit.state() if this_rank() == 0 else [],
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
        self.audit = SeenAudit(state["audit"] if this_rank() == 0 else [])


def wrap_student(student: Student, *, device: torch.device, compiled: bool) -> nn.Module:
    """Wrap the student, and nothing else, for several ranks."""
    module: nn.Module = torch.compile(student) if compiled else student  # type: ignore[assignment]
    if num_ranks() == 1:
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
    if num_ranks() == 1:
        return
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # of the norms alone: a mean over three ranks moves constants in their last bit
    buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def _queue_state(branch: Branch) -> dict[str, Any] | None:
    return None if branch.queue is None else branch.queue.state_dict()


def _check_finite(values: Mapping[str, Tensor], step: int) -> None:
    finite = torch.stack([torch.isfinite(value).all() for value in values.values()])
    if not bool(finite.all()):
        first = next(name for name, ok in zip(values, finite.tolist(), strict=True) if not ok)
        raise TrainingError(
            f"the student's {first} is not finite after step {step}; it was not stored. "
            + CALM_ADVICE
        )


def _merged_audit(audit: SeenAudit) -> SeenAudit:
    """Sum all ranks' audits on rank 0; the others start anew, so that nothing counts twice."""
    states = gathered(audit.state())
    if len(states) == 1:
        return audit
    return SeenAudit().merge(map(SeenAudit, states)) if this_rank() == 0 else SeenAudit()


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
