"""Ray Data executions as we want them: in order, quiet, within limits, with readable errors."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import ray.data

from pcd_ray.config import DataConfig
from pcd_ray.errors import PcdError, ShardError

Batch = dict[str, np.ndarray[Any, Any]]

_CHUNKS_PER_BLOCK = 4096  # chunk numbers that travel together until they are dealt to tasks
_ERROR = "error"
_STORE_SHARE = 0.5  # of the object store: what all streams together may fill


def stream_chunks(
    make: Callable[[Batch], Batch],
    chunks: int,
    *,
    data: DataConfig,
    cpu_limit: float | None,
    num_streams: int,
) -> Iterator[Batch]:
    """Call ``make({"id": [number]})`` for chunk numbers 0, 1, ... in a task each; yield in order.

    Numbers start in blocks of many and are dealt out on the way: a block each from the start
    would cost milliseconds per chunk of the whole run before its first batch.

    Args:
        make: turns a chunk number into a batch of any length.
        chunks: how many chunks there are.
        data: CPUs per task and how far to prefetch.
        cpu_limit: CPUs that the tasks may use at a time; None: all that are free.
        num_streams: executions that share the object store, e.g. one per rank.

    Raises:
        ShardError: ``make`` raised it, or another error of ours.
    """
    if chunks == 0:
        return
    with ray.data.DataContext.current(_quiet_context(cpu_limit, num_streams)):
        dataset = (
            ray.data.range(chunks, override_num_blocks=-(-chunks // _CHUNKS_PER_BLOCK))
            .repartition(target_num_rows_per_block=1)
            .map_batches(_guarded(make), batch_size=1, num_cpus=data.cpus_per_task)
        )
    for block in dataset.iter_batches(
        batch_size=None, prefetch_batches=max(1, data.prefetch_batches)
    ):
        if _ERROR in block:
            raise ShardError(str(block[_ERROR][0]))
        yield block


def _quiet_context(cpu_limit: float | None, num_streams: int) -> ray.data.DataContext:
    """Return the settings of an execution: ordered, without console output, within limits."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # "execution finished in ..."
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    options = context.execution_options
    options.preserve_order = True
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    store = resources.get("object_store_memory", 0.0) * _STORE_SHARE / num_streams
    options.resource_limits = options.resource_limits.copy(
        cpu=cpu_limit, object_store_memory=store or None
    )
    return context


def _guarded(make: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
    """Let errors that we explain travel as data: Ray would bury their text in stack traces."""

    def guarded(chunk: Batch) -> Batch:
        try:
            return make(chunk)
        except PcdError as error:
            return {_ERROR: np.array([str(error)])}

    return guarded
