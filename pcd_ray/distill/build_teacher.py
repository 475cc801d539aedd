"""Options of a teacher -> its networks, loaded, and what they are."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from pcd_ray import storage
from pcd_ray.config import Config, TeacherConfig
from pcd_ray.distill.backbones import (
    Backbone,
    UninitializedParameters,
    WholeNetwork,
    build_whole,
    is_known,
)
from pcd_ray.distill.conversions import EFFICIENTNET_NAMES
from pcd_ray.distill.heads import MlpShape
from pcd_ray.distill.networks import HEADS_UNKNOWN, Network
from pcd_ray.distill.teacher import TeacherIdentity
from pcd_ray.distill.teacher_parts import (
    OTHER_HEADS,
    TeacherParts,
    arch_advice,
    headless_words,
    take_apart,
)
from pcd_ray.distill.timm_heads import classifier_of, clip_projection, own_head
from pcd_ray.distill.tokens import has_own_vector
from pcd_ray.distill.weights import load_backbone, read_weights
from pcd_ray.errors import ConfigError, PcdError, WeightsError

_BARE = ("timm", EFFICIENTNET_NAMES)
"""Layouts of a backbone alone."""
UNKNOWN_LICENSE = "unknown"
"""Of weights that neither say their license nor are given one."""


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
    notes: tuple[str, ...] = ()
    """What was opened, stripped and renamed before its weights could be read."""


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
        licence=teacher.licence or licence or UNKNOWN_LICENSE,
        head=head_kind,
    )
    predictor = parts.predictor if parts else None
    unasked = teacher.head == "auto" and head_kind != "published" and parts is not None
    headless = headless_words(parts) if parts and unasked else ""
    notes = parts.notes if parts else ()
    return LoadedTeacher(backbone, head, predictor, identity, teacher, name, headless, notes)


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
    if parts.tap:
        raise WeightsError(
            f"{teacher.weights} holds a student that was trained up to stage {parts.tap} of "
            f"{parts.network} alone (student.output_stride); give another file"
        )
    known = _network(teacher, parts)
    if parts.layout in _BARE and known != parts.network:
        parts = replace(parts, mean=None, std=None)  # what was guessed is of another network

    def loaded(*, pooled: bool) -> WholeNetwork:
        with UninitializedParameters():
            network = build_whole(
                known.timm_name,
                pooled=pooled,
                kwargs=known.kwargs | teacher.kwargs,
                mean=teacher.mean or parts.mean,
                std=teacher.std or parts.std,
            )
        state = parts.backbone
        if all(key.startswith(parts.root) for key in network.backbone.body.state_dict()):
            state = {f"{parts.root}{key}": value for key, value in state.items()}
        try:
            load_backbone(network.backbone, state, uri=teacher.weights, assign=True)
        except WeightsError as error:
            also = f"; the file {parts.foreign}" if parts.foreign else ""
            raise WeightsError(f"{error}{also}") from error
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
            f"{teacher.weights} is {found}; set teacher.arch=vit_small_patch16_224 (or vit_tiny_"
            "patch16_224) and 'teacher.kwargs={num_heads: 12}', or 6 (tiny: 3)"
        )
    if not teacher.arch:
        if parts.foreign:
            raise WeightsError(f"{teacher.weights} {parts.foreign}")
        if isinstance(found, str):
            released = parts.layout not in (*_BARE, "pcd_ray")
            kind = f" ({parts.layout})" if released else ""
            whole = "give the file as published, or " if released else ""
            raise WeightsError(
                f"{teacher.weights}{kind} does not say its network: {found}; {whole}"
                f"{arch_advice(found)}"
            )
        return found
    given = Network(teacher.arch)
    if isinstance(found, str):
        return given
    if _untagged(found.timm_name) == _untagged(teacher.arch):  # a tag says whose weights they are
        return replace(found, timm_name=teacher.arch) if parts.layout in _BARE else found
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
        advice = headless_words(parts) if parts else OTHER_HEADS
        raise WeightsError(
            f"teacher.head=published, but {teacher.weights or teacher.arch} holds no head: {advice}"
        )
    return head, kind


_READ_POOLINGS = ("", "avg", "token")  # other poolings of timm have layers that no rule adapts
