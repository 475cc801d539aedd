"""Networks to judge, drawn at random."""

from typing import Any

import torch

from pcd_ray.distill.backbones import build_backbone
from pcd_ray.evaluate.judged_network import JudgedNetwork


def drawn_network(timm_name: str = "resnet10t", *, seed: int = 0, **kwargs: Any) -> JudgedNetwork:
    """A network with its first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build_backbone(timm_name, kwargs=kwargs)
    return JudgedNetwork(
        label="drawn",
        timm_name=timm_name,
        kwargs=kwargs,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        weights=built.body.state_dict(),
        sha256=str(seed),
        source="drawn",
    )
