"""run_on_ranks: a function on several gloo processes, without GPU and without Ray."""

import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_IMPORTED_ONCE = ["torch.distributed", "timm", "pcd_ray.train.loop"]  # seconds for every process


def run_on_ranks(
    count: int, body: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``body(*args)`` on ``count`` new processes that form one gloo group.

    Args:
        count: number of processes.
        body: a function of a module (it is found by its name); ``torch.distributed`` is ready.
        args: what every rank is given.
        timeout_s: seconds for all of it; then the ranks are ended.

    Returns:
        What each rank returned, in rank order; tensors on the CPU.

    Raises:
        RuntimeError: a rank failed; carries its traceback.
        TimeoutError: the ranks did not finish.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            group = (f"file://{folder}/rendezvous", rank, count, timeout_s)
            process = context.Process(target=_rank_main, args=(theirs, group, body, args))
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            ends.append(ours)
        try:
            results = _collect(ends, timeout_s)
            for process in processes:
                process.join(timeout=timeout_s)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(ends):
        open_ends = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(open_ends, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(ends))) - set(results))} hang")
        for end in ready:
            rank = ends.index(end)
            results[rank] = _received(end, rank)
    return [results[rank] for rank in range(len(ends))]


def _received(end: Connection, rank: int) -> Any:
    try:
        ok, data = end.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if not ok:
        raise RuntimeError(f"rank {rank} failed:\n{data}")
    return torch.load(io.BytesIO(data), weights_only=False)


def _rank_main(
    end: Connection,
    group: tuple[str, int, int, float],
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    init_method, rank, count, timeout_s = group
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=init_method,
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout_s),
        )
        buffer = io.BytesIO()
        torch.save(body(*args), buffer)
        end.send((True, buffer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        end.send((False, traceback.format_exc()))
        raise
