"""Ray Data executions as we want them: in order, quiet, within limits, with readable errors."""

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pcd_ray.config import DataConfig
from pcd_ray.errors import PcdError, from_plain, to_plain
from pcd_ray.ray_cluster import PASSIVE_THREADS
from pcd_ray.ray_nodes import object_store_bytes
from pcd_ray.ray_shares import WorkerShare

Batch = dict[str, np.ndarray[Any, Any]]
Stage = Callable[[Batch], Batch]
"""Turns a block into another."""

SEGMENT_CHUNKS = 1024
"""Chunks of one execution: it costs 1 to 2 ms for each before its first block comes out."""
OVERLAP_CHUNKS = 256
"""Chunks before the end of an execution at which the next one starts."""
_ERROR = "error"
_STORE_SHARE = 0.4  # of the object stores of its nodes: what all streams together may fill
_STEP_S = 0.02  # least time from one step of Ray Data's scheduling to the next


def stream_chunks(
    make: Stage,
    chunks: int,
    *,
    data: DataConfig,
    chunks_ahead: int,
    num_streams: int,
) -> Iterator[Batch]:
    """Call ``make({"id": [number]})`` for chunk numbers 0, 1, ... in a task each; yield in order.

    A long run is cut into executions of `SEGMENT_CHUNKS`; each starts while the one before it makes
    its last chunks. Closing the generator ends all tasks.

    Args:
        make: turns a chunk number into a batch of any length.
        chunks: how many chunks there are.
        data: CPUs per task.
        chunks_ahead: chunks kept ready here beyond the one that is yielded.
        num_streams: executions that share the object store, e.g. one per rank.

    Raises:
        PcdError: ``make`` raised it.
    """
    context = _quiet_context(num_streams, data)
    # what Ray Data asks of the autoscaler when its nodes are busy is then of these nodes, not one
    # more of each kind that is there, GPU nodes among them
    context.execution_options.label_selector = dict(data.node_labels) or None

    def segment(first: int) -> _Segment:
        stop = min(first + SEGMENT_CHUNKS, chunks)
        return _Segment(
            _execution(
                make, range(first, stop), data=data, chunks_ahead=chunks_ahead, context=context
            )
        )

    alive = [segment(0)]
    with ThreadPoolExecutor(1) as starter:
        try:
            for first in range(0, chunks, SEGMENT_CHUNKS):
                following = first + SEGMENT_CHUNKS
                for number, block in enumerate(alive[0]):
                    if number == SEGMENT_CHUNKS - OVERLAP_CHUNKS and following < chunks:
                        alive.append(segment(following))
                        alive[1].begin(starter)
                    yield _checked(block)
                alive.pop(0)
        finally:
            for execution in alive:
                execution.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPool:
    """Processes that hold something costly to make, such as a network, and work on blocks."""

    build: Callable[[], Stage]
    """Called once in each actor; what it returns is called on each block."""
    size: int
    """Actors."""
    share: WorkerShare
    """What one reserves, and where."""


def stream_through_pool(
    make: Stage, pool: ActorPool, chunks: int, *, data: DataConfig, chunks_ahead: int
) -> Generator[Batch]:
    """Make blocks as `stream_chunks` does, hand each to an actor of a pool, yield in order.

    It is one execution, since the pool lives as long as that. Closing the generator ends all.

    Args:
        make: turns a chunk number into a block, in a task.
        pool: turns that block into the one that is yielded; must leave CPUs to the tasks.
        chunks: how many chunks there are.
        data: CPUs per task.
        chunks_ahead: blocks kept ready here beyond the one that is yielded.

    Raises:
        PcdError: ``make`` or the pool raised it.
    """
    blocks = _execution(
        make,
        range(chunks),
        data=data,
        chunks_ahead=chunks_ahead,
        context=_quiet_context(1, data),
        pool=pool,
    )
    try:
        for block in blocks:
            yield _checked(block)
    finally:
        blocks.close()


class _Actor:
    """One actor of a pool."""

    def __init__(self, build: Callable[[], Stage]) -> None:
        self._build = build
        self._work: Stage | None = None

    def __call__(self, block: Batch) -> Batch:
        if _ERROR in block:
            return block
        return _guarded(self._worked, block)

    def _worked(self, block: Batch) -> Batch:
        if self._work is None:  # here, where its error can travel as data
            self._work = self._build()
        return self._work(block)


def _guarded(work: Stage, block: Batch) -> Batch:
    try:
        return work(block)
    except PcdError as error:  # travels as data: Ray would bury its text in stack traces
        return {_ERROR: np.array([json.dumps(to_plain(error))])}


def _checked(block: Batch) -> Batch:
    """Raise the error that a block is, if it is one."""
    if _ERROR in block:
        raise from_plain(json.loads(str(block[_ERROR][0])))
    return block


class _Numbers(Datasource):
    """The numbers 0, 1, ... in a block each, as ``ray.data.range`` has them.

    That one's tasks reserve a whole CPU, and what is fused with them does, whatever it asks for: a
    machine whose workers leave less than one would wait for ever.
    """

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    def estimate_inmemory_data_size(self) -> int | None:
        return 8 * self._count

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        del parallelism, args, kwargs  # one task per number, always
        about = BlockMetadata(num_rows=1, size_bytes=8, exec_stats=None, input_files=None)
        return [ReadTask(partial(_one_number, n), about) for n in range(self._count)]


def _one_number(number: int) -> list[pa.Table]:
    return [pa.table({"id": [number]})]


class _Unhurried:
    """Ray Data's scheduling loop, held to `_STEP_S` per step.

    While finished blocks are held back because nobody takes them yet, its wait for tasks returns at
    once, and it asks again thousands of times a second. It is a thread of the process that trains:
    it took half a core and, with the interpreter's lock, more than half of the training's speed.
    """

    def __init__(self) -> None:
        self._last_s = 0.0

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        del executor
        time.sleep(max(0.0, self._last_s + _STEP_S - time.monotonic()))
        self._last_s = time.monotonic()

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


class _Segment:
    """One execution, which may begin before its first block is asked for."""

    def __init__(self, blocks: Generator[Batch]) -> None:
        self._blocks = blocks
        self._first: Future[Batch] | None = None

    def begin(self, starter: ThreadPoolExecutor) -> None:
        self._first = starter.submit(next, self._blocks)

    def __iter__(self) -> Iterator[Batch]:
        if self._first is not None:
            yield self._first.result()
        yield from self._blocks

    def close(self) -> None:
        """End the execution and its tasks now, not when the garbage collector comes by."""
        if self._first is not None:
            wait([self._first])
        self._blocks.close()


def _execution(
    make: Stage,
    numbers: range,
    *,
    data: DataConfig,
    chunks_ahead: int,
    context: ray.data.DataContext,
    pool: ActorPool | None = None,
) -> Generator[Batch]:
    """Yield what ``make``, and then the pool, return for these chunks, in order."""

    def made(places: Batch) -> Batch:
        return _guarded(make, {"id": places["id"] + numbers.start})

    with ray.data.DataContext.current(context):
        count = len(numbers)
        dataset = ray.data.read_datasource(
            _Numbers(count),
            override_num_blocks=count,
            num_cpus=data.cpus_per_task,
            label_selector=dict(data.node_labels),
        ).map_batches(
            made,
            batch_size=None,  # a whole block of one number; any size given would forbid fusion
            num_cpus=data.cpus_per_task,
            label_selector=dict(data.node_labels),
        )
        if pool is not None:
            dataset = dataset.map_batches(
                _Actor,
                fn_constructor_args=(pool.build,),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=pool.size),
                num_cpus=pool.share.cpus,
                num_gpus=pool.share.gpus,
                label_selector=dict(pool.share.labels),
                runtime_env={"env_vars": PASSIVE_THREADS},
            )
    yield from dataset.iter_batches(batch_size=None, prefetch_batches=chunks_ahead)


def _quiet_context(num_streams: int, data: DataConfig) -> ray.data.DataContext:
    """Return the settings of an execution: ordered, without console output, within limits."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # "execution finished in ..."
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [_Unhurried]  # type: ignore[list-item]
    options = context.execution_options
    options.preserve_order = True
    store = object_store_bytes(data.node_labels) * _STORE_SHARE / num_streams
    options.resource_limits = options.resource_limits.copy(object_store_memory=store or None)
    return context
