"""Run a function on Ray Train workers until it has finished: events, failures and Ctrl-C.

Whatever is trained, it is trained this way: checkpoints lie in ``FOLDER/checkpoints``, workers that
die are started again and go on from there, a user's error ends the run in its own words.
"""

import contextlib
import json
import re
import signal
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder, checkpoint_steps
from pcd_ray.config import TrainConfig
from pcd_ray.errors import PcdError, TrainingError, from_plain, to_plain
from pcd_ray.patient_files import patient_filesystem
from pcd_ray.ray_cluster import PASSIVE_THREADS
from pcd_ray.ray_connect import environment
from pcd_ray.ray_events import Event, EventReceiver, EventSender
from pcd_ray.ray_nodes import Need, Standstill
from pcd_ray.ray_shares import WorkerShare

FAILURE_FILE = "failure.json"
"""Why a run cannot go on, for the driver and for workers that Ray starts again."""
_POLL_S = 0.5
_LINE_CHARACTERS = 160  # of what a failure is told with
_RAY_LIST = "checkpoint_manager_snapshot.json"  # where Ray Train notes its checkpoints
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # of Ray Train; it has no argument for it


def fit(  # noqa: PLR0913 - what to run, and where
    worker: Callable[[dict[str, Any]], None],
    values: dict[str, Any],
    *,
    folder: RunFolder,
    share: WorkerShare,
    settings: TrainConfig,
    num_workers: int | tuple[int, int],
    on_event: Callable[[Event], None],
) -> None:
    """Run ``worker(values)`` on every worker and return when all have finished.

    Args:
        worker: a function of a module; `until_it_cannot` should be around what it does.
        values: what it is given; ``mailbox`` (a name for `EventSender`) and ``threads`` (of torch)
            are added.
        folder: where checkpoints and the story of a failure lie.
        share: what each worker gets.
        settings: section ``train``: how often to start again, how long to wait for machines.
        num_workers: how many there are; a pair, the least and the most, for an elastic group.
        on_event: is given what workers tell, on a thread of its own, until this returns.

    Raises:
        PcdError: a worker's own error, or a TrainingError after too many failures.
    """
    # checkpoints are found and kept by what lies in the folder: Ray's own list of them could name
    # one that is damaged or gone, and would then refuse to start
    storage.delete_file(storage.join(folder.checkpoints, _RAY_LIST))
    storage.delete_file(folder.file(FAILURE_FILE))
    mailbox = f"pcd_ray_{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        worker,
        train_loop_config={**values, "mailbox": mailbox, "threads": share.threads},
        scaling_config=_scaling(share, settings, num_workers),
        run_config=_run_config(folder, settings, mailbox),
    )
    cause: Exception | None = None
    waits = environment({_START_TIMEOUT: str(settings.start_timeout_s)})
    least = num_workers if isinstance(num_workers, int) else min(num_workers)
    standstill = Standstill(Need("workers", least, share.cpus, share.gpus, share.labels))
    standstill.begin()
    try:
        with _listening(mailbox, on_event, standstill), waits, stopped_in_order():
            trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        cause = error
    raise_failure(folder, settings, cause)


def _scaling(
    share: WorkerShare, settings: TrainConfig, num_workers: int | tuple[int, int]
) -> ray.train.ScalingConfig:
    return ray.train.ScalingConfig(  # type: ignore[call-arg]
        num_workers=num_workers,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=settings.resize_check_s,
        use_gpu=share.device == "cuda",
        resources_per_worker=share.resources,
        label_selector=dict(share.labels) or None,
    )


def _run_config(folder: RunFolder, settings: TrainConfig, mailbox: str) -> ray.train.RunConfig:
    filesystem, path = patient_filesystem(folder.uri)
    return ray.train.RunConfig(
        name="checkpoints",
        storage_path=path,
        storage_filesystem=filesystem,
        worker_runtime_env={"env_vars": PASSIVE_THREADS},  # type: ignore[call-arg]
        failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
            max_failures=settings.max_failures,
            max_preemption_failures=settings.max_preemptions,
        ),
        callbacks=[_Losses(folder, mailbox)],  # type: ignore[list-item]
    )


def until_it_cannot(folder: RunFolder, body: Callable[[], None]) -> None:
    """Run a worker's part, unless an error has been written down that trying again cannot mend.

    A user's error ends the run instead of being tried again: it is written down, and workers that
    Ray starts after it return at once. So does storage that refuses; storage that is unavailable,
    after all the patience that `storage` has, costs the run one of its failures.
    """
    failure = folder.file(FAILURE_FILE)
    if storage.exists(failure):
        return
    try:
        body()
    except PcdError as error:
        if not isinstance(error, storage.UnavailableError):  # it may be better next time
            with contextlib.suppress(storage.StorageError):  # the error itself is worth more
                storage.write_text(failure, json.dumps(to_plain(error)))
        raise


class _Losses(ray.train.UserCallback):
    """Tells the driver which workers were lost; lives in the process that looks after them."""

    def __init__(self, folder: RunFolder, mailbox: str) -> None:
        self._folder, self._mailbox = folder, mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        del run_context
        with contextlib.suppress(storage.StorageError, ValueError):  # an error here ends the run
            if not storage.exists(self._folder.file(FAILURE_FILE)):  # else it ends in own words
                EventSender(self._mailbox).lost(loss_line(worker_exceptions))


def loss_line(errors_of: Mapping[int, Exception]) -> str:
    """Say which workers were lost, and how: those that died, not those that missed them."""
    deaths = {rank: died for rank, each in errors_of.items() if (died := _death(each)) is not None}
    if deaths:
        ranks = ", ".join(map(str, sorted(deaths)))
        how = "died"
        if any("node has died" in str(died) for died in deaths.values()):
            how = "died with its machine"
        if any(map(_taken_away, errors_of.values())):
            how = "was taken away with its machine"
        return f"lost: worker {ranks} {how}"
    rank, error = min(errors_of.items())
    if re.search(r"[Cc]onnection (reset|closed|refused)", str(error)):  # Ray has not seen it yet
        return f"lost: a worker that worker {rank} was connected to"
    return f"worker {rank} failed: {textwrap.shorten(_last_line(error), _LINE_CHARACTERS)}"


def _death(error: Exception) -> ray.exceptions.RayActorError | None:
    """Return how a worker's process died; None: the worker raised an error."""
    died = getattr(error, "health_check_failure", error)  # as Ray Train wraps it
    return died if isinstance(died, ray.exceptions.RayActorError) else None


def _taken_away(error: Exception) -> bool:
    """Say whether a worker died with a machine that was drained, e.g. a spot machine."""
    died = _death(error)
    return died is not None and bool(died.preempted)


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM (``ray job stop``) end a run after Ray has sent the workers away.

    Ray Train handles Ctrl-C alone: it puts a handler of its own in place of Python's, leaves it
    there, and ends the process without a word.

    Raises:
        KeyboardInterrupt: one of the two came.
    """
    if threading.current_thread() is not threading.main_thread():  # then Ray changes nothing
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        for number, handler in before.items():
            if handler is not None:  # it is Python's, so that it can be put back
                signal.signal(number, handler)


def raise_failure(folder: RunFolder, settings: TrainConfig, cause: Exception | None) -> None:
    """Explain how training failed, if it did.

    Raises:
        PcdError: what a worker has written down, of its kind; else a TrainingError for ``cause``.
    """
    uri = folder.file(FAILURE_FILE)
    if storage.exists(uri):
        raise from_plain(json.loads(storage.read_text(uri))) from cause
    if cause is not None:
        steps = checkpoint_steps(folder)
        raise TrainingError(
            f"{_story(cause, settings)}: {_last_line(cause)}; the same command goes on from "
            f"step {steps[-1] if steps else 0}"
        ) from cause


def _story(cause: Exception, settings: TrainConfig) -> str:
    """Say what ended a run: which budget is spent, or what no budget is for."""
    failures = getattr(cause, "worker_failures", {}).values()
    if isinstance(cause, ray.train.PreemptionError) or any(map(_taken_away, failures)):
        times, budget = settings.max_preemptions + 1, settings.max_preemptions
        return f"machines were taken away {times} times (train.max_preemptions={budget})"
    if isinstance(cause, ray.exceptions.RayActorError):
        return "the process that looks after the workers died"
    if isinstance(cause, ray.train.ControllerError):
        return "Ray Train could not run the workers"
    times, budget = settings.max_failures + 1, settings.max_failures
    return f"training failed {times} times (train.max_failures={budget})"


@contextlib.contextmanager
def _listening(
    mailbox: str, on_event: Callable[[Event], None], standstill: Standstill
) -> Iterator[None]:
    """Pass events on, on a thread, until the block has ended and the mailbox is empty."""
    receiver = EventReceiver(mailbox)
    finished = threading.Event()
    listener = threading.Thread(
        target=_listen, args=(receiver, on_event, standstill, finished), daemon=True
    )
    listener.start()
    try:
        yield
    finally:
        finished.set()
        listener.join()
        receiver.close()


def _listen(
    receiver: EventReceiver,
    on_event: Callable[[Event], None],
    standstill: Standstill,
    finished: threading.Event,
) -> None:
    last = False
    while not last:
        last = finished.wait(_POLL_S)
        try:
            events = receiver.take()
            line = standstill.line()
        except ray.exceptions.RayError as error:
            words = f"warning: metrics are no longer received ({_last_line(error)})"
            on_event(Event("say", 0, 0.0, {}, words))
            return
        for event in events:
            if event.kind == "lost":
                standstill.begin()
            elif event.kind == "resumed":
                standstill.end()
            on_event(event)
        if line and not last:
            on_event(Event("say", 0, 0.0, {}, line))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
