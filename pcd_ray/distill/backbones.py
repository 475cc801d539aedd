"""timm backbones cut to a feature map: uint8 images in, (B, C, H, W) out.

Weights keep timm's own names, so that an exported student loads strictly into timm.

Shapes: B images of S x S pixels, C channels, H x W positions.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcd_ray.distill.tokens import attention_pool, has_own_vector, patches_of, recentred_map
from pcd_ray.errors import ConfigError

_OTHER = "choose a backbone with a spatial output"


class Backbone(nn.Module):
    """A timm model without its classifier, and the normalisation that its input wants."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        name: str,
        kwargs: Mapping[str, Any] | None = None,
        tap: int | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.name = name
        self.kwargs = dict(kwargs or {})  # what timm needs besides to build the same network
        self.tap = tap  # the stage whose map is taken, as timm counts them; None: the last map
        self.memory_format = torch.contiguous_format
        self.recentred = False
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images to (B, C, H, W)."""
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype, memory_format=self.memory_format)
        x = (x - self.mean) / self.std  # (B, 3, S, S)
        if self.tap is not None:
            stages: list[Tensor] = self.body.forward_intermediates(  # type: ignore[operator]
                x, indices=[self.tap], stop_early=True, intermediates_only=True
            )
            return stages[0]
        features: Any = self.body.forward_features(x)  # type: ignore[operator]
        maps = _as_map(features, self.body, x.shape[2:])
        return recentred_map(maps, features, self.body) if self.recentred else maps

    @property
    def timm_licence(self) -> str:
        """Licence of timm's own pretrained weights; empty when timm does not say."""
        about: Any = self.body.pretrained_cfg
        return str(about.get("license") or "")

    def recentre(self) -> None:
        """Shift maps so that their mean is the network's own vector (see `tokens`).

        Raises:
            ConfigError: the network has neither class token nor attention pooling.
        """
        if not has_own_vector(self.body):
            raise ConfigError(
                f"teacher.tokens=recentred, but {self.name} has neither class token nor attention "
                "pooling; use auto or patches"
            )
        pool: Any = attention_pool(self.body)
        if pool is not None:
            pool.pool_type = "token"  # its vector, not its map
        self.recentred = True

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
    output_stride: int = 0,
) -> Backbone:
    """Return a timm backbone by name.

    Args:
        name: timm model name.
        pretrained: load timm's own weights, from its hub or cache.
        kwargs: further arguments of ``timm.create_model``.
        mean, std: input normalisation in [0, 1]; default: what timm says of the model.
        output_stride: pixels per position of its map; 0: the network's own.

    Raises:
        ConfigError: unknown name, arguments that timm refuses, weights that cannot be had, or a
            stride that the network has no map of.
    """
    kwargs, tap = kwargs_for_stride(name, kwargs or {}, output_stride)
    body = _cut_body(name, kwargs, pretrained=pretrained)
    return _backbone(body, name=name, kwargs=kwargs, mean=mean, std=std, tap=tap)


def kwargs_for_stride(
    name: str, kwargs: dict[str, Any], output_stride: int
) -> tuple[dict[str, Any], int | None]:
    """Return how a network gives maps of a stride: timm's arguments, and the stage to tap.

    Its own last map comes first, then timm's ``output_stride`` (dilated convolutions), then an
    earlier stage's map. The weights' names and shapes are those of the whole network in all cases.

    Args:
        name: timm model name.
        kwargs: the user's arguments of ``timm.create_model``.
        output_stride: pixels per position; 0: the network's own.

    Returns:
        Arguments of ``timm.create_model``, and the index of the stage for
        ``forward_intermediates``; None: the last map.

    Raises:
        ConfigError: as `build_backbone`.
    """
    if not output_stride:
        return kwargs, None
    dilated = {**kwargs, "output_stride": output_stride}
    with torch.device("meta"):  # what timm says of them is wanted, no memory
        own = _strides(_cut_body(name, kwargs))
        if own[-1] == output_stride:
            return kwargs, None
        try:
            found = _strides(_cut_body(name, dilated))
        except ConfigError:  # of networks that cannot be dilated, or not so far
            found = []
    if found and found[-1] == output_stride:
        return dilated, None
    if output_stride in own:
        return kwargs, len(own) - 1 - own[::-1].index(output_stride)
    listed = ", ".join(map(str, sorted(set(own))))
    raise ConfigError(
        f"student.output_stride={output_stride}, but {name} has maps of stride {listed} alone; use "
        "0 (its last map) or another backbone, for finer pairs student.grid=upsample, and for "
        "vision transformers another patch_size in student.kwargs"
    )


def _strides(body: nn.Module) -> list[int]:
    """Return the strides of a network's maps, stage by stage."""
    stages: Any = body.feature_info
    return [int(stage["reduction"]) for stage in stages]


@dataclass(frozen=True, slots=True)
class WholeNetwork:
    """A timm network as it was published, and what was cut off it."""

    backbone: Backbone
    classifier: dict[str, Tensor]
    """Weight and bias in its classifier's place; they mean something where it is pretrained."""
    pooling: str
    """``token``, ``avg`` and so on, where timm says."""


def build_whole(
    name: str,
    *,
    pretrained: bool = False,
    pooled: bool = True,
    kwargs: dict[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> WholeNetwork:
    """Return a timm network as published, with its pooling; as `build_backbone` else.

    The pooling decides what some weights are called and how they are shaped; the map is taken in
    front of it. Positions of tokens are interpolated to other image sizes where timm can.

    Args:
        name, pretrained, kwargs, mean, std: as of `build_backbone`.
        pooled: False names weights as those cut to a map from the start do, our students among
            them.
    """
    given = dict(kwargs or {}) if pooled else {**(kwargs or {}), "global_pool": ""}
    ours = {} if "dynamic_img_size" in given else {"dynamic_img_size": True}
    try:
        body = _create(name, given, pretrained=pretrained, **ours)
    except ConfigError as error:
        if not ours or "dynamic_img_size" not in str(error.__cause__):
            raise
        body = _create(name, given, pretrained=pretrained)  # a network without tokens
    pooling = getattr(body, "global_pool", "")
    classifier: Any = body.get_classifier()
    state = classifier.state_dict() if isinstance(classifier, nn.Module) else {}
    body.reset_classifier(0)
    backbone = _backbone(body, name=name, kwargs=kwargs, mean=mean, std=std)
    return WholeNetwork(backbone, state, pooling if isinstance(pooling, str) else "")


class UninitializedParameters(TorchFunctionMode):
    """Networks built within have parameters of no values, which take no memory until set."""

    _FILLS = (
        *("normal_", "uniform_", "fill_", "zero_", "copy_", "erfinv_", "clamp_", "__setitem__"),
        *("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Skip whatever would write to a parameter, through its ``data`` too."""
        del types
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        fills = func.__name__ in self._FILLS or func == _DATA
        initializes = getattr(func, "__module__", "") == nn.init.__name__
        if isinstance(target, nn.Parameter) and (fills or initializes):
            return target
        return func(*args, **kwargs)


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def _cut_body(name: str, kwargs: dict[str, Any], *, pretrained: bool = False) -> Any:
    """Return a timm model without classifier and pooling."""
    return _create(name, kwargs, pretrained=pretrained, num_classes=0, global_pool="")


def _create(name: str, kwargs: dict[str, Any], *, pretrained: bool, **ours: Any) -> Any:
    if not is_known(name):
        raise ConfigError(f"{name!r} is no timm model; {_suggestion(name)}")
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=pretrained, **ours, **kwargs)
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


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's word of each retry from hiding what we say in the end."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _backbone(
    body: Any,
    *,
    name: str,
    kwargs: Mapping[str, Any] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    tap: int | None = None,
) -> Backbone:
    known = body.pretrained_cfg
    return Backbone(
        body.eval(),
        mean=mean or known["mean"],
        std=std or known["std"],
        name=name,
        kwargs=kwargs,
        tap=tap,
    )


def is_known(name: str) -> bool:
    """Say whether timm has a model of this name, with or without a tag of its weights."""
    return bool(timm.is_model(name.partition(".")[0]))


@torch.no_grad()
def map_shape(
    backbone: Backbone,
    height_px: int,
    width_px: int | None = None,
    *,
    option: str = "augment.image_size_px",
) -> tuple[int, int, int]:
    """Return (C, H, W) of the map of one image, a square one unless its width is given.

    Args:
        backbone: the network.
        height_px: height of the image.
        width_px: its width; None: a square.
        option: what sets the size, for the error.

    Raises:
        ConfigError: the backbone cannot take images of this size.
    """
    device = backbone.mean.device
    width = width_px or height_px
    _check_patches(backbone, (height_px, width), option=option)
    image = torch.zeros(1, height_px, width, 3, dtype=torch.uint8, device=device)
    was_training = backbone.training
    try:
        shape = backbone.eval()(image).shape
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{backbone.name} cannot take images of {height_px} x {width} pixels ({option}): "
            f"{str(error).splitlines()[0]}; use the model's own size, or its kwargs "
            "(vision transformers: {dynamic_img_size: true})"
        ) from error
    finally:
        backbone.train(was_training)
    return int(shape[1]), int(shape[2]), int(shape[3])


def _check_patches(backbone: Backbone, image_size: tuple[int, int], *, option: str) -> None:
    """Refuse an image that patches do not divide, of a network that takes any other size."""
    embed: Any = getattr(backbone.body, "patch_embed", None)
    flexible = getattr(backbone.body, "dynamic_img_size", False)
    if not flexible or embed is None or getattr(embed, "dynamic_img_pad", False):
        return
    for size, patch in zip(image_size, embed.patch_size, strict=True):
        if size % patch:
            down = size - size % patch
            raise ConfigError(
                f"{option}={size} does not split into the {patch} px patches of {backbone.name}; "
                f"use {f'{down} or ' if down else ''}{down + patch}"
            )


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


def _as_map(features: object, body: nn.Module, image_size: Sequence[int]) -> Tensor:
    """Return timm's features as (B, C, H, W), whatever layout the model has."""
    if not isinstance(features, Tensor):
        raise ConfigError(f"{type(body).__name__} gives several features, no map; {_OTHER}")
    if features.ndim == 4:
        channels_innermost = str(getattr(body, "output_fmt", "NCHW")) == "NHWC"
        return features.movedim(3, 1) if channels_innermost else features
    grid_of = getattr(getattr(body, "patch_embed", None), "dynamic_feat_size", None)
    if features.ndim == 3 and grid_of is not None:  # tokens, the first few of which are no patches
        patches = patches_of(features, body).transpose(1, 2)  # (B, C, H * W)
        return torch.unflatten(patches, 2, tuple(grid_of(image_size)))
    raise ConfigError(
        f"{type(body).__name__} gives features of shape {tuple(features.shape)}, which is no map; "
        f"{_OTHER}"
    )


def _suggestion(name: str) -> str:
    known = timm.list_models()
    longer = [other for other in known if other.startswith(name)]
    near = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "see timm.list_models()"
