"""Config -> teacher, student, queue; of this folder the build_* files alone know options."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pcd_ray.config import Config
from pcd_ray.distill.backbones import build_backbone, freeze_unused, map_shape
from pcd_ray.distill.build_head import FITTED_HEADS
from pcd_ray.distill.build_teacher import LoadedTeacher, blaming
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.grids import loss_grid
from pcd_ray.distill.heads import (
    MlpShape,
    kept_head,
    linear_widths,
    mirrored_head,
    narrowed,
    output_width,
    random_projection,
    shape_of,
)
from pcd_ray.distill.loss import choose_implementation
from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.spatial_adaptor import check_law
from pcd_ray.distill.step import Branch, DistillSettings
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.errors import WeightsError
from pcd_ray.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Method:
    """Everything that a training step needs, on one device."""

    student: Student
    student_map: tuple[int, int, int]
    """C, H, W of the student's backbone map."""
    branches: tuple[Branch, ...]
    """One for each teacher, in the order of the student's heads."""


def build_student(config: Config, heads: Sequence[list[MlpShape]]) -> Student:
    """Return the untrained student: the same weights for the same ``run.seed``.

    Args:
        config: the run.
        heads: for each teacher the shapes of the MLPs of its head.
    """
    student = config.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.run.seed, "student"))
        backbone = build_backbone(
            student.backbone, kwargs=student.kwargs, output_stride=student.output_stride
        )
        channels = map_shape(backbone, config.augment.image_size_px)[0]
        freeze_unused(backbone, config.augment.image_size_px)
        neck = MhsaNeck(channels, depth=student.mhsa.depth, heads=student.mhsa.heads)
        built = Student(backbone, neck, [mirrored_head(channels, shapes) for shapes in heads])
    if config.train.channels_last:
        built.backbone.use_channels_last()
    return built


def build_method(
    config: Config,
    teachers: Sequence[tuple[LoadedTeacher, nn.Sequential | None]],
    *,
    device: torch.device,
) -> Method:
    """Put teachers, student and queues together and check the law on the real teachers.

    Args:
        config: the run.
        teachers: each from `load_teacher`, with the fitted head where its identity says one of
            `FITTED_HEADS`, else None.
        device: where all of it computes.

    Raises:
        WeightsError: a head breaks the law or does not fit its backbone.
        ConfigError: maps or widths that do not fit together.
    """
    size = config.augment.image_size_px
    frozen = []
    for loaded, fitted in teachers:
        with blaming(loaded.name):
            frozen.append(_frozen(config, loaded, fitted))
    student = build_student(config, [each.student_shapes for each in frozen])
    student_map = map_shape(student.backbone, size)
    branches = []
    for (loaded, _), each in zip(teachers, frozen, strict=True):
        with blaming(loaded.name):
            branches.append(_branch(config, loaded, each, student_map, device=device))
    return Method(student.to(device), student_map, tuple(branches))


@dataclass(frozen=True, slots=True)
class _Frozen:
    """A teacher whose head is settled, and the head that the student needs for it."""

    teacher: FrozenTeacher
    map: tuple[int, int, int]
    width: int
    law_error: float
    student_shapes: list[MlpShape]


def _frozen(config: Config, loaded: LoadedTeacher, fitted: nn.Sequential | None) -> _Frozen:
    size = config.augment.image_size_px
    adaptor = loaded.options.adaptor
    whole = fitted if loaded.identity.head in FITTED_HEADS else loaded.head
    kept = None
    if whole is not None and loaded.identity.head != "none":
        kept = kept_head(whole, layers=adaptor.layers, final_norm=adaptor.final_norm)
    teacher_map = map_shape(loaded.backbone, size)
    teacher = FrozenTeacher(
        loaded.backbone,
        _projected(kept, config, loaded, teacher_map[0]),
        rule=adaptor.rule,
        gate_window=adaptor.gate_window if adaptor.gate_mean == "window" else 0,
    )
    error = _check_head(teacher, teacher_map, size)
    width = teacher.width(teacher_map[0])
    shapes = _student_shapes(config, loaded, kept, width)
    return _Frozen(teacher, teacher_map, width, error, shapes)


def _branch(
    config: Config,
    loaded: LoadedTeacher,
    frozen: _Frozen,
    student_map: tuple[int, int, int],
    *,
    device: torch.device,
) -> Branch:
    if loaded.options.cache.views:  # it is never run: it stays off the device
        teacher = frozen.teacher
    else:
        teacher = on_device(frozen.teacher, config, device)
    mse = config.loss.kind == "mse"
    settings = DistillSettings(
        kind=config.loss.kind,
        temperature=config.loss.temperature,
        implementation=choose_implementation(
            "plain" if mse else config.loss.implementation, width=frozen.width, device=device
        ),
        pairing=config.pairing.kind,
        pairing_radius=config.pairing.radius,
        autocast=autocast_dtype(config),
        grid=loss_grid(student_map[1:], frozen.map[1:], rule=config.student.grid),
        grid_rule=config.student.grid,
    )
    consumer = ("queue",) if loaded.name == "teacher" else ("queue", loaded.name)
    seed = derive_seed(config.run.seed, *consumer)
    queue = None
    if not mse:
        queue = FeatureQueue(config.loss.queue_size, frozen.width, seed=seed, device=device)
    return Branch(
        name=loaded.name,
        teacher=teacher,
        queue=queue,
        settings=settings,
        weight=loaded.options.weight,
        identity=replace(loaded.identity, sha256=tensors_sha256(teacher)),
        law_error=frozen.law_error,
        teacher_map=frozen.map,
    )


def adapted_teacher(
    config: Config, loaded: LoadedTeacher, fitted: nn.Sequential | None
) -> FrozenTeacher:
    """Return a teacher alone, as `build_method` would; arguments as there.

    Raises:
        WeightsError: its head breaks the law or does not fit its backbone.
    """
    return _frozen(config, loaded, fitted).teacher


def on_device(teacher: FrozenTeacher, config: Config, device: torch.device) -> FrozenTeacher:
    """Move a teacher to where it computes."""
    teacher = teacher.to(device)
    if config.train.channels_last and device.type == "cuda":
        # on CPUs depthwise convolutions in inference are far slower with channels innermost
        teacher.backbone.use_channels_last()
    return teacher


def autocast_dtype(config: Config) -> torch.dtype | None:
    """Return the data type of the networks' matrix products; None: as the weights are."""
    return torch.bfloat16 if config.train.precision == "bf16" else None


def _projected(
    head: nn.Sequential | None, config: Config, loaded: LoadedTeacher, channels: int
) -> nn.Sequential | None:
    """Return a head followed by the fixed projection, where one is asked for."""
    dim = loaded.options.projection_dim
    if not dim:
        return head
    layers = nn.Sequential() if head is None else head
    seed = derive_seed(config.run.seed, "projection")
    projection = random_projection(output_width(layers, channels), dim, seed=seed)
    return nn.Sequential(*layers, projection).eval()


def _student_shapes(
    config: Config, loaded: LoadedTeacher, head: nn.Sequential | None, width: int
) -> list[MlpShape]:
    student, limit = config.student, loaded.options.projection_dim
    projector, predictor = MlpShape((width,)), None
    mirrored = loaded.identity.head in ("published", "contrastive")
    if mirrored and head is not None and linear_widths(head):
        projector = narrowed(shape_of(head), width, limit=limit)
        if loaded.predictor is not None:
            predictor = narrowed(loaded.predictor, width, limit=limit)
    if student.head_hidden:
        projector = projector.with_hidden(student.head_hidden)
    if student.head_norm != "mirror":
        projector = replace(projector, final_norm=student.head_norm == "on")
    if student.predictor_hidden:
        predictor = (predictor or MlpShape((width,))).with_hidden(student.predictor_hidden)
    return [projector, predictor] if student.predictor and predictor else [projector]


def _check_head(teacher: FrozenTeacher, shape: tuple[int, int, int], size: int) -> float:
    first = next((m for m in teacher.adaptor.head if isinstance(m, nn.Linear)), None)
    if first is not None and first.in_features != shape[0]:
        raise WeightsError(
            f"the head takes {first.in_features} channels but the backbone {teacher.backbone.name} "
            f"gives {shape[0]}; give the head of this backbone"
        )
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, size, size, 3), generator=random, dtype=torch.uint8)
    with torch.no_grad():
        return check_law(teacher.adaptor, teacher.backbone(images))
