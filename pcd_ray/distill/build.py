"""Config -> teacher, student, queue; the only file of this folder that knows Config."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.config import Config, TeacherConfig
from pcd_ray.distill.backbones import Backbone, build_backbone, freeze_unused, map_shape
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.heads import MlpShape, mirrored_head, pca_head, shape_of
from pcd_ray.distill.loss import choose_implementation
from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.spatial_adaptor import check_law
from pcd_ray.distill.step import DistillSettings
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher, TeacherIdentity
from pcd_ray.distill.weights import (
    METADATA_KEY,
    RELEASES,
    TeacherParts,
    WeightsFile,
    load_backbone,
    read_weights,
    take_apart,
    tensors_sha256,
)
from pcd_ray.errors import ConfigError, WeightsError
from pcd_ray.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """A teacher's networks before its head is settled."""

    backbone: Backbone
    head: nn.Sequential | None
    """The published head; None: the weights hold none."""
    predictor: MlpShape | None
    identity: TeacherIdentity


@dataclass(frozen=True, slots=True)
class Method:
    """Everything that a training step needs, on one device."""

    student: Student
    teacher: FrozenTeacher
    queue: FeatureQueue
    settings: DistillSettings
    identity: TeacherIdentity
    law_error: float
    """Relative deviation from SpatialAdaptor's law, in float64."""
    student_map: tuple[int, int, int]
    """C, H, W of the student's backbone map."""
    teacher_map: tuple[int, int, int]
    """C, H, W of the teacher's backbone map."""


def load_teacher(teacher: TeacherConfig) -> LoadedTeacher:
    """Read a teacher's weights and say what it is.

    Raises:
        ConfigError: an unknown architecture, or weights that are not given and not to be had.
        WeightsError: a file of another network, or one with keys left over.
    """
    release = RELEASES.get(teacher.arch)
    if release is not None and not teacher.weights:
        raise ConfigError(
            f"teacher.weights is empty, but teacher.arch={teacher.arch} is a published file; "
            "give its path or URI"
        )
    file = read_weights(teacher.weights) if teacher.weights else None
    about = _about(file) if file else {}
    backbone = build_backbone(
        release.timm_name if release else teacher.arch,
        pretrained=file is None,
        kwargs=teacher.kwargs,
        mean=teacher.mean or about.get("mean"),
        std=teacher.std or about.get("std"),
    )
    parts = _load_file(file, backbone, teacher.arch) if file else None
    known_licence = release.licence if release else about.get("licence")
    if file is None:  # timm speaks of its own weights; a local file may hold others
        known_licence = backbone.timm_licence
    return LoadedTeacher(
        backbone,
        parts.head if parts else None,
        parts.predictor if parts else None,
        TeacherIdentity(
            arch=backbone.name,
            source=storage.name_of(teacher.weights) if file else f"timm {backbone.name}",
            licence=teacher.licence or known_licence or "unknown",
            head=_head_kind(teacher, parts),
        ),
    )


def fit_head(
    loaded: LoadedTeacher, batches: Iterable[Tensor], *, dim: int, whiten: float
) -> nn.Sequential:
    """Fit the ``pca`` head on the teacher's own pixels of (B, S, S, 3) uint8 images."""
    with torch.inference_mode():
        pixels = [
            loaded.backbone(images).float().cpu().movedim(1, 3).flatten(0, 2) for images in batches
        ]
    return pca_head(torch.cat(pixels), dim=dim, whiten=whiten)


def build_student(config: Config, shapes: list[MlpShape]) -> Student:
    """Return the untrained student: the same weights for the same ``run.seed``."""
    student = config.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.run.seed, "student"))
        backbone = build_backbone(student.backbone, kwargs=student.kwargs)
        channels = map_shape(backbone, config.augment.image_size_px)[0]
        freeze_unused(backbone, config.augment.image_size_px)
        neck = MhsaNeck(channels, depth=student.mhsa.depth, heads=student.mhsa.heads)
        built = Student(backbone, neck, mirrored_head(channels, shapes))
    if config.train.channels_last:
        built.backbone.use_channels_last()
    return built


def build_method(
    config: Config, loaded: LoadedTeacher, fitted: nn.Sequential | None, *, device: torch.device
) -> Method:
    """Put teacher, student and queue together and check the law on the real teacher.

    Args:
        config: the run.
        loaded: from `load_teacher`.
        fitted: the head from `fit_head` where the identity says ``pca``, else None.
        device: where all of it computes.

    Raises:
        WeightsError: the head breaks the law or does not fit the backbone.
        ConfigError: maps or widths that do not fit together.
    """
    size = config.augment.image_size_px
    head = {"published": loaded.head, "pca": fitted, "none": None}[loaded.identity.head]
    teacher = FrozenTeacher(loaded.backbone, head, rule=config.teacher.adaptor.rule)
    teacher_map = map_shape(teacher.backbone, size)
    error = _check_head(teacher, teacher_map, size)
    teacher.to(device)
    if config.train.channels_last and device.type == "cuda":
        # on CPUs depthwise convolutions in inference are far slower with channels innermost
        teacher.backbone.use_channels_last()
    width = teacher.width(teacher_map[0])
    student = build_student(config, _student_shapes(config, loaded, head, width))
    student_map = map_shape(student.backbone, size)
    _check_grids(student_map, teacher_map)
    settings = DistillSettings(
        temperature=config.loss.temperature,
        implementation=choose_implementation(
            config.loss.implementation, width=width, device=device
        ),
        pairing=config.pairing.kind,
        pairing_radius=config.pairing.radius,
        autocast=torch.bfloat16 if config.train.precision == "bf16" else None,
    )
    queue_seed = derive_seed(config.run.seed, "queue")
    return Method(
        student=student.to(device),
        teacher=teacher,
        queue=FeatureQueue(config.loss.queue_size, width, seed=queue_seed, device=device),
        settings=settings,
        identity=replace(loaded.identity, sha256=tensors_sha256(teacher)),
        law_error=error,
        student_map=student_map,
        teacher_map=teacher_map,
    )


def _about(file: WeightsFile) -> dict[str, Any]:
    """Return what a file says of itself: a teacher of ours, or a student that we exported."""
    said = file.metadata
    if METADATA_KEY in said:
        return dict(said[METADATA_KEY])
    if not str(said.get("made_by", "")).startswith("pcd_ray"):
        return {}  # other programs write these entries in forms of their own
    about: dict[str, Any] = {name: json.loads(said[name]) for name in ("mean", "std")}
    return about | {"licence": said.get("teacher_licence")}


def _load_file(file: WeightsFile, backbone: Backbone, arch: str) -> TeacherParts:
    stated = file.metadata.get(METADATA_KEY, {}).get("arch", backbone.name)
    if stated != backbone.name:
        raise WeightsError(f"{file.uri} holds a {stated}; set teacher.arch={stated}")
    parts = take_apart(file)
    if (parts.layout == "mocov3") != (arch in RELEASES):
        fix = "mocov3_resnet50" if parts.layout == "mocov3" else backbone.name
        found = "as MoCo v3 publishes them" if parts.layout == "mocov3" else "of a bare backbone"
        raise WeightsError(
            f"{file.uri} holds weights {found}, but teacher.arch={arch}; set teacher.arch={fix}"
        )
    load_backbone(backbone, parts.backbone, uri=file.uri)
    return parts


def _head_kind(teacher: TeacherConfig, parts: TeacherParts | None) -> str:
    published = parts is not None and parts.head is not None
    if teacher.head == "published" and not published:
        raise WeightsError(
            f"teacher.head=published, but {teacher.weights or teacher.arch} holds no head; "
            "use 'pca' or 'none'"
        )
    if teacher.head == "auto":
        return "published" if published else "pca"
    return teacher.head


def _student_shapes(
    config: Config, loaded: LoadedTeacher, head: nn.Sequential | None, width: int
) -> list[MlpShape]:
    if loaded.identity.head == "published" and head is not None:
        shapes = [shape_of(head)]
        if config.student.predictor and loaded.predictor is not None:
            shapes.append(loaded.predictor)
        return shapes
    hidden = (config.student.head_hidden,) if config.student.head_hidden else ()
    return [MlpShape((*hidden, width))]


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


def _check_grids(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
    if teacher[1] % student[1] or teacher[2] % student[2]:
        raise ConfigError(
            f"the teacher's map is {teacher[1]} x {teacher[2]} and the student's {student[1]} x "
            f"{student[2]}: the teacher's must be a whole multiple, so that averaging keeps its "
            "mean; change augment.image_size_px or student.kwargs (output_stride)"
        )
