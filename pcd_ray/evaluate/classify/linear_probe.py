"""Linear classifiers on frozen features, all learning rates of a sweep trained side by side.

One pass over the images trains two classifiers for each rate: one that takes no step on the
held-out share of the training images, by which the rate is chosen, and one that is trained on all
of them, which is reported. Both standardise features alike, by mean and variance over all training
images, held-out ones included: those know no label. No test image takes part. Cached and augmented
features go the same way.

Shapes: N training images, B images per step, C channels, L classes, R rates, S = 2R classifiers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.data.plan import EpochPlan
from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.features import check_finite
from pcd_ray.progress import counted
from pcd_ray.seeds import derive_seed

_MOMENTUM = 0.9
_IMAGES_PER_CHUNK = 4096  # whose logits are in memory at a time

Batch = tuple[Tensor, Tensor]
"""Features (B, C) and the rows (B,) of the training set that they belong to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSettings:
    """How a probe is trained, as plain values; their meaning is `LinearConfig`'s."""

    epochs: int
    global_batch_size: int
    base_lrs: tuple[float, ...]
    held_out_fraction: float
    standardise: bool
    seed: int
    """Root of the order of images and of which are held out."""


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """Logits of raw features: ``features @ weight + bias``."""

    weight: Tensor  # (C, L)
    bias: Tensor  # (L,)
    labels: Tensor  # (L,) int64, what each column stands for

    def hits(self, features: Tensor, labels: Tensor, *, top: int) -> Tensor:
        """Return whether an image's label is among its ``top`` likeliest ones, (n,) bool, CPU.

        Labels that the classifier does not know are never right.
        """
        check_finite(features)
        found = []
        for rows, truth in zip(
            features.split(_IMAGES_PER_CHUNK), labels.split(_IMAGES_PER_CHUNK), strict=True
        ):
            logits = rows.to(self.weight) @ self.weight + self.bias
            best = logits.topk(min(top, len(self.labels)), dim=1).indices  # (chunk, top)
            right = self.labels[best] == truth.to(best)[:, None]
            found.append(right.any(dim=1).cpu())
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A trained probe, and how its rate was chosen."""

    classifier: LinearClassifier
    """Trained on all training images at the rate chosen."""
    base_lr: float
    held_out_top1_pct: dict[float, float]
    """Rate -> top-1 of the classifiers that were not trained on the held-out images, on these;
    without those that diverged."""
    at_edge: bool
    """The rate is the smallest or largest of several: a better one may lie beyond."""
    diverged: tuple[float, ...]
    """Rates whose classifiers are infinite or NaN."""


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """What a probe learns, and in which order."""

    settings: LinearSettings
    labels: Tensor  # (L,) int64, sorted
    targets: Tensor  # (N,) int64 in [0, L)
    held_out: Tensor  # (N,) bool
    mean: Tensor  # (C,), over all training images
    std: Tensor  # (C,)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, settings: LinearSettings) -> Self:
        """Return the task of a training set: features (N, C) of centre crops, labels (N,).

        Raises:
            ShardError: fewer than two classes.
            EvaluationError: a feature is infinite or NaN.
        """
        check_finite(features)
        known, targets = labels.cpu().unique(return_inverse=True)
        if len(known) < 2:
            raise ShardError(
                f"linear probe: eval.knn_train has {len(known)} class; give images of two or more"
            )
        held_out = held_out_rows(
            targets, settings.held_out_fraction, seed=derive_seed(settings.seed, "held_out")
        )
        mean, std = _statistics(features, standardise=settings.standardise)
        return cls(settings, known, targets, held_out, mean.cpu(), std.cpu())

    @property
    def order(self) -> EpochPlan:
        """The order of images, over all epochs."""
        seed = derive_seed(self.settings.seed, "linear_probe")
        return EpochPlan(((len(self.targets), 1.0),), seed)

    @property
    def batch_size(self) -> int:
        """Images per step, B: no more than there are."""
        return min(self.settings.global_batch_size, len(self.targets))

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self.order.total_steps(self.settings.epochs, self.batch_size)

    def cached_batches(self, features: Tensor) -> Iterator[Batch]:
        """Yield the batches of all steps from features (N, C) that do not change."""
        for step in range(self.num_steps):
            start = step * self.batch_size
            rows = torch.from_numpy(self.order.rows(start, start + self.batch_size)[1])
            yield features[rows.to(features.device)], rows


@dataclass(slots=True)
class ProbeState:
    """S classifiers in training: first those of no held-out image, then those of all images."""

    weight: Tensor  # (C, S, L)
    bias: Tensor  # (S, L)
    weight_velocity: Tensor
    bias_velocity: Tensor
    step: int = 0
    """Steps taken."""

    @classmethod
    def new(cls, task: ProbeTask, device: torch.device) -> Self:
        """Return the state before the first step: all weights are 0, the problem is convex."""
        stack, classes = 2 * len(task.settings.base_lrs), len(task.labels)
        weight = torch.zeros(len(task.mean), stack, classes, device=device)
        bias = torch.zeros(stack, classes, device=device)
        return cls(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias))


def probe_steps(
    task: ProbeTask, state: ProbeState, batches: Iterable[Batch]
) -> Iterator[ProbeState]:
    """Take a step for each batch, in place, and yield the state after it."""
    device = state.weight.device
    mean, std = task.mean.to(device), task.std.to(device)
    rates = torch.tensor([*task.settings.base_lrs] * 2, device=device) * task.batch_size / 256
    for features, rows in batches:
        x = (features.to(device) - mean) / std
        share = _shares(task.held_out[rows], len(task.settings.base_lrs)).to(device)  # (B, S)
        lr = rates * 0.5 * (1 + math.cos(math.pi * state.step / task.num_steps))
        _sgd_step(state, x, task.targets[rows].to(device), share, lr)
        state.step += 1
        yield state


def fit_cached(
    features: Tensor, labels: Tensor, settings: LinearSettings, *, device: torch.device
) -> LinearProbe:
    """Train a probe on features that do not change.

    Args:
        features: (N, C), moved to the device as a whole.
        labels: (N,) integers.
        settings: how.
        device: where to compute.

    Raises:
        ShardError: fewer than two classes.
        EvaluationError: a feature is infinite or NaN, or training diverges at all rates.
    """
    task = ProbeTask.of(features, labels, settings)
    state = ProbeState.new(task, device)
    steps = probe_steps(task, state, task.cached_batches(features.to(device)))
    for _ in counted(steps, "training", "steps", task.num_steps):
        pass
    return chosen(task, state, features)


def chosen(task: ProbeTask, state: ProbeState, features: Tensor) -> LinearProbe:
    """Choose the rate by the held-out images; of rates that are equally right, the least loss.

    Args:
        task: what was learned.
        state: after the last step.
        features: (N, C) of the training images' centre crops.

    Raises:
        EvaluationError: training has diverged at all rates.
    """
    rates = task.settings.base_lrs
    held_out, targets = features[task.held_out], task.targets[task.held_out]
    judged: dict[float, tuple[float, float]] = {}
    for place, rate in enumerate(rates):
        apart, whole = (_classifier(task, state, at) for at in (place, len(rates) + place))
        losses = [_loss(each, held_out, targets) for each in (apart, whole)]
        if all(map(math.isfinite, losses)):
            top1 = 100 * float(apart.hits(held_out, task.labels[targets], top=1).double().mean())
            judged[rate] = top1, -losses[0]
    if not judged:
        raise EvaluationError(_diverged(task.settings))
    best = max(judged, key=lambda rate: judged[rate])
    return LinearProbe(
        _classifier(task, state, len(rates) + rates.index(best)),
        base_lr=best,
        held_out_top1_pct={rate: top1 for rate, (top1, _) in judged.items()},
        at_edge=len(rates) > 1 and best in (min(rates), max(rates)),
        diverged=tuple(rate for rate in rates if rate not in judged),
    )


def _diverged(settings: LinearSettings) -> str:
    fix = "" if settings.standardise else ", or set eval.linear.standardise=true"
    return (
        f"eval.linear.base_lrs={list(settings.base_lrs)}: the linear probe diverges at each of "
        f"these rates, its weights or losses are infinite or NaN; give smaller ones{fix}"
    )


def held_out_rows(targets: Tensor, fraction: float, *, seed: int) -> Tensor:
    """Return which images (N,) bool are held out: a share of each class, as even as it goes.

    At least one is, at most half of them.
    """
    count = len(targets)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = shuffled[targets[shuffled].argsort(stable=True)]  # by class, at random within
    wanted = min(max(1, round(count * fraction)), count // 2)
    ticks = (np.arange(count + 1) * wanted) // count
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[order] = torch.from_numpy(np.diff(ticks) > 0)
    return held_out


def _statistics(features: Tensor, *, standardise: bool) -> tuple[Tensor, Tensor]:
    """Return what features are shifted and divided by, (C,) each; constant channels by 1."""
    if not standardise:
        return torch.zeros(features.shape[1]), torch.ones(features.shape[1])
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    constant = std <= 1e-6 * mean.abs()  # what float32 leaves of a channel that never varies
    return mean.float(), torch.where(constant, torch.ones_like(std), std).float()


def _shares(held_out: Tensor, num_rates: int) -> Tensor:
    """Return each image's share of each classifier's mean loss, (B, S)."""
    seen = torch.ones(len(held_out), 2 * num_rates)
    seen[held_out, :num_rates] = 0
    return seen / seen.sum(dim=0).clamp(min=1)


def _sgd_step(state: ProbeState, x: Tensor, targets: Tensor, share: Tensor, lr: Tensor) -> None:
    """Update all classifiers with SGD and momentum; each has its own loss and rate (S,)."""
    channels, stack, classes = state.weight.shape
    logits = (x @ state.weight.view(channels, -1)).view(-1, stack, classes) + state.bias
    slope = logits.softmax(dim=2)  # (B, S, L): of the cross-entropy, once 1 is taken off the truth
    truth = targets.view(-1, 1, 1).expand(-1, stack, 1)
    slope.scatter_add_(2, truth, slope.new_full(truth.shape, -1.0))
    slope *= share[:, :, None]
    gradient = (x.T @ slope.view(-1, stack * classes)).view(channels, stack, classes)
    state.weight_velocity.mul_(_MOMENTUM).add_(gradient)
    state.bias_velocity.mul_(_MOMENTUM).add_(slope.sum(dim=0))
    state.weight.sub_(lr[:, None] * state.weight_velocity)
    state.bias.sub_(lr[:, None] * state.bias_velocity)


def _classifier(task: ProbeTask, state: ProbeState, place: int) -> LinearClassifier:
    """Return one classifier, for raw features."""
    device = state.weight.device
    weight = state.weight[:, place] / task.std.to(device)[:, None]
    bias = state.bias[place] - task.mean.to(device) @ weight
    return LinearClassifier(weight, bias, task.labels.to(device))


def _loss(classifier: LinearClassifier, features: Tensor, targets: Tensor) -> float:
    """Return the mean cross-entropy in nats; NaN where the classifier itself is not finite."""
    if not (classifier.weight.isfinite().all() and classifier.bias.isfinite().all()):
        return math.nan  # a class of -inf alone would cost nothing
    total = 0.0
    for rows, truth in zip(
        features.split(_IMAGES_PER_CHUNK), targets.split(_IMAGES_PER_CHUNK), strict=True
    ):
        logits = rows.to(classifier.weight) @ classifier.weight + classifier.bias
        total += float(F.cross_entropy(logits, truth.to(logits.device), reduction="sum"))
    return total / len(features)
