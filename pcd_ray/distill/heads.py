"""Projection heads: read from a state dict for vectors, mirrored as 1x1 convolutions for maps.

Shapes: B images, C backbone channels, D embedding channels, H x W positions.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pcd_ray.errors import ConfigError, WeightsError

ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
}
_LAYER_KEY = re.compile(r"^(\d+)\.(.+)$")


def head_from_state(state: dict[str, Tensor], *, activation: str = "relu") -> nn.Sequential:
    """Build a head for vectors from keys ``0.weight``, ``1.running_mean``, ...

    A two-dimensional weight is a Linear, running statistics are a BatchNorm1d, a one-dimensional
    weight alone is a LayerNorm, and one index without keys between two layers is the activation.

    Returns:
        The head in eval mode, every key of ``state`` used.

    Raises:
        WeightsError: no Linear, a key that belongs to none of these, shapes that do not chain, or
            indices that leave open where the activations are.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _LAYER_KEY.match(key)
        if match is None:
            raise WeightsError(f"head key {key!r} is not INDEX.NAME; this head is no plain MLP")
        layers.setdefault(int(match[1]), {})[match[2]] = value
    if not layers:
        raise WeightsError("the head has no layers; set teacher.head=none for a headless teacher")
    if activation not in ACTIVATION_LAYERS:
        raise WeightsError(
            f"head activation {activation!r} is unknown; use one of {sorted(ACTIVATION_LAYERS)}"
        )
    _check_indices(sorted(layers))
    modules = [
        _layer(index, layers[index]) if index in layers else ACTIVATION_LAYERS[activation]()
        for index in range(max(layers) + 1)
    ]
    head = nn.Sequential(*modules)
    if not linear_widths(head):
        raise WeightsError("the head has no Linear layer; set teacher.head=none to do without it")
    _check_widths(head)
    try:
        head.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problems = " ".join(str(error).split("\n", 1)[-1].split())
        raise WeightsError(f"the head is no plain MLP: {problems}; give another head") from error
    return head.eval()


def linear_widths(head: nn.Sequential) -> list[tuple[int, int]]:
    """Return (input, output) widths of a head's Linear layers, in order."""
    return [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]


def output_width(head: nn.Sequential, channels: int) -> int:
    """Return the width that a head turns ``channels`` into."""
    widths = linear_widths(head)
    return widths[-1][1] if widths else channels


def kept_head(head: nn.Sequential, *, layers: int, final_norm: bool) -> nn.Sequential:
    """Return the first layers of a head for vectors; the weights are shared.

    Args:
        head: the whole head.
        layers: Linear layers kept, each but the last with the norm and activation behind it. The
            last one keeps its norm but no activation, as published heads end. 0: all of the head.
        final_norm: whether a norm behind the last kept Linear stays.

    Raises:
        WeightsError: more layers than there are.
    """
    linears = [i for i, layer in enumerate(head) if isinstance(layer, nn.Linear)]
    if layers > len(linears):
        raise WeightsError(
            f"teacher.adaptor.layers={layers}, but the head has {len(linears)} Linear layers; "
            f"use at most {len(linears)}, or 0 for all"
        )
    if not linears:
        return head
    last = linears[layers - 1] if layers else linears[-1]
    tail = list(head[last + 1 :])
    if last != linears[-1]:
        tail = list(itertools.takewhile(lambda layer: isinstance(layer, _NORMS), tail))
    if not final_norm:
        tail = [layer for layer in tail if not isinstance(layer, _NORMS)]
    if last + 1 + len(tail) == len(head):
        return head
    return nn.Sequential(*head[: last + 1], *tail).eval()


_NORMS = (nn.BatchNorm1d, nn.LayerNorm)


def random_projection(width: int, dim: int, *, seed: int) -> nn.Linear:
    """Return a fixed Linear ``width`` -> ``dim``: random orthogonal rows of length (width/dim)^0.5.

    Linear, so SpatialAdaptor's law holds; squared norms and inner products keep their value on
    average over seeds, within a few times (2/dim)^0.5 of the norms (Johnson-Lindenstrauss; ours).

    Raises:
        ConfigError: it would widen.
    """
    if dim > width:
        raise ConfigError(
            f"teacher.projection_dim={dim} exceeds the {width} channels of the teacher's head; "
            "use less, or 0 for no projection"
        )
    random = torch.Generator().manual_seed(seed)
    columns, triangle = torch.linalg.qr(
        torch.randn(width, dim, generator=random, dtype=torch.float64)
    )
    rows = (columns * triangle.diagonal().sign()).T * (width / dim) ** 0.5  # (dim, width)
    linear = nn.Linear(width, dim, bias=False)
    with torch.no_grad():  # multiples of 2^-20: machines that round differently agree on the hash
        linear.weight.copy_((rows * 2**20).round() / 2**20)
    return linear


@dataclass(frozen=True, slots=True)
class MlpShape:
    """What a mirrored head copies from a teacher's: widths behind each layer, and a last norm."""

    widths: tuple[int, ...]
    final_norm: bool = False

    def with_hidden(self, hidden: int) -> "MlpShape":
        """Return the shape with other hidden widths, and with one hidden layer at least."""
        depth = max(1, len(self.widths) - 1)
        return replace(self, widths=(*(hidden,) * depth, self.widths[-1]))


def shape_of(head: nn.Sequential) -> MlpShape:
    """Return the shape of a head for vectors."""
    last_linear = max(i for i, layer in enumerate(head) if isinstance(layer, nn.Linear))
    norm = any(isinstance(layer, nn.BatchNorm1d) for layer in head[last_linear + 1 :])
    return MlpShape(tuple(out for _, out in linear_widths(head)), norm)


def narrowed(shape: MlpShape, width: int, *, limit: int) -> MlpShape:
    """Return a shape that ends at ``width`` and is nowhere wider than ``limit``; 0: no limit."""
    hidden = (min(w, limit) if limit else w for w in shape.widths[:-1])
    return MlpShape((*hidden, width), shape.final_norm)


def mirrored_head(channels: int, shapes: Sequence[MlpShape]) -> nn.Sequential:
    """Return a head for maps: 1x1 convolution + BatchNorm2d + ReLU, the last layer bare.

    The form is the released code's: first the teacher's projector, then its predictor, each with
    the teacher's widths behind the backbone's own ``channels``.
    """
    layers: list[nn.Module] = []
    width = channels
    for shape in shapes:
        for index, out in enumerate(shape.widths):
            last = index == len(shape.widths) - 1
            normed = not last or shape.final_norm
            layers.append(nn.Conv2d(width, out, 1, bias=not normed))
            if normed:
                layers.append(nn.BatchNorm2d(out))
            if not last:
                layers.append(nn.ReLU(inplace=True))
            width = out
    return nn.Sequential(*layers)


def _layer(index: int, state: dict[str, Tensor]) -> nn.Module:
    weight = state.get("weight")
    if "running_mean" in state:
        return nn.BatchNorm1d(len(state["running_mean"]), affine=weight is not None)
    if weight is not None and weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state)
    if weight is not None and weight.ndim == 1:
        return nn.LayerNorm(len(weight), bias="bias" in state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    raise WeightsError(f"head layer {index} with {shapes} is no Linear, BatchNorm or LayerNorm")


def _check_indices(indices: Sequence[int]) -> None:
    gaps = [i for i in range(indices[-1]) if i not in indices]
    unclear = [i for i in gaps if i == 0 or i - 1 in gaps]
    if unclear:
        raise WeightsError(
            f"head indices {list(indices)} leave {unclear} without keys, and an activation stands "
            "alone between two layers; number the layers as they follow one another from 0"
        )


def _check_widths(head: nn.Sequential) -> None:
    width: int | None = None
    for index, layer in enumerate(head):
        takes = _input_width(layer)
        if takes is not None and width is not None and takes != width:
            raise WeightsError(
                f"head layer {index} takes {takes} channels but the layer before gives {width}; "
                "the file mixes two heads"
            )
        width = layer.out_features if isinstance(layer, nn.Linear) else takes or width


def _input_width(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.BatchNorm1d):
        return layer.num_features
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[0])
    return None
