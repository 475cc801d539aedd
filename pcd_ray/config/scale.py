"""Section ``scale``: what the plan of ``--dry-run`` assumes of machines."""

from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Machines that a run is worked out for. [ours]: training reads none of it."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    images_per_s_per_worker: float = 500.0
    """Images per second that one worker trains, data aside. An assumption, for no GPU has been
    measured: give ``throughput/images_per_s`` of a short run, divided by its workers."""
    cpu_ms_per_image: float = 0.0
    """CPU time of decoding and augmenting one image; 0 measures it on a sample, where the plan is
    made."""
    network_gbit_per_s: float = 40.0
    """Bandwidth of a node."""
    workers_per_node: int = 4
    """Workers (GPUs) of a node."""
    data_node_cores: int = 32
    """Cores of a node that makes views."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "cpu_ms_per_image":
                require(value >= 0, "scale.cpu_ms_per_image", value, ">= 0")
            else:
                require(value > 0, f"scale.{item.name}", value, "> 0")
