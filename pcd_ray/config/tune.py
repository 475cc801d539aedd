"""``tune``: a search over other options, a training run for each trial."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """What ``pcd-ray tune`` varies, how it chooses, and when it stops a trial [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    space: dict[str, Any] = field(default_factory=dict)
    """Options and where their values come from: ``{loss.temperature: {log: [0.03, 0.5]}}``.
    ``uniform`` and ``log`` take two ends (whole numbers where the option takes them; with
    ``uniform`` a ``step`` if wanted), ``choice`` a list."""
    space_function: str = ""
    """``FILE.py:NAME`` or ``MODULE:NAME`` of a function instead of ``space``, for spaces with
    conditions: it is given an Optuna trial, calls ``trial.suggest_*`` with options' names, and may
    return further options as a mapping. Asked again it must ask for and return the same."""
    trials: int = 20
    """Trials in all; a sweep that is finished goes on when it is given more."""
    metric: Literal["knn_top1", "segmentation_miou"] = "knn_top1"
    """What is to be high, in percent: kNN on ``eval.knn_test`` or the validation mIoU of the linear
    probe on ``eval.segmentation``. Never the loss, which temperature and queue size change."""
    cost: Literal["none", "training_s", "parameters"] = "none"
    """What is to be low as well: seconds in training steps, or the backbone's parameters. Then the
    sweep looks for the best trade-offs, not for one trial."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How values are chosen: Optuna's tree-structured Parzen estimator, or at random."""
    random_trials: int = 8
    """``tpe``: trials at random before it begins."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Which trials are stopped early: those not among the best 1 / ``reduction_factor`` at an epoch
    (``asha``), those below the median of the others' running means (``median``), or none."""
    grace_epochs: int = 1
    """Epochs that every trial may train for."""
    reduction_factor: float = 3.0
    """``asha``: the rungs' epochs grow by it, and 1 / this of the trials go on; > 1."""
    max_concurrent: int = 0
    """Trials at a time; 0: as many as the cluster's GPUs hold, one on CPUs."""
    own_values_first: bool = True
    """The first trial takes the values that the configuration itself has, as far as ``space``
    holds them."""
    storage: str = ""
    """Optuna storage URL of the study, e.g. ``postgresql://...``; empty: SQLite, ``study.db`` in
    the sweep's folder."""

    def __post_init__(self) -> None:
        require(self.trials > 0, "tune.trials", self.trials, "> 0")
        require(self.random_trials > 0, "tune.random_trials", self.random_trials, "> 0")
        require(self.grace_epochs > 0, "tune.grace_epochs", self.grace_epochs, "> 0")
        require(self.reduction_factor > 1, "tune.reduction_factor", self.reduction_factor, "> 1")
        require(self.max_concurrent >= 0, "tune.max_concurrent", self.max_concurrent, ">= 0")
        require(
            not (self.space and self.space_function),
            "tune.space_function",
            self.space_function,
            "empty where tune.space is given",
        )
        require(
            not self.space_function or ":" in self.space_function,
            "tune.space_function",
            self.space_function,
            "FILE.py:NAME or MODULE:NAME",
        )
