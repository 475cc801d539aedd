"""What a run will do and cost, said before it starts.

Shapes: C channels, H x W positions, D embedding channels.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder, checkpoint_steps
from pcd_ray.config import Config
from pcd_ray.data.decode import UnreadableImage, decode_rgb, unreadable
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.shards import Shards, read_image_bytes
from pcd_ray.distill.build import LoadedTeacher, Method, build_method, load_teacher
from pcd_ray.distill.diagnostics import chance_loss
from pcd_ray.distill.heads import head_from_state
from pcd_ray.errors import ConfigError
from pcd_ray.train.optim import peak_learning_rate

_SAMPLE_IMAGES = 8
_OPTIMIZER_COPIES = {"lars": 1, "adamw": 2}  # of the weights, beside weights and gradients


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
    num_workers: int
    device: str
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: float
    queue_fill_steps: int
    """Steps until the queue holds nothing but the teacher's vectors."""
    chance_loss: float
    """Loss of a student that knows nothing, log(1 + K)."""
    loss_implementation: str
    teacher: dict[str, str]
    """What it is; ``sha256`` is empty while its head is still to be fitted."""
    teacher_map: tuple[int, int, int]
    student_map: tuple[int, int, int]
    embedding_width: int
    law_error: float
    student_parameters: int
    """Parameters that are trained: backbone, neck and head."""
    backbone_parameters: int
    """Those of the backbone, which are exported."""
    teacher_parameters: int
    memory_gib_per_worker: float
    """Estimate: weights, gradients, optimiser, queue, the student's activations, views."""

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)


def plan_run(config: Config, shards: Shards, *, device: str) -> RunPlan:
    """Check teacher, student and a sample of the data by building them; say what the run will do.

    Args:
        config: the run.
        shards: its data.
        device: ``cpu`` or ``cuda``: where the workers will compute.

    Raises:
        PcdError: anything that would stop the run later.
    """
    _check_sample(shards, config.data.max_pixels)
    loaded = load_teacher(config.teacher)
    own_head = _own_head(config) if loaded.identity.head == "pca" else None
    fitted = own_head or _stand_in(config, loaded)
    method = build_method(config, loaded, fitted, device=torch.device("cpu"))
    teacher = {
        "arch": method.identity.arch,
        "source": method.identity.source,
        "licence": method.identity.licence,
        "head": method.identity.head,
        "sha256": "" if fitted is not own_head else method.identity.sha256,
    }
    return _plan_of(config, shards, method, teacher=teacher, device=device)


def _plan_of(
    config: Config, shards: Shards, method: Method, *, teacher: dict[str, str], device: str
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
    return RunPlan(
        images=shards.num_images,
        images_per_epoch=plan.images_per_epoch,
        epochs=config.train.epochs,
        steps=steps,
        steps_per_epoch=round(per_epoch, 2),
        global_batch_size=batch,
        batch_size_per_worker=config.train.batch_size_per_worker,
        num_workers=config.train.num_workers,
        device=device,
        peak_learning_rate=peak,
        final_learning_rate=peak * config.optim.final_lr_fraction,
        warmup_steps=round(config.optim.warmup_epochs * per_epoch, 2),
        queue_fill_steps=math.ceil(config.loss.queue_size / batch),
        chance_loss=round(chance_loss(config.loss.queue_size), 3),
        loss_implementation=method.settings.implementation,
        teacher=teacher,
        teacher_map=method.teacher_map,
        student_map=method.student_map,
        embedding_width=method.queue.negatives.shape[1],
        law_error=method.law_error,
        student_parameters=_parameters(method.student),
        backbone_parameters=_parameters(method.student.backbone),
        teacher_parameters=_parameters(method.teacher),
        memory_gib_per_worker=round(_memory_gib(config, method), 2),
    )


def activation_bytes(network: nn.Module, image_size_px: int) -> int:
    """Return the bytes of all layer outputs for one image: what a backward pass keeps."""
    total = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    was_training = network.training
    image = torch.zeros(1, image_size_px, image_size_px, 3, dtype=torch.uint8)
    with torch.no_grad():
        network.eval()(image)
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return total


def _own_head(config: Config) -> nn.Sequential | None:
    """Return the head that this run was begun with; None: it is new."""
    folder = RunFolder.of(config)
    if not checkpoint_steps(folder) or not storage.exists(folder.teacher_head):
        return None
    return head_from_state(safetensors.torch.load(storage.read_bytes(folder.teacher_head)))


def _stand_in(config: Config, loaded: LoadedTeacher) -> nn.Sequential | None:
    """Return a head of the fitted one's shape: fitting it is the run's own work."""
    if loaded.identity.head != "pca":
        return None
    channels = int(loaded.backbone.body.num_features)  # type: ignore[arg-type]
    return nn.Sequential(nn.Linear(channels, config.teacher.pca_dim)).eval()


def _check_sample(shards: Shards, max_pixels: int) -> None:
    sample = shards.index.slice(0, _SAMPLE_IMAGES).to_pylist()
    contents = read_image_bytes(
        [entry["uri"] for entry in sample],
        [entry["offset"] for entry in sample],
        [entry["size"] for entry in sample],
    )
    for entry, content in zip(sample, contents, strict=True):
        try:
            decode_rgb(content, max_pixels=max_pixels)
        except UnreadableImage as error:
            raise unreadable(entry["key"], entry["uri"], str(error)) from error


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _memory_gib(config: Config, method: Method) -> float:
    images = config.train.batch_size_per_worker // config.train.accumulation_steps
    size = config.augment.image_size_px
    copies = 2 + _OPTIMIZER_COPIES[config.optim.name]  # weights and gradients
    weights = 4 * (copies * _parameters(method.student) + _parameters(method.teacher))
    half = 0.5 if config.train.precision == "bf16" else 1.0
    activations = half * images * activation_bytes(method.student, size)
    queue = method.queue.negatives.numel() * 4
    views = 2 * config.train.batch_size_per_worker * size * size * 3 * 4
    return (weights + activations + queue + views) / 2**30
