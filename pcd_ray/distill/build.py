"""Config -> teacher, student, queue; the only file of this folder that knows Config."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.config import Config, HeadFitConfig, TeacherConfig, config_to_values
from pcd_ray.distill.backbones import (
    Backbone,
    WholeNetwork,
    build_backbone,
    build_whole,
    freeze_unused,
    is_known,
    map_shape,
)
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.fitted_head import ContrastiveHead, contrastive_head, pca_head
from pcd_ray.distill.grids import loss_grid
from pcd_ray.distill.heads import (
    MlpShape,
    head_from_state,
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
from pcd_ray.distill.networks import HEADS_UNKNOWN, Network
from pcd_ray.distill.spatial_adaptor import check_law
from pcd_ray.distill.step import Branch, DistillSettings
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher, TeacherIdentity
from pcd_ray.distill.teacher_parts import TeacherParts, headless_words, take_apart
from pcd_ray.distill.timm_heads import classifier_of, clip_projection, own_head
from pcd_ray.distill.tokens import has_own_vector
from pcd_ray.distill.weights import (
    load_backbone,
    read_weights,
    tensors_sha256,
)
from pcd_ray.errors import ConfigError, PcdError, WeightsError
from pcd_ray.seeds import derive_seed

FITTED_HEADS = ("pca", "contrastive")
"""Kinds of heads that a run fits when it begins."""


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """A teacher's networks before its head is settled."""

    backbone: Backbone
    head: nn.Sequential | None
    """The published head; None: the weights hold none."""
    predictor: MlpShape | None
    identity: TeacherIdentity
    options: TeacherConfig = field(default_factory=TeacherConfig)
    """What it was loaded by."""
    name: str = "teacher"
    """Its section of the configuration."""
    headless: str = ""
    """Which file holds the head that its own does not, where a fitted one stands in unasked."""


@dataclass(frozen=True, slots=True)
class Method:
    """Everything that a training step needs, on one device."""

    student: Student
    student_map: tuple[int, int, int]
    """C, H, W of the student's backbone map."""
    branches: tuple[Branch, ...]
    """One for each teacher, in the order of the student's heads."""


def load_teachers(config: Config) -> list[LoadedTeacher]:
    """Read all teachers' weights, in the order of the student's heads.

    Raises:
        PcdError: as `load_teacher`; what is wrong with the second one says so.
    """
    loaded = []
    for name, teacher in config.teachers.items():
        with blaming(name):
            loaded.append(load_teacher(teacher, name=name))
    return loaded


def load_teacher(teacher: TeacherConfig, *, name: str = "teacher") -> LoadedTeacher:
    """Read a teacher's weights and say what it is.

    Args:
        teacher: its options.
        name: its section of the configuration.

    Raises:
        ConfigError: an unknown architecture, or weights that are not given and not to be had.
        WeightsError: a file of another network, one with keys left over, or an unknown network.
    """
    if teacher.weights:
        network, parts = _load_file(teacher)
        licence = parts.licence
        if "." in teacher.arch:  # a tag says whose weights they are
            licence = licence or network.backbone.timm_licence
    else:
        network, parts = _load_from_timm(teacher), None
        licence = network.backbone.timm_licence
    backbone = network.backbone
    head, head_kind = _settle_head(teacher, network, parts)
    identity = TeacherIdentity(
        arch=backbone.name,
        source=storage.name_of(teacher.weights) if teacher.weights else f"timm {backbone.name}",
        licence=teacher.licence or licence or "unknown",
        head=head_kind,
    )
    predictor = parts.predictor if parts else None
    unasked = teacher.head == "auto" and head_kind != "published" and parts is not None
    headless = headless_words(parts) if parts and unasked else ""
    return LoadedTeacher(backbone, head, predictor, identity, teacher, name, headless)


def fit_pca_head(
    loaded: LoadedTeacher, batches: Iterable[Tensor], fit: HeadFitConfig
) -> nn.Sequential:
    """Fit the ``pca`` head on the teacher's own pixels of (B, S, S, 3) uint8 images."""
    with torch.inference_mode():
        pixels = [
            loaded.backbone(images).float().cpu().movedim(1, 3).flatten(0, 2) for images in batches
        ]
    return pca_head(torch.cat(pixels), dim=fit.dim, whiten=fit.whiten)


def fit_contrastive_head(
    loaded: LoadedTeacher,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    fit: HeadFitConfig,
    *,
    num_images: int,
    seed: int,
) -> ContrastiveHead:
    """Fit the ``contrastive`` head on the teacher's pooled features of views.

    Args:
        loaded: the teacher.
        batches: (B, S, S, 3) uint8 views, (B,) number of the view, (B,) number of the image; views
            from ``fit.views`` on are left out.
        fit: widths, steps and so on.
        num_images: images N, of each of which all views come.
        seed: root seed of the run.
    """
    features: Tensor | None = None  # (V, N, C)
    with torch.no_grad():
        for images, view, number in batches:
            pooled = loaded.backbone(images).float().mean((2, 3))  # (B, C)
            if features is None:
                features = pooled.new_zeros(fit.views, num_images, pooled.shape[1])
            kept = (view < fit.views).to(pooled.device)
            features[view.to(pooled.device)[kept], number.to(pooled.device)[kept]] = pooled[kept]
    assert features is not None
    return contrastive_head(
        features,
        hidden=fit.hidden,
        dim=fit.dim,
        temperature=fit.temperature,
        steps=fit.steps,
        seed=derive_seed(seed, "contrastive_head"),
    )


def stand_in_head(loaded: LoadedTeacher, fit: HeadFitConfig) -> nn.Sequential | None:
    """Return an untrained head of the fitted one's shape; None: nothing is to be fitted."""
    channels = int(loaded.backbone.body.num_features)  # type: ignore[arg-type]
    if loaded.identity.head == "pca":
        return nn.Sequential(nn.Linear(channels, fit.dim)).eval()
    if loaded.identity.head == "contrastive":
        layers = (nn.Linear(channels, fit.hidden), nn.BatchNorm1d(fit.hidden), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(fit.hidden, fit.dim)).eval()
    return None


def save_fitted_head(uri: str, head: nn.Sequential, config: Config, loaded: LoadedTeacher) -> None:
    """Store a fitted head with what it was fitted by."""
    metadata = {"fitted_by": fitted_by(config, loaded)}
    storage.write_bytes(uri, safetensors.torch.save(head.state_dict(), metadata=metadata))


def stored_head(uri: str, config: Config, loaded: LoadedTeacher) -> nn.Sequential | None:
    """Return the head that a run has fitted; None: there is none, or of other settings."""
    if not storage.exists(uri):
        return None
    file = read_weights(uri)
    if file.metadata.get("fitted_by") != fitted_by(config, loaded):
        return None
    return head_from_state(file.tensors)


def fitted_by(config: Config, loaded: LoadedTeacher) -> str:
    """Return all that a fitted head follows from besides the images."""
    return json.dumps(
        {
            "backbone_sha256": tensors_sha256(loaded.backbone),
            "recentred": loaded.backbone.recentred,
            "mean": (loaded.backbone.mean.flatten() / 255).tolist(),
            "std": (loaded.backbone.std.flatten() / 255).tolist(),
            "head": loaded.identity.head,
            "fit": config_to_values(loaded.options.fit),
            "augment": config_to_values(config.augment),
            "seed": config.run.seed,
        }
    )


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


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
    """Let errors of another teacher than the first say whose they are."""
    try:
        yield
    except PcdError as error:
        if name == "teacher":
            raise
        raise type(error)(f"{name} (for teacher.* read {name}.*): {error}") from error


def _load_file(teacher: TeacherConfig) -> tuple[WholeNetwork, TeacherParts]:
    """Return the network that the weights file fits, loaded, and the file's parts."""
    parts = take_apart(read_weights(teacher.weights))
    known = _network(teacher, parts)
    if parts.layout == "timm" and known != parts.network:
        parts = replace(parts, mean=None, std=None)  # what was guessed is of another network

    def loaded(*, pooled: bool) -> WholeNetwork:
        network = build_whole(
            known.timm_name,
            pooled=pooled,
            kwargs=known.kwargs | teacher.kwargs,
            mean=teacher.mean or parts.mean,
            std=teacher.std or parts.std,
        )
        load_backbone(network.backbone, parts.backbone, uri=teacher.weights)
        return network

    try:
        return loaded(pooled=True), parts
    except WeightsError as refusal:
        try:
            return loaded(pooled=False), parts
        except (ConfigError, WeightsError):
            raise refusal from None


def _load_from_timm(teacher: TeacherConfig) -> WholeNetwork:
    if not teacher.arch:
        raise ConfigError(
            "teacher.weights and teacher.arch are both empty; give a weights file, or the timm "
            "name of a network whose own weights timm can fetch"
        )
    return build_whole(
        teacher.arch, pretrained=True, kwargs=teacher.kwargs, mean=teacher.mean, std=teacher.std
    )


def _network(teacher: TeacherConfig, parts: TeacherParts) -> Network:
    """Return the file's network, or what ``teacher.arch`` says where the file leaves it open."""
    found = parts.network
    if found == HEADS_UNKNOWN and not (teacher.arch and "num_heads" in teacher.kwargs):
        raise WeightsError(
            f"{teacher.weights} is {found}; set teacher.arch=vit_small_patch16_224 and "
            "'teacher.kwargs={num_heads: 12}', or 6"
        )
    if not teacher.arch:
        if isinstance(found, str):
            released = parts.layout not in ("timm", "pcd_ray")
            kind = f" ({parts.layout})" if released else ""
            whole = "give the file as published, or " if released else ""
            raise WeightsError(
                f"{teacher.weights}{kind} does not say its network: {found}; {whole}set "
                "teacher.arch to the timm name"
            )
        return found
    given = Network(teacher.arch)
    if isinstance(found, str):
        return given
    if _untagged(found.timm_name) == _untagged(teacher.arch):  # a tag says whose weights they are
        return replace(found, timm_name=teacher.arch) if parts.layout == "timm" else found
    if parts.layout == "timm" or not is_known(teacher.arch):
        return given  # bare names fit relatives too: loading tells whether they fit this one
    kind = "" if parts.layout == "pcd_ray" else f" ({parts.layout})"
    raise WeightsError(
        f"{teacher.weights} holds a {found.timm_name}{kind}, but teacher.arch={teacher.arch}; set "
        f"teacher.arch={found.timm_name}, or leave it empty"
    )


def _untagged(timm_name: str) -> str:
    return timm_name.partition(".")[0]


def _settle_head(
    teacher: TeacherConfig, network: WholeNetwork, parts: TeacherParts | None
) -> tuple[nn.Sequential | None, str]:
    """Return the published head, where there is one, and the kind to use; settle the map too."""
    backbone, body = network.backbone, network.backbone.body
    head = parts.head if parts else None
    projection = None
    if head is None and network.pooling in _READ_POOLINGS:
        classifier = classifier_of(body, parts.backbone) if parts else network.classifier
        projection = clip_projection(backbone.name, classifier)
    kind: str = teacher.head
    if kind == "auto":
        kind = "published" if head is not None or projection is not None else "pca"
    # heads in our own layout were trained on the map's mean
    on_own = network.pooling == "token" if head is None else parts and parts.layout != "pcd_ray"
    usual = kind == "published" and bool(on_own) and has_own_vector(body)
    if teacher.tokens == "recentred" or (teacher.tokens == "auto" and usual):
        backbone.recentre()
    if kind == "published" and head is None and network.pooling in _READ_POOLINGS:
        head = own_head(body, projection, recentred=backbone.recentred)
    if kind == "published" and head is None:
        advice = headless_words(parts) if parts else "use teacher.head=pca, contrastive or none"
        raise WeightsError(
            f"teacher.head=published, but {teacher.weights or teacher.arch} holds no head: {advice}"
        )
    return head, kind


_READ_POOLINGS = ("", "avg", "token")  # other poolings of timm have layers that no rule adapts


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
