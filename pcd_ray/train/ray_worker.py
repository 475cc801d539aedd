"""What each Ray Train worker runs: Ray and storage wired to the loop."""

import functools
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointUploadMode
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from pcd_ray import __version__, storage
from pcd_ray import metric_names as names
from pcd_ray.checkpoint import (
    RunFolder,
    check_same_run,
    checkpoint_from_rank_zero,
    checkpoint_name,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    to_host,
)
from pcd_ray.config import Config, config_from_values
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.plan import EpochPlan, RankPlan
from pcd_ray.data.ray_views import view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_head import FITTED_HEADS, save_fitted_head, stored_head
from pcd_ray.distill.build_teacher import LoadedTeacher, blaming, load_teachers
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.errors import CheckpointError, ClusterError, TrainingError
from pcd_ray.patient_files import patient_filesystem
from pcd_ray.progress import progress, sending_to
from pcd_ray.ray_cluster import current_reservation
from pcd_ray.ray_events import EventSender
from pcd_ray.ray_fit import until_it_cannot
from pcd_ray.train.elastic import elastic_line, passes_of
from pcd_ray.train.loop import HostBatch, LoopSettings, StepDone, train_steps
from pcd_ray.train.metrics import NewestScores
from pcd_ray.train.optim import Schedule, build_optimizer, peak_learning_rate
from pcd_ray.train.ranks import Worker, barrier
from pcd_ray.train.ray_heads import fit_head, fitting_line
from pcd_ray.train.ray_preemption import PreemptionNotices
from pcd_ray.train.ray_scores import RunScores
from pcd_ray.train.state import TrainState, moving_average, wrap_student
from pcd_ray.train.teacher_cache import cache_of


def train_worker(values: dict[str, Any]) -> None:
    """Train on this worker.

    Args:
        values: ``config`` as plain data, ``mailbox`` name, ``threads`` of torch.
    """
    config = config_from_values(values["config"])
    torch.set_num_threads(values["threads"])
    mailbox = values["mailbox"]
    events = EventSender(mailbox if ray.train.get_context().get_world_rank() == 0 else None)
    events.reserved(current_reservation(mailbox))
    with sending_to(events.say):
        until_it_cannot(RunFolder.of(config), lambda: _Run(config, events).train())


def check_gpu() -> None:
    """Check, in a task that Ray gave a GPU, that torch can use it.

    Raises:
        ClusterError: it cannot; NCCL and networks would fail without saying why.
    """
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        why = str(error).strip().splitlines()[0]
        raise ClusterError(unusable_gpu(socket.gethostname(), torch.version.cuda, why)) from None


def unusable_gpu(node: str, built_for: str | None, why: str) -> str:
    """Return what to do about a GPU that torch, built for a version of CUDA, cannot use."""
    if built_for is None:
        fix = "torch is built without CUDA there: install a build with CUDA"
    else:
        fix = (
            f"torch is built for CUDA {built_for} there: update the NVIDIA driver to one for that "
            "version or a newer one (nvidia-smi prints which it is for), or install a torch build "
            "for the driver's version"
        )
    return f"node {node} has a GPU that torch cannot use ({why}); {fix}, or set train.device=cpu"


class _Run:
    """One worker's part of a run, from the first to the last step."""

    def __init__(self, config: Config, events: EventSender) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        self.config = config
        self.folder = RunFolder.of(config)
        self.worker = Worker(context.get_world_rank(), context.get_world_size(), device)
        self.events = events
        self.shards = open_shards(config.data.shards)
        self.plan = EpochPlan(self.shards.plan_sources, config.run.seed)
        self.total_steps = self.plan.total_steps(
            config.train.epochs, config.train.global_batch_size
        )
        self.maps: dict[str, StoredMaps] = {}
        self.method = self._build_method()
        self.scores = RunScores(config, self.worker, self.events)
        self.state = self._new_state()
        self._reported_step = -1
        self._notices = PreemptionNotices()
        self._timed_step = 0  # up to here, this time went by since the last checkpoint
        self._unsaved_s = 0.0
        self._newest = NewestScores()
        self._passed_over: tuple[str, ...] = ()

    def train(self) -> None:
        """Restore, train, evaluate and checkpoint until the last step."""
        with progress("reading the newest checkpoint"):
            self._restore()
        if self.config.train.min_workers < self.config.train.max_workers:
            self.events.say(elastic_line(self.config.train, self.worker.num_ranks))
        self.scores.measure_references(self.method.branches)
        self.events.resumed(self.state.step)
        batches = self._batches()
        steps = train_steps(self.state, batches, self._loop_settings())
        with progress("the first training step"):
            first = list(islice(steps, 1))
        done = None
        for done in chain(first, steps):
            self._after_step(done)
        if self._reported_step != self.state.step:
            self._checkpoint(done.metrics if done else None)
        self._check_teachers()

    def _after_step(self, done: StepDone) -> None:
        if done.metrics is not None:
            self.events.metrics(done.step, self._epoch(), done.metrics)
            self._notices.pace(done.metrics[names.STEP_S])
        due = self._checkpoint_is_due(done)
        if done.epochs_ended:
            self._after_epochs(done)
        elif due:
            self._checkpoint(done.metrics)
        if notice := self._notices.new(done.step):
            self.events.say(f"warning: {notice}; step {done.step} is stored before that")
            if self._reported_step != done.step:
                self._checkpoint(done.metrics)

    def _checkpoint_is_due(self, done: StepDone) -> bool:
        """Say whether one is due between epochs; times are means over ranks, so that all agree."""
        if done.metrics is not None:
            self._unsaved_s += done.metrics[names.STEP_S] * (done.step - self._timed_step)
            self._timed_step = done.step
        minutes = self.config.train.checkpoint_every_minutes
        every = self.config.train.checkpoint_every_steps
        return (0 < 60 * minutes <= self._unsaved_s) or (every > 0 and done.step % every == 0)

    def _epoch(self) -> float:
        """Return how many epochs have been read."""
        options = self.config.train
        return self.plan.epochs_read(self.state.step, options.global_batch_size, options.epochs)

    def _after_epochs(self, done: StepDone) -> None:
        """Evaluate, store and audit; a large batch may have ended several epochs of few images."""
        asked = [number for number in done.epochs_ended if number < self.config.train.epochs]
        scores = self.scores.of_epochs(self.state.judged, [number + 1 for number in asked])
        if scores:
            self._newest.add(done.step, scores)
            self.events.metrics(done.step, self._epoch(), scores)
        self._checkpoint(done.metrics)
        if self.worker.rank != 0:
            return
        each = "as planned" if not self.plan.reads_once() else "each once"
        for number in asked:
            verdict = self.state.audit.verdict(self.plan, number)
            self.events.say(
                f"warning: {verdict}"
                if verdict
                else f"epoch {number + 1} read: {self.plan.images_per_epoch:,} images, {each}"
            )

    def _batches(self) -> Iterator[HostBatch]:
        config = self.config
        return view_batches(
            self.shards.index,
            RankPlan(
                plan=self.plan,
                global_batch_size=config.train.global_batch_size,
                start_step=self.state.step,
                stop_step=self.total_steps,
                rank=self.worker.rank,
                num_ranks=self.worker.num_ranks,
            ),
            recipe_from(config.augment, config.pairing.kind),
            seed=config.run.seed,
            data=config.data,
            maps=self.maps,
        )

    def _loop_settings(self) -> LoopSettings:
        config = self.config
        batch = config.train.global_batch_size
        steps_per_epoch = self.plan.images_per_epoch / batch
        return LoopSettings(
            schedule=Schedule(
                peak_lr=peak_learning_rate(config.optim.base_lr, batch),
                warmup_steps=config.optim.warmup_epochs * steps_per_epoch,
                total_steps=self.total_steps,
                final_fraction=config.optim.final_lr_fraction,
            ),
            images_per_epoch=self.plan.images_per_epoch,
            global_batch_size=batch,
            accumulation_steps=passes_of(config.train, self.worker.num_ranks),
            clip_grad_norm=config.optim.clip_grad_norm,
            log_every_steps=config.train.log_every_steps,
            seed=config.run.seed,
        )

    def _build_method(self) -> Method:
        teachers, caches = [], {}
        with progress("loading the teacher"):
            loaded_teachers = list(load_teachers(self.config))
        for loaded in loaded_teachers:
            fits = loaded.identity.head in FITTED_HEADS
            with blaming(loaded.name):
                teachers.append((loaded, self._fitted_head(loaded) if fits else None))
                caches[loaded.name] = cache_of(self.config, loaded, self.shards)
        with progress("building the networks"):
            method = build_method(self.config, teachers, device=self.worker.device)
        for branch in method.branches:
            if (cache := caches[branch.name]) is not None:
                with blaming(branch.name):
                    cache.check_teacher(branch.identity)
                self.maps[branch.name] = cache.maps
        return method

    def _fitted_head(self, loaded: LoadedTeacher) -> nn.Sequential:
        """Return the run's own fitted head; rank 0 fits it once."""
        uri = self.folder.fitted_head(loaded.name)
        if self.worker.rank == 0 and stored_head(uri, self.config, loaded) is None:
            self.events.say(fitting_line(loaded))
            found = fit_head(loaded, self.shards, self.config, device=self.worker.device)
            if found.remark:
                self.events.say(found.remark)
            save_fitted_head(uri, found.head, self.config, loaded)
        barrier()
        fitted = stored_head(uri, self.config, loaded)
        assert fitted is not None  # rank 0 has just written it
        return fitted

    def _new_state(self) -> TrainState:
        config, device = self.config, self.worker.device
        student = self.method.student
        if config.train.sync_batchnorm and device.type == "cuda":
            student = convert_sync_batchnorm(student)
        if config.train.compile:
            for branch in self.method.branches:
                branch.teacher.compile()
        wrapped = wrap_student(student, device=device, compiled=config.train.compile)
        wrapped.train()
        optimizer = build_optimizer(
            config.optim.name, student, weight_decay=config.optim.weight_decay
        )
        average = moving_average(student, decay=config.student.ema)
        return TrainState(wrapped, optimizer, self.method.branches, average=average)

    def _restore(self) -> None:
        """Continue from the newest complete checkpoint, which rank 0 alone reads."""
        found = latest_checkpoint(self.folder) if self.worker.rank == 0 else None
        if found is not None:
            check_same_run(self.config, found, data_sha256=self.shards.content_hash)
        stored = checkpoint_from_rank_zero(found, self.worker.device)
        if stored is None:
            return
        try:
            self.state.load_state_dict(stored.state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{stored.uri} does not fit the networks or optimiser of these settings "
                f"({str(error).splitlines()[0]}); set them back, or choose another run.name"
            ) from error
        self._reported_step = self._timed_step = self.state.step
        self._newest.values = {
            name: stored.about["metrics"][name]
            for name in (names.KNN_TOP1, names.KNN1_TOP1, names.SEGMENTATION_MIOU)
            if name in stored.about["metrics"]
        }
        self._passed_over = tuple(stored.passed_over)
        for damaged in stored.passed_over.values():
            self.events.say(f"warning: passed over {damaged}")
        self.events.say(f"resumed at step {self.state.step} of {self.total_steps}")

    def _checkpoint(self, metrics: dict[str, float] | None) -> None:
        """Copy the state to the host and let a background thread write it; a collective."""
        self.events.checkpoint(self.state.step)
        state = self.state.state_dict()
        reported = {**(metrics or {}), **self._newest.values, "step": self.state.step}
        placeholder = upload = None
        if self.worker.rank == 0:
            placeholder = RayCheckpoint(tempfile.mkdtemp(prefix="pcd_ray_checkpoint_"))
            upload = functools.partial(
                _write,
                to_host(state),
                self._about(reported),
                self.config,
                self.folder,
                self._passed_over,
            )
            self._passed_over = ()  # gone once this checkpoint is there
        ray.train.report(
            reported,
            checkpoint=placeholder,
            checkpoint_dir_name=checkpoint_name(self.state.step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )
        self._reported_step = self.state.step
        self._unsaved_s = 0.0

    def _about(self, metrics: dict[str, Any]) -> dict[str, Any]:
        method = self.method
        backbone = method.student.backbone
        return {
            "step": self.state.step,
            "total_steps": self.total_steps,
            "epoch": self._epoch(),
            **{branch.name: asdict(branch.identity) for branch in method.branches},
            "law_error": max(branch.law_error for branch in method.branches),
            "student": {
                "backbone": backbone.name,
                "mean": (backbone.mean.flatten() / 255).tolist(),
                "std": (backbone.std.flatten() / 255).tolist(),
            },
            "data_sha256": self.shards.content_hash,
            "metrics": metrics,
            "scored": self._newest.of_step(self.state.step),
            "version": __version__,
        }

    def _check_teachers(self) -> None:
        for branch in self.method.branches:
            if tensors_sha256(branch.teacher) != branch.identity.sha256:
                raise TrainingError(
                    f"the {branch.name}'s weights changed while training; report this as a bug"
                )


def _write(  # noqa: PLR0913 - what to write, and what Ray adds
    state: dict[str, Any],
    about: dict[str, Any],
    config: Config,
    folder: RunFolder,
    passed_over: Sequence[str],
    placeholder: RayCheckpoint,
    name: str,
) -> RayCheckpoint:
    """Write a checkpoint where Ray expects it; runs in Ray's upload thread."""
    uri = storage.join(folder.checkpoints, name)
    shutil.rmtree(placeholder.path, ignore_errors=True)
    save_checkpoint(uri, state, about, config)
    prune_checkpoints(
        folder,
        written=about["step"],
        keep_last=config.train.keep_last,
        keep_best=(config.train.keep_best, names.SCORES[config.train.keep_best_by]),
        damaged=passed_over,
    )
    filesystem, path = patient_filesystem(uri)
    return RayCheckpoint(path, filesystem=filesystem)
