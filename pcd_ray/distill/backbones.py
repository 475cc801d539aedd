"""timm backbones cut to a feature map: uint8 images in, (B, C, H, W) out.

Weights keep timm's own names, so that an exported student loads strictly into timm.

Shapes: B images of S x S pixels, C channels, H x W positions.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pcd_ray.errors import ConfigError

_OTHER = "choose a backbone with a spatial output"


class Backbone(nn.Module):
    """A timm model without its classifier, and the normalisation that its input wants."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, *, mean: Sequence[float], std: Sequence[float], name: str
    ) -> None:
        super().__init__()
        self.body = body
        self.name = name
        self.memory_format = torch.contiguous_format
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images to (B, C, H, W)."""
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype, memory_format=self.memory_format)
        x = (x - self.mean) / self.std  # (B, 3, S, S)
        return _as_map(self.body.forward_features(x), self.body, x.shape[2:])  # type: ignore[operator]

    @property
    def timm_licence(self) -> str:
        """Licence of timm's own pretrained weights; empty when timm does not say."""
        about: Any = self.body.pretrained_cfg
        return str(about.get("license") or "")

    def use_channels_last(self) -> None:
        """Keep weights and maps with channels innermost, which most convolutions prefer."""
        self.memory_format = torch.channels_last
        self.to(memory_format=torch.channels_last)


def build_backbone(
    name: str,
    *,
    pretrained: bool = False,
    kwargs: dict[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Return a timm backbone by name.

    Args:
        name: timm model name.
        pretrained: load timm's own weights, from its hub or cache.
        kwargs: further arguments of ``timm.create_model``.
        mean, std: input normalisation in [0, 1]; default: what timm says of the model.

    Raises:
        ConfigError: unknown name, arguments that timm refuses, or weights that cannot be had.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"{name!r} is no timm model; {_suggestion(name)}")
    try:
        body = timm.create_model(
            name, pretrained=pretrained, num_classes=0, global_pool="", **(kwargs or {})
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"timm's {name} refuses kwargs={kwargs}: {error}") from error
    except AssertionError as error:  # of its pooling, which some networks cannot do without
        raise ConfigError(
            f"{name} with kwargs={kwargs} cannot be cut to a map ({error}); {_OTHER}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ConfigError(f"timm's {name} with kwargs={kwargs} fails: {error}") from error
        raise ConfigError(
            f"timm's pretrained weights of {name} cannot be had ({str(error).splitlines()[0]}); "
            "give a local file in teacher.weights, or let this machine reach timm's hub"
        ) from error
    known: Any = body.pretrained_cfg
    return Backbone(body.eval(), mean=mean or known["mean"], std=std or known["std"], name=name)


@torch.no_grad()
def map_shape(backbone: Backbone, image_size_px: int) -> tuple[int, int, int]:
    """Return (C, H, W) of the map of one square image.

    Raises:
        ConfigError: the backbone cannot take images of this size.
    """
    device = backbone.mean.device
    image = torch.zeros(1, image_size_px, image_size_px, 3, dtype=torch.uint8, device=device)
    was_training = backbone.training
    try:
        shape = backbone.eval()(image).shape
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{backbone.name} cannot take augment.image_size_px={image_size_px}: "
            f"{str(error).splitlines()[0]}; use the model's own size, or its kwargs "
            "(vision transformers: {dynamic_img_size: true})"
        ) from error
    finally:
        backbone.train(was_training)
    return int(shape[1]), int(shape[2]), int(shape[3])


def freeze_unused(backbone: Backbone, image_size_px: int) -> list[str]:
    """Freeze weights that the map does not depend on, and return their names.

    Some models keep the norm or convolution in front of their classifier. Such weights stay, for
    timm's sake, but DistributedDataParallel waits for the gradient of each weight that wants one.
    """
    image = torch.zeros(1, image_size_px, image_size_px, 3, dtype=torch.uint8)
    was_training = backbone.training
    features = backbone.eval()(image.to(backbone.mean.device))
    backbone.train(was_training)
    named = dict(backbone.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
    unused = [n for n, g in zip(named, gradients, strict=True) if g is None]
    for name in unused:
        named[name].requires_grad_(False)
    return unused


def _as_map(features: Tensor, body: nn.Module, image_size: Sequence[int]) -> Tensor:
    """Return timm's features as (B, C, H, W), whatever layout the model has."""
    if features.ndim == 4:
        channels_innermost = str(getattr(body, "output_fmt", "NCHW")) == "NHWC"
        return features.movedim(3, 1) if channels_innermost else features
    grid_of = getattr(getattr(body, "patch_embed", None), "dynamic_feat_size", None)
    if features.ndim == 3 and grid_of is not None:  # tokens, the first few of which are no patches
        patches = features[:, int(getattr(body, "num_prefix_tokens", 0)) :]
        return torch.unflatten(patches.transpose(1, 2), 2, tuple(grid_of(image_size)))
    raise ConfigError(
        f"{type(body).__name__} gives features of shape {tuple(features.shape)}, which is no map; "
        f"{_OTHER}"
    )


def _suggestion(name: str) -> str:
    known = timm.list_models()
    longer = [other for other in known if other.startswith(name)]
    near = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "see timm.list_models()"
