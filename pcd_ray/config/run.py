"""Sections ``run`` and ``export``: where a run lives, and the student file that leaves it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require, require_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class NodesConfig:
    """Nodes that the autoscaler may bring, all alike."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    count: int
    """How many there may be at a time."""
    cpus: float
    """CPUs that each has for Ray."""
    gpus: float = 0.0
    """GPUs that each has."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels that each has."""

    def __post_init__(self) -> None:
        require(self.count > 0, "run.autoscaled_nodes.count", self.count, "> 0")
        require(self.cpus >= 0, "run.autoscaled_nodes.cpus", self.cpus, ">= 0")
        require(self.gpus >= 0, "run.autoscaled_nodes.gpus", self.gpus, ">= 0")
        require_labels(self.labels, "run.autoscaled_nodes.labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    name: str = "pcd"
    """Name of the run; its output folder is ``root/name``. The same name resumes the same run."""
    root: str = "runs"
    """Folder or bucket prefix that holds runs; shared by all nodes of a cluster."""
    seed: int = 0
    """Root of every random draw: order of images, views, initial weights, initial queue."""
    allow_changes: bool = False
    """Resume although a setting that matters differs from the stored run's."""
    autoscaled_nodes: tuple[NodesConfig, ...] = ()
    """What the cluster's autoscaler may bring, e.g. on Kubernetes: ``[{count: 2, cpus: 48, gpus: 4,
    labels: {pool: train}}]``. Empty: what the cluster launcher's file on the head says."""
    wait_for_nodes_s: float = 1800.0
    """Longest wait for nodes that the autoscaler will bring."""

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and "/" not in self.name
        require(plain, "run.name", self.name, "a plain name")
        require(self.wait_for_nodes_s > 0, "run.wait_for_nodes_s", self.wait_for_nodes_s, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The student file that others load."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    path: str = ""
    """File to write; empty: ``exported/BACKBONE.safetensors`` in the run's folder."""
    keep_neck: bool = False
    """Write the MHSA neck too, to a second file beside it."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """The student's moving average, the student itself, or the first that there is (``auto``)."""
