"""The MHSA neck: multi-head self-attention that relates the pixels of the student's map.

The paper names the module and draws it; its exact shape is not public, so this one is ours:
pre-norm, residual, an output projection that starts at zero (so that training starts from the
backbone's own map), and fixed 2-D sine-cosine positions on queries and keys, so that any
resolution works. It is dropped at export by default.

Shapes: B images, C channels, H x W positions, N = H * W.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.errors import ConfigError


class MhsaNeck(nn.Sequential):
    """``depth`` self-attention layers on a (B, C, H, W) map; 0 is the identity."""

    def __init__(self, channels: int, *, depth: int, heads: int) -> None:
        super().__init__(*(MhsaLayer(channels, heads=heads) for _ in range(depth)))


class MhsaLayer(nn.Module):
    """x + projection(attention(norm(x))), over all positions of a map."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        if channels % heads:
            good = [n for n in range(1, 33) if channels % n == 0]
            raise ConfigError(
                f"student.mhsa.heads={heads} does not divide the backbone's {channels} channels; "
                f"use one of {good}"
            )
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query_key = nn.Linear(channels, 2 * channels)
        self.value = nn.Linear(channels, channels)
        self.projection = nn.Linear(channels, channels)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        mixed = F.scaled_dot_product_attention(*self._parts(x))  # (B, heads, N, C / heads)
        mixed = self.projection(mixed.transpose(1, 2).flatten(2))  # (B, N, C)
        result: Tensor = x + mixed.transpose(1, 2).reshape(batch, channels, height, width)
        return result

    def attention(self, x: Tensor, row: int, column: int) -> Tensor:
        """Return the weights (B, heads, H, W) by which one position of ``x`` attends to all."""
        _, _, height, width = x.shape
        query, key, _ = self._parts(x)
        asked = query[:, :, row * width + column, None]  # (B, heads, 1, C / heads)
        scores = asked @ key.transpose(2, 3) / math.sqrt(key.shape[-1])  # (B, heads, 1, N)
        weights: Tensor = scores.softmax(dim=-1).unflatten(3, (height, width))
        return weights[:, :, 0]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, each (B, heads, N, C / heads)."""
        _, channels, height, width = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, C)
        positions = sincos_positions(height, width, channels, device=x.device)  # (N, C)
        query, key = self.query_key(tokens + positions.to(tokens.dtype)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (query, key, self.value(tokens))
        )
        return query, key, value


def sincos_positions(height: int, width: int, channels: int, *, device: torch.device) -> Tensor:
    """Return (height * width, channels) codes: one half for the row, one for the column."""
    quarter = math.ceil(channels / 4)
    frequency = 10_000 ** -(torch.arange(quarter, device=device) / quarter)  # (quarter,)
    rows = torch.arange(height, device=device)[:, None] * frequency  # (H, quarter)
    columns = torch.arange(width, device=device)[:, None] * frequency  # (W, quarter)
    row_code = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    column_code = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(height, -1, -1)
    return torch.cat([row_code, column_code], dim=2).flatten(0, 1)[:, :channels]
