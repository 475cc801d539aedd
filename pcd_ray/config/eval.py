"""Section ``eval``: how a student is judged."""

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require
from pcd_ray.config.eval_tasks import DetectConfig, LinearConfig, SegmentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How a student is judged; labels are used here alone."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    every_epochs: int = 0
    """Epochs between kNN evaluations while training; 0: at the end alone."""
    probe_every_epochs: int = 0
    """Epochs between linear probes on ``segmentation``'s validation split while training, minutes
    each on a CPU; 0: at the end alone."""
    knn_train: str = ""
    """Labelled folder (class subfolders), packed shards or list file whose images vote, and which
    the linear probe trains on; empty: neither."""
    knn_test: str = ""
    """Labelled images of the same kinds that are classified; where it is ``knn_train`` itself, each
    image by all others (leave one out), which looks at no test image."""
    knn_k: int = 20
    """Neighbours that vote while a run trains and at its end, each with weight exp(cosine / 0.07);
    one neighbour is reported too."""
    knn_ks: tuple[int, ...] = ()
    """Numbers of neighbours of ``pcd-ray eval knn``; empty: 1, 10, 20, 100 and 200, as far as there
    are images that vote."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe of ``pcd-ray eval linear``."""
    segmentation: str = ""
    """Labelled segmentation set, laid out as ``eval.segment.preset`` says, a folder with images/,
    masks/ (PNG), classes.txt, train.txt, val.txt (and test.txt) by default: a linear probe on the
    frozen map is trained at the end of the run; empty: none."""
    segmentation_size_px: int = 0
    """Height to which its images are resized; 0 keeps theirs."""
    image_size_px: int = 0
    """Side of the centre crop for kNN; 0 takes ``augment.image_size_px``."""
    images_per_forward: int = 64
    """Images per forward pass of an evaluation."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    """Detection and instance segmentation."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    """Semantic segmentation."""
    references: str = ""
    """Folder in which runs share the scores of networks that training does not change, the teacher
    and the untrained student; empty: each run measures its own."""
    pictures: bool = True
    """Draw what networks make of images when a run is finished: minutes on a CPU."""
    seeds: int = 1
    """Seeds with which ``pcd-ray eval`` repeats what it trains to judge; kNN draws nothing."""
    out: str = ""
    """Folder of ``pcd-ray eval``; empty: ``eval`` in the first run judged, else in ``run.root``."""
    pixel: tuple[float, float] = (0.5, 0.5)
    """The place that pictures ask about (what resembles it, attends to it): shares of an image's
    width and height in [0, 1], from the left and the top."""

    def __post_init__(self) -> None:
        require(
            all(0 <= share <= 1 for share in self.pixel),
            "eval.pixel",
            list(self.pixel),
            "two shares in [0, 1]",
        )
        require(self.every_epochs >= 0, "eval.every_epochs", self.every_epochs, ">= 0")
        require(
            self.probe_every_epochs >= 0, "eval.probe_every_epochs", self.probe_every_epochs, ">= 0"
        )
        require(
            not self.probe_every_epochs or bool(self.segmentation),
            "eval.probe_every_epochs",
            self.probe_every_epochs,
            "0 where eval.segmentation is empty",
        )
        require(self.seeds > 0, "eval.seeds", self.seeds, "> 0")
        require(self.knn_k > 0, "eval.knn_k", self.knn_k, "> 0")
        ks = self.knn_ks
        require(
            min(ks, default=1) > 0 and len(set(ks)) == len(ks),
            "eval.knn_ks",
            ks,
            "different numbers > 0",
        )
        require(self.image_size_px >= 0, "eval.image_size_px", self.image_size_px, ">= 0")
        require(
            self.segmentation_size_px >= 0,
            "eval.segmentation_size_px",
            self.segmentation_size_px,
            ">= 0",
        )
        require(
            self.images_per_forward > 0, "eval.images_per_forward", self.images_per_forward, "> 0"
        )
        require(
            bool(self.knn_train) == bool(self.knn_test),
            "eval.knn_test",
            self.knn_test,
            "given together with eval.knn_train",
        )
