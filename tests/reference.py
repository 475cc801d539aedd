"""The method in plain loops and float64: slow, obvious, and without a line of the package.

Maps are (B, C, H, W) arrays, pixels (P, D), queues (K, D); positions count row by row.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


def unit(vector: Array) -> Array:
    return vector / math.sqrt(sum(value**2 for value in vector))


def pixels(maps: Array) -> list[Array]:
    """Return the unit vectors of (B, D, H, W) maps, image by image, row by row."""
    batch, _, height, width = maps.shape
    return [
        unit(maps[b, :, y, x]) for b in range(batch) for y in range(height) for x in range(width)
    ]


def loss(
    student: Sequence[Array],
    positive: Sequence[Array],
    negatives: Sequence[Array],
    temperature: float,
    weights: Sequence[float] | None = None,
) -> float:
    """The written sum, term by term."""
    total, count = 0.0, 0.0
    for i, (s, t) in enumerate(zip(student, positive, strict=True)):
        weight = 1.0 if weights is None else weights[i]
        own = math.exp(float(s @ t) / temperature)
        others = sum(math.exp(float(s @ q) / temperature) for q in negatives)
        total += weight * -math.log(own / (own + others))
        count += weight
    return total / max(count, 1.0)


def squared_distance(
    student: Sequence[Array], positive: Sequence[Array], weights: Sequence[float] | None = None
) -> float:
    """The mean squared distance of paired vectors, coordinate by coordinate."""
    total, count = 0.0, 0.0
    for i, (s, t) in enumerate(zip(student, positive, strict=True)):
        weight = 1.0 if weights is None else weights[i]
        total += weight * sum((float(a) - float(b)) ** 2 for a, b in zip(s, t, strict=True))
        count += weight
    return total / max(count, 1.0)


def pooled(maps: Array) -> list[Array]:
    """Return the unit vector of each (D, H, W) map's mean."""
    _, _, height, width = maps.shape
    return [
        unit(sum(one[:, y, x] for y in range(height) for x in range(width)) / (height * width))
        for one in maps
    ]


def push(queue: list[Array], keys: Sequence[Array]) -> list[Array]:
    """Return a queue, oldest first, after its oldest entries made room for new ones."""
    for key in keys:
        queue = [*queue[1:], key]
    return queue


def centres(box: Sequence[float], grid: tuple[int, int]) -> tuple[list[tuple[float, float]], float]:
    """Return the cells' centres in the original image, row by row, and a cell's diagonal."""
    left, top, width, height, flip = box
    rows, columns = grid
    points = []
    for row in range(rows):
        for column in range(columns):
            seen = columns - 1 - column if flip else column
            points.append(
                (left + (seen + 0.5) / columns * width, top + (row + 0.5) / rows * height)
            )
    return points, math.hypot(width / columns, height / rows)


def pairs(
    student_box: Sequence[float],
    teacher_box: Sequence[float],
    grid: tuple[int, int],
    radius: float,
) -> list[int | None]:
    """Return the teacher position of each student position of one image, or None."""
    ours, our_diagonal = centres(student_box, grid)
    theirs, their_diagonal = centres(teacher_box, grid)
    found: list[int | None] = []
    for x, y in ours:
        distances = [math.hypot(x - u, y - v) for u, v in theirs]
        best = min(range(len(theirs)), key=distances.__getitem__)
        near = distances[best] < radius * max(our_diagonal, their_diagonal)
        found.append(best if near else None)
    return found


def shrink(maps: Array, grid: tuple[int, int]) -> Array:
    """Average blocks of maps, so that they have a coarser grid."""
    batch, channels, height, width = maps.shape
    down, across = height // grid[0], width // grid[1]
    result = np.zeros((batch, channels, *grid))
    for y in range(grid[0]):
        for x in range(grid[1]):
            block = maps[:, :, y * down : (y + 1) * down, x * across : (x + 1) * across]
            result[:, :, y, x] = block.sum(axis=(2, 3)) / (down * across)
    return result


def gelu(m: float) -> float:
    return m * 0.5 * (1 + math.erf(m / math.sqrt(2)))


def gelu_tanh(m: float) -> float:
    return 0.5 * m * (1 + math.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))


def silu(m: float) -> float:
    return m / (1 + math.exp(-m))


def hardswish(m: float) -> float:
    return m * min(max(m + 3, 0.0), 6.0) / 6


def activation(layer: nn.Module) -> Callable[[float], float]:
    """Return the scalar function of an activation layer."""
    if isinstance(layer, nn.GELU):
        return gelu_tanh if layer.approximate == "tanh" else gelu
    if isinstance(layer, nn.LeakyReLU):
        slope = layer.negative_slope
        return lambda m: m if m > 0 else slope * m
    simple: dict[type[nn.Module], Callable[[float], float]] = {
        nn.ReLU: lambda m: max(m, 0.0),
        nn.SiLU: silu,
        nn.Hardswish: hardswish,
    }
    return simple[type(layer)]


def adapt(head: nn.Sequential, maps: Array) -> Array:
    """SpatialAdaptor with the rule ``gate``, pixel by pixel: (B, C, H, W) -> (B, D, H, W)."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            maps = _linear(layer, maps)
        elif isinstance(layer, nn.BatchNorm1d):
            maps = _batchnorm(layer, maps)
        else:
            maps = _gated(activation(layer), maps)
    return maps


def _linear(layer: nn.Linear, maps: Array) -> Array:
    batch, _, height, width = maps.shape
    weight = layer.weight.detach().double().numpy()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    result = np.zeros((batch, len(weight), height, width))
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                result[b, :, y, x] = weight @ maps[b, :, y, x] + bias
    return result


def _batchnorm(layer: nn.BatchNorm1d, maps: Array) -> Array:
    result = np.zeros_like(maps)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    for c in range(maps.shape[1]):
        deviation = math.sqrt(float(layer.running_var[c]) + layer.eps)
        value = (maps[:, c] - float(layer.running_mean[c])) / deviation
        if layer.affine:
            value = value * float(layer.weight[c]) + float(layer.bias[c])
        result[:, c] = value
    return result


def _gated(act: Callable[[float], float], maps: Array) -> Array:
    batch, channels, height, width = maps.shape
    result = np.zeros_like(maps)
    for b in range(batch):
        for c in range(channels):
            mean = maps[b, c].sum() / (height * width)
            gate = act(mean) / mean if mean else 0.0
            for y in range(height):
                for x in range(width):
                    result[b, c, y, x] = maps[b, c, y, x] * gate
    return result


def attention(query: Array, key: Array, value: Array) -> Array:
    """Softmax attention of one head: (N, C) each -> (N, C)."""
    result = np.zeros_like(value)
    for i in range(len(query)):
        shares = [math.exp(float(query[i] @ k) / math.sqrt(query.shape[1])) for k in key]
        for share, v in zip(shares, value, strict=True):
            result[i] += share / sum(shares) * v
    return result
