"""What each Ray Train worker runs: Ray and storage wired to the loop."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointUploadMode
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from pcd_ray import __version__, storage
from pcd_ray.checkpoint import (
    RunFolder,
    checkpoint_name,
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    to_host,
)
from pcd_ray.config import Config, config_from_values
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.ray_views import eval_batches, recipe_from, view_batches
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.build import LoadedTeacher, Method, build_method, fit_head, load_teacher
from pcd_ray.distill.heads import head_from_state
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.errors import CheckpointError, PcdError, TrainingError
from pcd_ray.evaluate.ray_knn import KnnImages, knn_scores, open_knn_images
from pcd_ray.seeds import derive_seed
from pcd_ray.train import metrics as names
from pcd_ray.train.loop import (
    HostBatch,
    LoopSettings,
    StepDone,
    TrainState,
    average_batchnorm,
    train_steps,
    unwrapped,
    wrap_student,
)
from pcd_ray.train.optim import Schedule, build_optimizer, peak_learning_rate
from pcd_ray.train.ray_events import EventSender

FAILURE_FILE = "failure.json"
"""Why a run cannot go on, for the driver and for workers that Ray starts again."""


def train_worker(values: dict[str, Any]) -> None:
    """Train on this worker.

    A user's error ends the run instead of being tried again: it is written down, and workers that
    Ray starts after it return at once.

    Args:
        values: ``config`` as plain data, ``mailbox`` name, ``threads`` of torch.
    """
    config = config_from_values(values["config"])
    torch.set_num_threads(values["threads"])
    failure = RunFolder.of(config).file(FAILURE_FILE)
    if storage.exists(failure):
        return
    try:
        _Run(config, values["mailbox"]).train()
    except PcdError as error:
        if not isinstance(error, storage.StorageError):  # storage may be better next time
            story = {"kind": type(error).__name__, "message": str(error)}
            storage.write_text(failure, json.dumps(story))
        raise


@dataclass(frozen=True, slots=True)
class _Place:
    """Who this worker is."""

    rank: int
    num_ranks: int
    device: torch.device


class _Run:
    """One worker's part of a run, from the first to the last step."""

    def __init__(self, config: Config, mailbox: str) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        self.config = config
        self.folder = RunFolder.of(config)
        self.place = _Place(context.get_world_rank(), context.get_world_size(), device)
        self.events = EventSender(mailbox if self.place.rank == 0 else None)
        self.shards = open_shards(config.data.shards)
        self.plan = EpochPlan(self.shards.plan_sources, config.run.seed)
        self.total_steps = self.plan.total_steps(
            config.train.epochs, config.train.global_batch_size
        )
        self.method = self._build_method()
        self.knn_images = open_knn_images(config)
        self.state = self._new_state()
        self._reported_step = -1
        self._last_knn: dict[str, float] = {}

    def train(self) -> None:
        """Restore, train, evaluate and checkpoint until the last step."""
        self._restore()
        self._measure_references()
        self.events.resumed(self.state.step)
        batches = self._batches()
        steps = train_steps(
            self.state, self.method.teacher, batches, self.method.settings, self._loop_settings()
        )
        done = None
        for done in steps:
            self._after_step(done)
        if self._reported_step != self.state.step:
            self._checkpoint(done.metrics if done else None)
        self._check_teacher()

    def _after_step(self, done: StepDone) -> None:
        epoch = done.step * self.config.train.global_batch_size / self.plan.images_per_epoch
        if done.metrics is not None:
            self.events.metrics(done.step, epoch, done.metrics)
        every = self.config.train.checkpoint_every_steps
        if done.epoch_ended is not None:
            self._after_epoch(done, epoch)
        elif every and done.step % every == 0:
            self._checkpoint(done.metrics)

    def _after_epoch(self, done: StepDone, epoch: float) -> None:
        assert done.epoch_ended is not None
        ended = done.epoch_ended + 1
        every = self.config.eval.every_epochs
        if self.knn_images is not None and every and ended % every == 0:
            student = unwrapped(self.state.student)
            average_batchnorm(student)
            self._last_knn = self._knn(student.backbone)
            self.events.metrics(done.step, epoch, self._last_knn)
        self._checkpoint(done.metrics)
        verdict = self.state.audit.verdict(self.plan, done.epoch_ended)
        if self.place.rank == 0:
            each = "as planned" if not self.plan.reads_once() else "each once"
            self.events.say(
                f"warning: {verdict}"
                if verdict
                else f"epoch {ended} read: {self.plan.images_per_epoch:,} images, {each}"
            )

    def _batches(self) -> Iterator[HostBatch]:
        config = self.config
        return view_batches(
            self.shards.index,
            self.plan,
            recipe_from(config.augment, config.pairing.kind),
            seed=config.run.seed,
            rank=self.place.rank,
            num_ranks=self.place.num_ranks,
            global_batch_size=config.train.global_batch_size,
            start_step=self.state.step,
            stop_step=self.total_steps,
            data=config.data,
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
            accumulation_steps=config.train.accumulation_steps,
            clip_grad_norm=config.optim.clip_grad_norm,
            log_every_steps=config.train.log_every_steps,
            seed=config.run.seed,
        )

    def _build_method(self) -> Method:
        loaded = load_teacher(self.config.teacher)
        fitted = self._fitted_head(loaded) if loaded.identity.head == "pca" else None
        return build_method(self.config, loaded, fitted, device=self.place.device)

    def _fitted_head(self, loaded: LoadedTeacher) -> nn.Sequential:
        """Return the run's own fitted head; rank 0 fits it once."""
        uri = self.folder.teacher_head
        if self.place.rank == 0 and not storage.exists(uri):
            self.events.say(f"fitting the teacher's {self.config.teacher.pca_dim}-wide head")
            head = fit_head(
                _moved(loaded, self.place.device),
                self._sample_images(),
                dim=self.config.teacher.pca_dim,
                whiten=self.config.teacher.pca_whiten,
            )
            storage.write_bytes(uri, safetensors.torch.save(head.state_dict()))
        _barrier()
        loaded.backbone.cpu()
        return head_from_state(safetensors.torch.load(storage.read_bytes(uri)))

    def _sample_images(self) -> Iterator[Tensor]:
        config = self.config
        random = np.random.default_rng(derive_seed(config.run.seed, "pca"))
        rows = random.permutation(self.shards.num_images)[: config.teacher.pca_images]
        for views, _ in eval_batches(
            self.shards.index,
            rows,
            size_px=config.augment.image_size_px,
            batch_size=config.eval.images_per_forward,
            data=config.data,
        ):
            yield torch.from_numpy(views).to(self.place.device)

    def _new_state(self) -> TrainState:
        config, device = self.config, self.place.device
        student = self.method.student
        if config.train.sync_batchnorm and device.type == "cuda":
            student = convert_sync_batchnorm(student)
        if config.train.compile:
            self.method.teacher.compile()
        wrapped = wrap_student(student, device=device, compiled=config.train.compile)
        wrapped.train()
        optimizer = build_optimizer(
            config.optim.name, student, weight_decay=config.optim.weight_decay
        )
        return TrainState(wrapped, optimizer, self.method.queue)

    def _restore(self) -> None:
        """Continue from the newest whole checkpoint; rank 0 says which."""
        found = latest_checkpoint(self.folder) if self.place.rank == 0 else None
        uri = _from_rank_zero(found.uri if found else None)
        if uri is None:
            return
        stored = found or load_checkpoint(uri)
        try:
            self.state.load_state_dict(stored.state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{uri} does not fit the networks or optimiser of these settings "
                f"({str(error).splitlines()[0]}); set them back, or choose another run.name"
            ) from error
        self._reported_step = self.state.step
        self.events.say(f"resumed at step {self.state.step} of {self.total_steps}")

    def _measure_references(self) -> None:
        """Measure kNN of the teacher and of the untrained student once, for the whole run."""
        uri = self.folder.file("references.json")
        if self.knn_images is None or not self.config.eval.every_epochs or self.state.step:
            return
        if _from_rank_zero(storage.exists(uri)):
            return
        found = {
            "teacher": self._knn(self.method.teacher.backbone)[names.KNN_TOP1],
            "untrained": self._knn(unwrapped(self.state.student).backbone)[names.KNN_TOP1],
        }
        if self.place.rank == 0:
            storage.write_text(uri, json.dumps({names.KNN_TOP1: found}))
            self.events.say(
                f"kNN top-1: teacher {found['teacher']:.1f}%, untrained student "
                f"{found['untrained']:.1f}%"
            )

    def _knn(self, network: nn.Module) -> dict[str, float]:
        assert isinstance(self.knn_images, KnnImages)
        was_training = network.training
        scores = knn_scores(
            network.eval(),
            self.knn_images,
            self.config,
            device=self.place.device,
            rank=self.place.rank,
            num_ranks=self.place.num_ranks,
            gather=_gather_parts,
        )
        network.train(was_training)
        best = scores[max(scores)]
        return {names.KNN_TOP1: best, names.KNN1_TOP1: scores[1]}

    def _checkpoint(self, metrics: dict[str, float] | None) -> None:
        """Copy the state to the host and let a background thread write it; a collective."""
        state = self.state.state_dict()
        reported = {**(metrics or {}), **self._last_knn, "step": self.state.step}
        placeholder = upload = None
        if self.place.rank == 0:
            placeholder = RayCheckpoint(tempfile.mkdtemp(prefix="pcd_ray_checkpoint_"))
            upload = functools.partial(
                _write, to_host(state), self._about(reported), self.config, self.folder
            )
        ray.train.report(
            reported,
            checkpoint=placeholder,
            checkpoint_dir_name=checkpoint_name(self.state.step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )
        self._reported_step = self.state.step

    def _about(self, metrics: dict[str, Any]) -> dict[str, Any]:
        method = self.method
        backbone = method.student.backbone
        return {
            "step": self.state.step,
            "total_steps": self.total_steps,
            "epoch": self.state.step
            * self.config.train.global_batch_size
            / self.plan.images_per_epoch,
            "teacher": asdict(method.identity),
            "law_error": method.law_error,
            "student": {
                "backbone": backbone.name,
                "mean": (backbone.mean.flatten() / 255).tolist(),
                "std": (backbone.std.flatten() / 255).tolist(),
            },
            "data_sha256": self.shards.content_hash,
            "metrics": metrics,
            "version": __version__,
        }

    def _check_teacher(self) -> None:
        if tensors_sha256(self.method.teacher) != self.method.identity.sha256:
            raise TrainingError(
                "the teacher's weights changed while training; report this as a bug"
            )


def _write(
    state: dict[str, Any],
    about: dict[str, Any],
    config: Config,
    folder: RunFolder,
    placeholder: RayCheckpoint,
    name: str,
) -> RayCheckpoint:
    """Write a checkpoint where Ray expects it; runs in Ray's upload thread."""
    uri = storage.join(folder.checkpoints, name)
    shutil.rmtree(placeholder.path, ignore_errors=True)
    save_checkpoint(uri, state, about, config)
    for step in checkpoint_steps(folder)[: -config.train.keep_checkpoints]:
        storage.delete_folder(storage.join(folder.checkpoints, checkpoint_name(step)))
    filesystem, path = storage.filesystem(uri)
    return RayCheckpoint(path, filesystem=filesystem)


def _moved(loaded: LoadedTeacher, device: torch.device) -> LoadedTeacher:
    loaded.backbone.to(device)
    return loaded


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _from_rank_zero(value: Any) -> Any:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather_parts(part: Tensor) -> Sequence[Tensor]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts
