"""A network to judge, as plain data."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pcd_ray.distill.backbones import Backbone, build_backbone, build_whole
from pcd_ray.distill.weights import load_backbone
from pcd_ray.errors import WeightsError


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedNetwork:
    """A backbone to judge, as plain data that any process can build."""

    label: str
    """Its row in tables."""
    timm_name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""
    output_stride: int = 0
    """Pixels per position of its map; 0: the network's own."""
    published: bool = False
    """Whether weights are named as those of the whole network, with its pooling, are."""
    recentred: bool = False
    """Whether its map is shifted to its own vector (see `distill.tokens`)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Input normalisation in [0, 1]."""
    weights: dict[str, Tensor] = field(repr=False)
    """Under timm's names, without classifier."""
    sha256: str
    """Of the weights."""
    source: str
    """Where they come from, for reports."""
    licence: str = ""

    def backbone(self, *, output_stride: int | None = None) -> Backbone:
        """Return the network in eval mode on the CPU.

        Args:
            output_stride: pixels per position of its map; None: as it is judged.

        Raises:
            ConfigError: the network has no map of this stride.
            WeightsError: the weights do not fit it.
        """
        stride = self.output_stride if output_stride is None else output_stride
        built = self._whole() if self.published and not stride else self._cut(stride)
        if self.recentred:
            built.recentre()
        return built.eval()

    @property
    def identity(self) -> str:
        """A hash of all that its features follow from."""
        facts = [self.sha256, self.timm_name, self.kwargs, self.output_stride, self.recentred]
        text = json.dumps([*facts, self.mean, self.std], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _cut(self, stride: int) -> Backbone:
        built = build_backbone(
            self.timm_name, kwargs=self.kwargs, mean=self.mean, std=self.std, output_stride=stride
        )
        load_backbone(built, self.weights, uri=self.source)
        return built

    def _whole(self) -> Backbone:
        """Build it with its pooling, and without where the weights are named so."""
        refusals: list[WeightsError] = []
        for pooled in (True, False):
            try:
                built = build_whole(
                    self.timm_name,
                    pooled=pooled,
                    kwargs=self.kwargs,
                    mean=self.mean,
                    std=self.std,
                ).backbone
                load_backbone(built, self.weights, uri=self.source)
            except WeightsError as error:
                refusals.append(error)
            else:
                return built
        raise refusals[0]
