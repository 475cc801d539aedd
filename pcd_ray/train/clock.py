"""Where the time of training goes, and the numbers of a logging step."""

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from pcd_ray import metric_names as names
from pcd_ray.train.metrics import mean_over_ranks

_Batch = TypeVar("_Batch")


def logged_metrics(
    watched: Mapping[str, Tensor], clock: "Clock", *, weight: float = 1.0
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


class Clock:
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

    def waited(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
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
