"""The sections put together, and the dotted names of their options."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require
from pcd_ray.config.data import AugmentConfig, DataConfig, SourceConfig
from pcd_ray.config.eval import EvalConfig
from pcd_ray.config.loss import LossConfig, PairingConfig
from pcd_ray.config.run import ExportConfig, RunConfig
from pcd_ray.config.scale import ScaleConfig
from pcd_ray.config.student import StudentConfig
from pcd_ray.config.teacher import TeacherConfig
from pcd_ray.config.train import OptimConfig, TrainConfig
from pcd_ray.config.tune import TuneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Views."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen network."""
    teacher_2: TeacherConfig | None = None
    """A second frozen network, with a head of the student's, a queue and a weight of its own; the
    losses are added up. None: one teacher. [ours]"""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The network that learns."""
    pairing: PairingConfig = field(default_factory=PairingConfig)
    """Positives."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss and its negatives."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop and workers."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Judging."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The student file."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """A search over other options."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Machines that the plan is worked out for."""

    def __post_init__(self) -> None:
        require(
            self.loss.kind != "image" or self.pairing.kind != "cross_view_geometric",
            "pairing.kind",
            self.pairing.kind,
            "same_view (one crop) or cross_view_index (two) with loss.kind=image, which pools "
            "positions instead of pairing them",
        )
        self._check_that_the_best_are_known()
        views = self.teacher.cache.views
        require(
            self.teacher_2 is None or self.teacher_2.cache.views == views,
            "teacher_2.cache.views",
            self.teacher_2 and self.teacher_2.cache.views,
            f"{views} as teacher.cache.views is, since both teachers see the same views: the maps "
            "of both are stored or of neither",
        )

    def _check_that_the_best_are_known(self) -> None:
        by_knn = self.train.keep_best_by == "knn_top1"
        evaluation = self.eval
        knn_every = evaluation.every_epochs if evaluation.knn_train else 0
        every = knn_every if by_knn else evaluation.probe_every_epochs
        require(
            not self.train.keep_best or every > 0,
            "train.keep_best",
            self.train.keep_best,
            f"0 without a score while training: train.keep_best_by={self.train.keep_best_by} needs "
            + ("eval.every_epochs and eval.knn_train" if by_knn else "eval.probe_every_epochs"),
        )

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that there are, by the names of their sections."""
        both = {"teacher": self.teacher, "teacher_2": self.teacher_2}
        return {name: teacher for name, teacher in both.items() if teacher is not None}


def option_names(kind: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every option."""
    for item in dataclasses.fields(kind):
        section = _section(item.type)
        if section is not None:
            yield from option_names(section, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def option_value(config: Config, name: str) -> Any:
    """Return the value of a dotted option name; None in a section that is not given."""
    value: Any = config
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def takes_text(name: str) -> bool:
    """Say whether what stands at a dotted name is text: an option, or a part of one.

    It is at ``run.name``, at ``train.node_labels.pool``, at ``data.sources`` and each of its items
    (a URI), and at the choices of a text option in ``tune.space``.
    """
    searched = re.fullmatch(r"tune\.space\.(.+)\.choice\.\d+", name)
    kind: Any = Config
    for part in (searched[1] if searched else name).split("."):
        kind = _part(kind, part)
    return _is_text(kind)


def _part(kind: Any, name: str) -> Any:
    """Return the type of a section's option, a mapping's value or a list's item; None: unknown."""
    section = _section(kind)
    if section is not None:
        return {item.name: item.type for item in dataclasses.fields(section)}.get(name)
    return {dict: get_args(kind)[-1:], tuple: get_args(kind)}.get(get_origin(kind), (None,))[0]


def _is_text(kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(map(_is_text, get_args(kind)))
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind in (str, SourceConfig, tuple[SourceConfig, ...])  # a source may be its URI alone


def _section(kind: Any) -> Any:
    """Return the dataclass of a section, one that may be left out included; None: an option."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((k for k in kinds if dataclasses.is_dataclass(k)), None)
