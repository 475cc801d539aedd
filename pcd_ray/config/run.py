"""Sections ``run`` and ``export``: where a run lives, and the student file that leaves it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


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

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and "/" not in self.name
        require(plain, "run.name", self.name, "a plain name")


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
