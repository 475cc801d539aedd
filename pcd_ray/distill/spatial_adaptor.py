"""SpatialAdaptor: a projection head made for vectors takes maps, and keeps their mean.

The law: ``adapted(x).mean((2, 3)) == head(x.mean((2, 3)))``. It holds because every layer of the
adapted head is affine in the map once the map's spatial mean m is given:

- Linear is a 1x1 convolution, BatchNorm in eval mode an affine map per channel;
- ``gate`` (the released rule): an activation multiplies the whole map by act(m) / m, one gate per
  image and channel; for ReLU this is 1[m > 0];
- ``tangent``: a layer h becomes h(m) + J_h(m) (x - m), which also carries LayerNorm;
- ``naive`` applies the activation to each pixel, which breaks the law: the ablation.

``gate_window`` takes m over a neighbourhood of each position instead, which breaks the law too
unless the window covers the map from everywhere, and is ``naive`` where it is one position (ours).

Shapes: B images, C channels, H x W positions. The final L2 norm stays outside.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.errors import ConfigError, WeightsError

RULES = ("gate", "tangent", "naive")
_LAW_TOLERANCE = 1e-9  # float64: rounding of a few thousand additions stays below 1e-12


def _gelu_gate(layer: nn.GELU, mean: Tensor) -> Tensor:
    if layer.approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (mean + 0.044715 * mean**3)
        return 0.5 * (1 + torch.tanh(inner))
    return 0.5 * (1 + torch.erf(mean / math.sqrt(2)))


_GATES: dict[type[nn.Module], Callable[..., Tensor]] = {
    # act(m) / m in closed form, so that m = 0 needs no care
    nn.ReLU: lambda _, mean: (mean > 0).to(mean.dtype),
    nn.GELU: _gelu_gate,
    nn.SiLU: lambda _, mean: torch.sigmoid(mean),
    nn.Hardswish: lambda _, mean: F.relu6(mean + 3) / 6,
    # ones_like: two plain numbers would be chosen from in float32
    nn.LeakyReLU: lambda layer, mean: torch.where(
        mean > 0, torch.ones_like(mean), layer.negative_slope
    ),
}
ACTIVATIONS = tuple(_GATES)


class SpatialAdaptor(nn.Module):
    """A head for maps that shares the weights of a head for vectors.

    Args:
        head: Linear, BatchNorm1d, LayerNorm, activation, Dropout and Identity layers in a row.
        rule: one of `RULES`.
        gate_window: side of the neighbourhood, in positions, that means are taken over, odd;
            0: the whole map.

    Raises:
        ConfigError: a layer that no rule covers, an unknown rule, or an even window.
    """

    def __init__(self, head: nn.Sequential, *, rule: str, gate_window: int = 0) -> None:
        super().__init__()
        if rule not in RULES:
            raise ConfigError(f"teacher.adaptor.rule={rule!r} is unknown; use one of {RULES}")
        if gate_window and gate_window % 2 != 1:
            raise ConfigError(f"teacher.adaptor.gate_window={gate_window} has no middle; use odd")
        for layer in head:
            if not isinstance(layer, _KNOWN):
                raise ConfigError(
                    f"the head holds {type(layer).__name__}, which SpatialAdaptor cannot adapt; "
                    f"use {', '.join(kind.__name__ for kind in _KNOWN)}"
                )
        self.head = head
        self.rule = rule
        self.gate_window = gate_window

    @property
    def keeps_mean(self) -> bool:
        """Whether the settings promise the law."""
        return self.rule != "naive" and not self.gate_window

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H, W)."""
        for layer in self.head:
            x = self._adapt(layer, x)
        return x

    def _adapt(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        if isinstance(layer, nn.BatchNorm1d):
            return F.batch_norm(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
            )
        if isinstance(layer, nn.LayerNorm):
            return _per_pixel(layer, x) if self.rule == "naive" else self._tangent(layer, x)
        if not isinstance(layer, ACTIVATIONS):
            return x  # Identity, and Dropout in a head that never trains
        if self.rule == "naive":
            return _per_pixel(layer, x)
        if self.rule == "tangent":
            return self._tangent(layer, x)
        return x * self._gate(layer, x)

    def _gate(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = _mean(x, self.gate_window)  # (B, C, 1, 1) or (B, C, H, W)
            return _GATES[type(layer)](layer, mean).to(x.dtype)

    def _tangent(self, layer: nn.Module, x: Tensor) -> Tensor:
        """h(m) + J_h(m) (x - m), for a layer that acts on each pixel's channels."""
        mean = _mean(x, self.gate_window)
        wide = x.to(mean.dtype)
        with torch.autocast(x.device.type, enabled=False):
            value, slope = torch.func.jvp(  # type: ignore[misc]  # two values without has_aux
                lambda point: _per_pixel(layer, point),
                (mean.expand_as(wide).contiguous(),),
                (wide - mean,),
            )
        result: Tensor = (value + slope).to(x.dtype)
        return result


_KNOWN = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.Dropout, nn.Identity, *ACTIVATIONS)


def _mean(x: Tensor, window: int) -> Tensor:
    """Mean over the map (B, C, 1, 1) or around each position (B, C, H, W).

    In float32 or wider, whatever autocast does around it. A window ends where the map does.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    reach = window // 2
    if not window or reach >= max(x.shape[2:]) - 1:  # from everywhere it covers the map
        return x.mean((2, 3), keepdim=True, dtype=wide)
    return F.avg_pool2d(x.to(wide), window, stride=1, padding=reach, count_include_pad=False)


def _per_pixel(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x.movedim(1, -1)).movedim(-1, 1)
    return result


def law_error(adaptor: SpatialAdaptor, maps: Tensor) -> float:
    """Return the largest deviation from the law on (B, C, H, W) maps, relative, in float64."""
    exact = copy.deepcopy(adaptor).double().eval()
    maps = maps.detach().double()
    with torch.no_grad():
        expected = exact.head(maps.mean((2, 3)))  # (B, D)
        got = exact(maps).mean((2, 3))  # (B, D)
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((got - expected).abs().max() / scale)


def check_law(adaptor: SpatialAdaptor, maps: Tensor) -> float:
    """Return `law_error`, having refused a head that breaks the law.

    Settings that break it on purpose (``naive``, a window) pass; their error is only reported.

    Raises:
        WeightsError: the error is not rounding.
    """
    error = law_error(adaptor, maps)
    if adaptor.keeps_mean and not error <= _LAW_TOLERANCE:  # NaN fails too
        raise WeightsError(
            f"the teacher's head breaks SpatialAdaptor's law: relative error {error:.1e} in "
            f"float64 with teacher.adaptor.rule={adaptor.rule!r}, of which at most "
            f"{_LAW_TOLERANCE:.0e} is rounding; check the weights for non-finite values, or set "
            "teacher.head=none"
        )
    return error


def layer_names(layers: Sequence[nn.Module]) -> list[str]:
    """Return a short name for each layer, e.g. ``Linear 2048-4096``."""
    return [
        f"Linear {layer.in_features}-{layer.out_features}"
        if isinstance(layer, nn.Linear)
        else type(layer).__name__.removesuffix("1d")
        for layer in layers
    ]
