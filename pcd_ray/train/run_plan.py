"""What a run will do and cost, said before it starts.

Shapes: C channels, H x W positions, D embedding channels.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pcd_ray.checkpoint import RunFolder, checkpoint_steps
from pcd_ray.config import Config, DataConfig
from pcd_ray.data.decode import UnreadableImage, decode_rgb, unreadable
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.shards import Shards, read_image_bytes
from pcd_ray.distill.backbones import map_shape
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_head import FITTED_HEADS, stand_in_head, stored_head
from pcd_ray.distill.build_teacher import (
    UNKNOWN_LICENSE,
    LoadedTeacher,
    blaming,
    load_teachers,
)
from pcd_ray.distill.diagnostics import chance_loss
from pcd_ray.distill.fitted_head import check_pca_width
from pcd_ray.distill.step import Branch
from pcd_ray.distill.teacher_parts import OTHER_HEADS
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.eval_sets import look_through, open_probe
from pcd_ray.train.elastic import images_per_pass
from pcd_ray.train.memory import memory_gib, parameters_of
from pcd_ray.train.optim import peak_learning_rate
from pcd_ray.train.run_scale import machines_of, trained_weights, workload_of
from pcd_ray.train.scale import scale_of
from pcd_ray.train.teacher_cache import cache_of

_SAMPLE_IMAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The plan that ``--dry-run`` prints."""

    images: int
    images_per_epoch: int
    epochs: int
    steps: int
    steps_per_epoch: float
    global_batch_size: int
    batch_size_per_worker: int
    """Images of a worker per optimiser step; the most, with the fewest workers."""
    images_per_pass: int
    """Most images that a worker takes forward and backward at once."""
    num_workers: int | tuple[int, int]
    """Of an elastic run the fewest and the most."""
    device: str
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: float
    queue_fill_steps: int
    """Steps until the queue holds nothing but the teacher's vectors; 0: the loss has no queue."""
    chance_loss: float
    """Loss of vectors at right angles to all others, log(1 + K) or for ``mse`` 2; of two teachers
    the weighted sum."""
    loss_kind: str
    loss_implementation: str
    teacher: dict[str, str]
    """What it is; ``sha256`` is empty while its head is still to be fitted."""
    teacher_map: tuple[int, int, int]
    student_map: tuple[int, int, int]
    loss_grid: tuple[int, int]
    """Positions on which the loss compares the maps."""
    embedding_width: int
    law_error: float
    student_parameters: int
    """Parameters that are trained: backbone, neck and head."""
    backbone_parameters: int
    """Those of the backbone, which are exported."""
    teacher_parameters: int
    eval_read: dict[str, str]
    """How much of each evaluation set was decoded to find damage before training."""
    notes: dict[str, str]
    """What a user should know of a run that can begin, by option."""
    teacher_cache: dict[str, Any] | None = None
    """Stored maps that take the place of the teacher: how many, their bytes, where, and whether
    they are ``whole``, ``partial`` or ``missing``, and so made when the run begins."""
    teacher_2: dict[str, Any] | None = None
    """The second teacher: what it is, and all that is said above of the first one."""
    memory_gib_per_worker: float
    """Estimate: weights, gradients, optimiser, queues, the student's activations, views, maps, and
    the pixels that the loss compares."""
    scale: dict[str, Any]
    """What the run asks of the machines of section ``scale``: see `pcd_ray.train.scale.Scale`; the
    CPU time per image is given, or measured on a sample, and the rest of ``assumed`` is assumed."""

    @property
    def headline(self) -> str:
        """The plan in a line."""
        asked = self.num_workers
        workers = f"{asked[0]} to {asked[1]}" if isinstance(asked, tuple) else asked
        return (
            f"{self.steps:,} steps of {self.global_batch_size:,} images, {self.epochs} epochs of "
            f"{self.images_per_epoch:,}, on {workers} {self.device} workers"
        )

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """What each teacher is, by the name of its section."""
        return {"teacher": self.teacher} | ({"teacher_2": self.teacher_2} if self.teacher_2 else {})

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data, without a second teacher or a cache if there is none."""
        values = asdict(self)
        for name in ("teacher_2", "teacher_cache"):
            if values[name] is None:
                del values[name]
        return values


def plan_run(config: Config, shards: Shards, *, device: str) -> RunPlan:
    """Check teachers, student and a sample of the data by building them; say what the run will do.

    Args:
        config: the run.
        shards: its data.
        device: ``cpu`` or ``cuda``: where the workers will compute.

    Raises:
        PcdError: anything that would stop the run later.
    """
    sample = _checked_sample(shards, config.data)
    eval_read = look_through(config)
    teachers, still_to_fit = [], set()
    caches: dict[str, dict[str, Any]] = {}
    for loaded in load_teachers(config):
        with blaming(loaded.name):
            own_head = _own_head(config, loaded)
            if own_head is None:
                _check_fit(config, loaded, shards.num_images)
            fitted = own_head or stand_in_head(loaded, loaded.options.fit)
            if (cache := cache_of(config, loaded, shards)) is not None:
                caches[loaded.name] = cache.plan()
        if fitted is not own_head:
            still_to_fit.add(loaded.name)
        teachers.append((loaded, fitted))
    method = build_method(config, teachers, device=torch.device("cpu"))
    _check_eval_sizes(config, method)
    identities = [
        asdict(branch.identity) | ({"sha256": ""} if branch.name in still_to_fit else {})
        for branch in method.branches
    ]
    notes = {
        f"{loaded.name}.licence": f"the weights of {loaded.identity.source} do not state their "
        f"license, and checkpoints and exports will say unknown; give {loaded.name}.licence=..."
        for loaded, _ in teachers
        if loaded.identity.licence == UNKNOWN_LICENSE
    }
    notes |= {
        f"{loaded.name}.head": f"{loaded.identity.head}, since {loaded.options.weights} holds no "
        f"projection head" + (f": {loaded.headless}" if loaded.headless != OTHER_HEADS else "")
        for loaded, _ in teachers
        if loaded.headless
    } | {
        f"{loaded.name}.weights": "; ".join(loaded.notes) for loaded, _ in teachers if loaded.notes
    }
    return _plan_of(
        config,
        shards,
        method,
        identities=identities,
        caches=caches,
        device=device,
        eval_read=eval_read,
        notes=notes,
        sample=sample,
    )


def _plan_of(  # noqa: PLR0913 - what the parts of a plan are told
    config: Config,
    shards: Shards,
    method: Method,
    *,
    identities: list[dict[str, str]],
    caches: dict[str, dict[str, Any]],
    device: str,
    eval_read: dict[str, str],
    notes: dict[str, str],
    sample: list[bytes],
) -> RunPlan:
    plan = EpochPlan(shards.plan_sources, config.run.seed)
    batch = config.train.global_batch_size
    per_epoch = plan.images_per_epoch / batch
    steps = plan.total_steps(config.train.epochs, batch)
    peak = peak_learning_rate(config.optim.base_lr, batch)
    if config.optim.warmup_epochs * per_epoch >= steps:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} covers all of train.epochs="
            f"{config.train.epochs}; use less, e.g. {config.train.epochs / 10:g}"
        )
    first, *others = [
        _facts(config, method, branch, device)
        | ({"teacher_cache": caches[branch.name]} if branch.name in caches else {})
        for branch in method.branches
    ]
    weights = [{"weight": branch.weight} for branch in method.branches]
    chance = chance_loss(config.loss.kind, config.loss.queue_size)
    return RunPlan(
        images=shards.num_images,
        images_per_epoch=plan.images_per_epoch,
        epochs=config.train.epochs,
        steps=steps,
        steps_per_epoch=round(per_epoch, 2),
        global_batch_size=batch,
        batch_size_per_worker=config.train.batch_size_per_worker,
        images_per_pass=images_per_pass(config.train),
        num_workers=config.train.num_workers,
        device=device,
        peak_learning_rate=peak,
        final_learning_rate=peak * config.optim.final_lr_fraction,
        warmup_steps=round(config.optim.warmup_epochs * per_epoch, 2),
        queue_fill_steps=_queue_fill_steps(config),
        chance_loss=round(chance * sum(branch.weight for branch in method.branches), 3),
        loss_kind=config.loss.kind,
        **first,
        teacher=identities[0],
        teacher_2=identities[1] | weights[1] | others[0] if others else None,
        student_map=method.student_map,
        student_parameters=trained_weights(method.student),
        backbone_parameters=parameters_of(method.student.backbone),
        eval_read=eval_read,
        notes=notes
        | _queue_note(config, steps=steps, num_images=shards.num_images)
        | precision_note(config.train.precision, device, torch.backends.cpu.get_cpu_capability()),
        memory_gib_per_worker=round(memory_gib(config, method), 2),
        scale=_scale(config, shards, method, sample),
    )


def _scale(config: Config, shards: Shards, method: Method, sample: list[bytes]) -> dict[str, Any]:
    """Return what the run asks of machines, and what was assumed of them."""
    machines = machines_of(config, sample)
    asked = scale_of(workload_of(config, shards, method), machines).summary()
    return {"assumed": asdict(machines), **asked}


def _facts(config: Config, method: Method, branch: Branch, device: str) -> dict[str, Any]:
    """Return what the plan says of one teacher besides its identity."""
    return {
        "loss_implementation": _implementation(config, branch, device),
        "teacher_map": branch.teacher_map,
        "loss_grid": branch.settings.grid or method.student_map[1:],
        "embedding_width": branch.teacher.width(branch.teacher_map[0]),
        "law_error": branch.law_error,
        "teacher_parameters": parameters_of(branch.teacher),
    }


def _implementation(config: Config, branch: Branch, device: str) -> str:
    """Return the loss's form; one for a GPU is settled there, where its kernel can be checked."""
    here = device == "cpu" or torch.cuda.is_available() or branch.queue is None
    return branch.settings.implementation if here else config.loss.implementation


def _queue_fill_steps(config: Config) -> int:
    if config.loss.kind == "mse":
        return 0
    return math.ceil(config.loss.queue_size / config.train.global_batch_size)


def precision_note(precision: str, device: str, capability: str) -> dict[str, str]:
    """Say that this machine computes bfloat16 in software, if it does.

    Args:
        precision: ``train.precision``.
        device: ``cpu`` or ``cuda``.
        capability: torch's name for the widest instructions of this machine's CPU.
    """
    if (precision, device) != ("bf16", "cpu") or capability != "AVX2":
        return {}
    return {
        "train.precision": "a CPU without AVX-512, as this one, computes bf16 in software, several "
        "times slower than numbers of 32 bits: use train.precision=fp32"
    }


def _queue_note(config: Config, *, steps: int, num_images: int) -> dict[str, str]:
    """Say that a run of so many steps and images has too large a queue, if so."""
    size, needed = config.loss.queue_size, _queue_fill_steps(config)
    most = max(1, min(steps * config.train.global_batch_size, num_images // 3))
    if needed > steps:
        why = f"needs {needed:,} steps to fill, the run has {steps:,}; the rest stays random"
    elif needed and config.train.epochs > 1 and size > num_images / 2:
        why = f"is more than half of the {num_images:,} images and holds their own earlier vectors"
    else:
        return {}
    return {"loss.queue_size": f"the queue of {size:,} {why}: use at most {most}"}


def _own_head(config: Config, loaded: LoadedTeacher) -> nn.Sequential | None:
    """Return the head that this run has fitted; None: it fits none, is new, or its settings are."""
    folder = RunFolder.of(config)
    if loaded.identity.head not in FITTED_HEADS or not checkpoint_steps(folder):
        return None
    return stored_head(folder.fitted_head(loaded.name), config, loaded)


def _check_fit(config: Config, loaded: LoadedTeacher, num_images: int) -> None:
    """Refuse a head that is wider than what it will be fitted on."""
    if loaded.identity.head == "pca":
        fit = loaded.options.fit
        channels, height, width = map_shape(loaded.backbone, config.augment.image_size_px)
        pixels = min(fit.images, num_images) * height * width
        check_pca_width(fit.dim, pixels=pixels, channels=channels)


def _check_eval_sizes(config: Config, method: Method) -> None:
    """Refuse image sizes that a network cannot be judged at, before it has trained for days."""
    networks = [method.student.backbone, *(b.teacher.backbone for b in method.branches)]
    if config.eval.knn_train and config.eval.image_size_px:
        for network in networks:
            map_shape(network, config.eval.image_size_px, option="eval.image_size_px")
    data = open_probe(config)
    if data is not None:
        height, width = data.example(data.names("train")[0])[0].shape[:2]
        for network in networks:
            map_shape(network, height, width, option="eval.segmentation_size_px")


def _checked_sample(shards: Shards, data: DataConfig) -> list[bytes]:
    """Return the encoded bytes of a few images that can be decoded."""
    sample = shards.index.slice(0, _SAMPLE_IMAGES).to_pylist()
    contents = read_image_bytes(
        [entry["uri"] for entry in sample],
        [entry["offset"] for entry in sample],
        [entry["size"] for entry in sample],
    )
    for entry, content in zip(sample, contents, strict=True):
        try:
            decode_rgb(content, max_pixels=data.max_pixels, max_decode_s=data.max_decode_s)
        except UnreadableImage as error:
            raise unreadable(entry["key"], entry["uri"], str(error)) from error
    return contents
