"""Fine-tuning on Ray Train workers: what the driver and each worker do.

A worker that dies is started again and goes on from the last checkpoint; so does the same command
after the driver has died.
"""

import functools
import shutil
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointUploadMode
from torch import Tensor

from pcd_ray import storage
from pcd_ray.checkpoint import (
    RunFolder,
    checkpoint_from_rank_zero,
    checkpoint_name,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    to_host,
)
from pcd_ray.config import Config, config_from_values, config_to_values
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray.evaluate.finetune.finetune import (
    FinetuneStep,
    FinetuneTask,
    finetune_steps,
    fingerprint,
    new_state,
)
from pcd_ray.evaluate.finetune.finetune_log import FinetuneLog
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings
from pcd_ray.evaluate.judging import Place
from pcd_ray.patient_files import patient_filesystem
from pcd_ray.progress import Progress, progress
from pcd_ray.ray_events import Event, EventSender
from pcd_ray.ray_fit import fit, until_it_cannot
from pcd_ray.ray_placement import share_of_workers, wait_for_workers

_MOST_LOADERS = 16  # threads that decode images, for one worker


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a fine-tuning."""

    weights: dict[str, Tensor]
    """After the last step, on the CPU."""
    history: list[dict[str, Any]]
    """Losses and learning rate of the steps that were logged."""


def finetune(
    task: FinetuneTask,
    settings: FinetuneSettings,
    *,
    place: Place,
    num_workers: int,
    device: str,
    config: Config,
) -> Trained:
    """Fine-tune on Ray Train workers, or go on where this was interrupted.

    Its checkpoints lie in a subfolder of ``place.work`` named after the `fingerprint` of task and
    settings: what was trained with others is neither taken up nor overwritten. Losses lie in
    ``metrics.jsonl`` of ``place.part``.

    Args:
        task: what is learned.
        settings: how.
        place: folders that all workers can write to.
        num_workers: Ray Train workers, one GPU each on cuda.
        device: ``cpu`` or ``cuda``.
        config: of the evaluation; ``train.cpus_per_worker``, ``threads_per_worker`` and
            ``max_failures`` and the like are used, and it is stored with the checkpoints.

    Raises:
        PcdError: what a user can mend; checkpoints stay.
    """
    folder = folder_of(task, settings, folder=place.work)
    log = FinetuneLog(storage.join(place.part, "metrics.jsonl"), settings.steps)
    done = latest_checkpoint(folder)
    if done is None or done.state["step"] < settings.steps:
        try:
            with driving(FolderMarks(folder.uri, "eval.out"), log.say):
                _fit(
                    task,
                    settings,
                    folder,
                    log,
                    num_workers=num_workers,
                    device=device,
                    config=config,
                )
        finally:
            log.flush()
        done = latest_checkpoint(folder)
    assert done is not None
    assert done.state["step"] == settings.steps
    return Trained(done.state["model"], log.history)


def folder_of(task: FinetuneTask, settings: FinetuneSettings, *, folder: str) -> RunFolder:
    """Return where a task's checkpoints lie: how often is logged and stored makes no difference."""
    matters = replace(settings, checkpoint_every_steps=0, log_every_steps=1)
    return RunFolder(storage.join(storage.absolute(folder), fingerprint(task, matters)))


def _fit(  # noqa: PLR0913 - what, how and where
    task: FinetuneTask,
    settings: FinetuneSettings,
    folder: RunFolder,
    log: FinetuneLog,
    *,
    num_workers: int,
    device: str,
    config: Config,
) -> None:
    share = share_of_workers(config, num_workers=num_workers, device=device)
    wait_for_workers(config, share, say=log.say, num_workers=num_workers)
    values = {
        "task": task,
        "settings": settings,
        "folder": folder.uri,
        "config": config_to_values(config),
    }
    with progress("fine-tuning", "steps") as shown:
        fit(
            _worker,
            values,
            folder=folder,
            share=share,
            settings=config.train,
            num_workers=num_workers,
            on_event=functools.partial(_note, log, shown, settings.steps),
        )


def _note(log: FinetuneLog, shown: Progress, steps: int, event: Event) -> None:
    """Note what a worker sends, of a training of so many steps."""
    if event.kind == "resumed":
        log.resumed(event.step)
        shown.total, shown.done = steps - event.step, 0
    elif event.kind == "metrics":
        log.metrics(event.step, event.values)
        shown.done = shown.total - (steps - event.step)
    else:
        log.say(event.text)


def _worker(values: dict[str, Any]) -> None:
    """Fine-tune on this worker."""
    torch.set_num_threads(values["threads"])
    until_it_cannot(RunFolder(values["folder"]), _Run(values).train)


class _Run:
    """One worker's part, from the first to the last step."""

    def __init__(self, values: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.task: FinetuneTask = values["task"]
        self.settings: FinetuneSettings = values["settings"]
        self.folder = RunFolder(values["folder"])
        self.config = config_from_values(values["config"])
        self.threads = int(values["threads"])
        self.events = EventSender(values["mailbox"] if self.rank == 0 else None)
        self._damaged: tuple[str, ...] = ()

    def train(self) -> None:
        """Restore, train and checkpoint until the last step."""
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        self.state = new_state(self.task, self.settings, device=device)
        self._restore(device)
        self.events.resumed(self.state.step)
        loaders = min(_MOST_LOADERS, self.threads)
        for done in finetune_steps(
            self.task, self.settings, self.state, device=device, threads=loaders
        ):
            self._after_step(done)

    def _after_step(self, done: FinetuneStep) -> None:
        if done.losses is not None:
            values = {**done.losses, "lr": done.learning_rate}
            self.events.metrics(done.step, 0.0, values)
        every = self.settings.checkpoint_every_steps
        if done.step == self.settings.steps or (every and done.step % every == 0):
            self._checkpoint()

    def _restore(self, device: torch.device) -> None:
        """Continue from the newest complete checkpoint, which rank 0 alone reads."""
        found = latest_checkpoint(self.folder) if self.rank == 0 else None
        stored = checkpoint_from_rank_zero(found, device)
        if stored is None:
            return
        self.state.load_state_dict(stored.state)
        self._damaged = tuple(stored.passed_over)
        for damaged in stored.passed_over.values():
            self.events.say(f"warning: passed over {damaged}")

    def _checkpoint(self) -> None:
        """Copy the state to the host and let a background thread write it; a collective."""
        state = self.state.state_dict()
        placeholder = upload = None
        if self.rank == 0:
            placeholder = RayCheckpoint(tempfile.mkdtemp(prefix="pcd_ray_finetune_"))
            upload = functools.partial(
                _write, to_host(state), self.folder, self.config, self._damaged
            )
            self._damaged = ()  # gone once this checkpoint is there
        ray.train.report(
            {"step": self.state.step},
            checkpoint=placeholder,
            checkpoint_dir_name=checkpoint_name(self.state.step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )


def _write(
    state: dict[str, Any],
    folder: RunFolder,
    config: Config,
    damaged: tuple[str, ...],
    placeholder: RayCheckpoint,
    name: str,
) -> RayCheckpoint:
    """Write a checkpoint where Ray expects it; runs in Ray's upload thread."""
    uri = storage.join(folder.checkpoints, name)
    shutil.rmtree(placeholder.path, ignore_errors=True)
    save_checkpoint(uri, state, {"step": state["step"]}, config)
    prune_checkpoints(
        folder, written=state["step"], keep_last=config.train.keep_last, damaged=damaged
    )
    filesystem, path = patient_filesystem(uri)
    return RayCheckpoint(path, filesystem=filesystem)
