import itertools

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from pcd_ray.distill.mhsa import MhsaLayer, MhsaNeck, sincos_positions
from pcd_ray.errors import ConfigError


def trained_layer(channels: int = 16, heads: int = 4, seed: int = 0) -> MhsaLayer:
    """A layer whose projection has left zero."""
    torch.manual_seed(seed)
    layer = MhsaLayer(channels, heads=heads).double()
    nn.init.normal_(layer.projection.weight)
    nn.init.normal_(layer.projection.bias)
    return layer.requires_grad_(False)


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_depth_zero_is_the_identity_without_weights() -> None:
    neck = MhsaNeck(12, depth=0, heads=8)  # 8 heads do not divide 12, and there are none
    x = maps(2, 12, 3, 3)
    assert torch.equal(neck(x), x)
    assert list(neck.parameters()) == []


def test_at_the_start_it_is_the_identity_and_the_gradient_reaches_its_projection() -> None:
    neck = MhsaNeck(16, depth=2, heads=4).double()
    x = maps(2, 16, 5, 3)
    assert torch.equal(neck(x), x)
    neck(x).square().sum().backward()
    for layer in neck:
        assert layer.projection.weight.grad.norm() > 0
        assert layer.projection.bias.grad.norm() > 0
        assert not layer.value.weight.grad.any()  # behind a projection of zero


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 7)])
def test_attention_equals_plain_softmax(grid: tuple[int, int]) -> None:
    layer = trained_layer()
    x = maps(2, 16, *grid)
    got = layer(x)
    positions = sincos_positions(*grid, 16, device=x.device).double()
    for b in range(2):
        tokens = layer.norm(x[b].flatten(1).T)  # (N, C)
        both = layer.query_key(tokens + positions)
        query, key, value = (a.numpy() for a in (both[:, :16], both[:, 16:], layer.value(tokens)))
        heads = [slice(4 * h, 4 * h + 4) for h in range(4)]
        mixed = np.concatenate(
            [reference.attention(query[:, h], key[:, h], value[:, h]) for h in heads], axis=1
        )
        expected = x[b].flatten(1).T + layer.projection(torch.from_numpy(mixed))
        torch.testing.assert_close(got[b].flatten(1).T, expected)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4)])
def test_its_attention_is_what_it_mixes_values_by(grid: tuple[int, int]) -> None:
    layer = trained_layer()
    x = maps(2, 16, *grid)
    tokens = layer.norm(x.flatten(2).transpose(1, 2))  # (B, N, C)
    values = layer.value(tokens).unflatten(2, (4, 4))  # (B, N, heads, C / heads)
    places = itertools.product(range(grid[0]), range(grid[1]))
    weights = torch.stack([layer.attention(x, *place).flatten(2) for place in places], dim=2)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]))
    mixed = torch.einsum("bhnm,bmhc->bnhc", weights, values).flatten(2)  # (B, N, C)
    expected = x + layer.projection(mixed).transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(layer(x), expected)


def test_images_of_a_batch_do_not_see_one_another() -> None:
    layer = trained_layer()
    x = maps(3, 16, 4, 5)
    whole = layer(x)
    for b in range(3):
        torch.testing.assert_close(layer(x[b : b + 1])[0], whole[b])


def test_a_constant_map_stays_constant_whatever_the_positions() -> None:
    layer = trained_layer()
    pixel = maps(1, 16, 1, 1)
    # all values are equal, so their mean is too: the map of one pixel says it all
    torch.testing.assert_close(layer(pixel.expand(-1, -1, 6, 5)), layer(pixel).expand(-1, -1, 6, 5))


def test_it_relates_all_pixels_and_knows_where_they_are() -> None:
    layer = trained_layer()
    x = maps(1, 16, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)
    assert (gradient.abs().sum(dim=1) > 0).all()  # the first pixel looks at every other
    turned = layer(x.detach().flip(2))
    assert (turned.flip(2) - layer(x.detach())).norm() > 1e-3 * turned.norm()


def test_positions_do_not_depend_on_the_resolution() -> None:
    large = sincos_positions(9, 11, 30, device=torch.device("cpu")).view(9, 11, 30)
    small = sincos_positions(4, 5, 30, device=torch.device("cpu")).view(4, 5, 30)
    torch.testing.assert_close(large[:4, :5], small)
    codes = large.flatten(0, 1)
    assert torch.cdist(codes, codes)[~torch.eye(99, dtype=torch.bool)].min() > 0.1  # all differ


def test_channels_innermost_give_the_same_map() -> None:
    layer = trained_layer()
    x = maps(2, 16, 4, 5)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads=7 does not divide .* 512 channels; use one of"):
        MhsaNeck(512, depth=1, heads=7)
