"""Run a function on Ray Train workers until it has finished: events, failures and Ctrl-C.

Whatever is trained, it is trained this way: checkpoints lie in ``FOLDER/checkpoints``, workers that
die are started again and go on from there, a user's error ends the run in its own words.
"""

import contextlib
import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from pcd_ray import errors, storage
from pcd_ray.checkpoint import RunFolder, checkpoint_steps
from pcd_ray.errors import PcdError, TrainingError
from pcd_ray.patient_files import patient_filesystem
from pcd_ray.ray_cluster import PASSIVE_THREADS, WorkerShare
from pcd_ray.ray_events import Event, EventReceiver

FAILURE_FILE = "failure.json"
"""Why a run cannot go on, for the driver and for workers that Ray starts again."""
_POLL_S = 0.5
_RAY_LIST = "checkpoint_manager_snapshot.json"  # where Ray Train notes its checkpoints


def fit(  # noqa: PLR0913 - what to run, and where
    worker: Callable[[dict[str, Any]], None],
    values: dict[str, Any],
    *,
    folder: RunFolder,
    share: WorkerShare,
    num_workers: int,
    max_failures: int,
    on_event: Callable[[Event], None],
) -> None:
    """Run ``worker(values)`` on every worker and return when all have finished.

    Args:
        worker: a function of a module; `until_it_cannot` should be around what it does.
        values: what it is given; ``mailbox`` (a name for `EventSender`) and ``threads`` (of torch)
            are added.
        folder: where checkpoints and the story of a failure lie.
        share: what each worker gets.
        num_workers: how many there are.
        max_failures: ``train.max_failures``.
        on_event: is given what workers tell, on a thread of its own, until this returns.

    Raises:
        PcdError: a worker's own error, or a TrainingError after too many failures.
    """
    # checkpoints are found and kept by what lies in the folder: Ray's own list of them could name
    # one that is damaged or gone, and would then refuse to start
    storage.delete_file(storage.join(folder.checkpoints, _RAY_LIST))
    storage.delete_file(folder.file(FAILURE_FILE))
    mailbox = f"pcd_ray_{uuid.uuid4().hex}"
    filesystem, path = patient_filesystem(folder.uri)
    trainer = TorchTrainer(
        worker,
        train_loop_config={**values, "mailbox": mailbox, "threads": share.threads},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=share.device == "cuda",
            resources_per_worker=share.resources,
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env={"env_vars": PASSIVE_THREADS},  # type: ignore[call-arg]
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    cause: Exception | None = None
    try:
        with _listening(mailbox, on_event), stopped_by_ctrl_c():
            trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        cause = error
    raise_failure(folder, max_failures, cause)


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
            story = {"kind": type(error).__name__, "message": str(error)}
            with contextlib.suppress(storage.StorageError):  # the error itself is worth more
                storage.write_text(failure, json.dumps(story))
        raise


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end a run as it ends anything else, after Ray has sent the workers away.

    Ray Train puts a handler of its own in place of Python's, and leaves it there; it ends the
    process without a word.
    """
    if threading.current_thread() is not threading.main_thread():  # then Ray changes nothing
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if before is not None:  # it is Python's, so that it can be put back
            signal.signal(signal.SIGINT, before)


def raise_failure(folder: RunFolder, max_failures: int, cause: Exception | None) -> None:
    """Explain how training failed, if it did.

    Raises:
        PcdError: what a worker has written down, of its kind; else a TrainingError for ``cause``.
    """
    uri = folder.file(FAILURE_FILE)
    if storage.exists(uri):
        story = json.loads(storage.read_text(uri))
        kind: type[PcdError] = getattr(errors, story["kind"], PcdError)
        raise kind(story["message"]) from cause
    if cause is not None:
        steps = checkpoint_steps(folder)
        raise TrainingError(
            f"training failed {max_failures + 1} times (train.max_failures="
            f"{max_failures}): {_last_line(cause)}; the same command goes on from "
            f"step {steps[-1] if steps else 0}"
        ) from cause


@contextlib.contextmanager
def _listening(mailbox: str, on_event: Callable[[Event], None]) -> Iterator[None]:
    """Pass events on, on a thread, until the block has ended and the mailbox is empty."""
    receiver = EventReceiver(mailbox)
    finished = threading.Event()
    listener = threading.Thread(target=_listen, args=(receiver, on_event, finished), daemon=True)
    listener.start()
    try:
        yield
    finally:
        finished.set()
        listener.join()
        receiver.close()


def _listen(
    receiver: EventReceiver, on_event: Callable[[Event], None], finished: threading.Event
) -> None:
    last = False
    while not last:
        last = finished.wait(_POLL_S)
        try:
            events = receiver.take()
        except ray.exceptions.RayError as error:
            words = f"warning: metrics are no longer received ({_last_line(error)})"
            on_event(Event("say", 0, 0.0, {}, words))
            return
        for event in events:
            on_event(event)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
