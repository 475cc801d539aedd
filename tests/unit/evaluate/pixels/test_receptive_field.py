import math

import numpy as np
import pytest
import torch
from networks import small_backbone
from numpy.typing import NDArray
from tiny import images
from torch import Tensor, nn

from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.pixels.receptive_field import (
    area_50_side,
    area_50_square,
    effective_receptive_field,
)

SIZE = 21


def _plain_convolutions(kernel: int, depth: int) -> nn.Sequential:
    """Linear convolutions of equal weights on the sum of colours."""
    layers = [nn.Conv2d(1 if i else 3, 1, kernel, padding=kernel // 2) for i in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 0.37)
    return nn.Sequential(*layers)


def _field(network: nn.Module, pixels: Tensor | None = None) -> Tensor:
    inputs = images(0, 2, SIZE) if pixels is None else pixels
    return effective_receptive_field(lambda x: network(x.permute(0, 3, 1, 2).float()), inputs)


def _smallest_square(field: NDArray[np.float64]) -> int:
    """The side at 50%, by trying all squares."""
    for side in range(1, max(field.shape) + 1):
        for top in range(len(field) - side + 1):
            for left in range(field.shape[1] - side + 1):
                if field[top : top + side, left : left + side].sum() >= 0.5 * field.sum() - 1e-12:
                    return side
    raise AssertionError("no square holds half")


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_the_field_of_a_plain_convolution_is_its_kernel(kernel: int) -> None:
    field = _field(_plain_convolutions(kernel, 1))
    middle, reach = SIZE // 2, kernel // 2
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    expected[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1] = kernel**-2
    torch.testing.assert_close(field, expected, rtol=1e-6, atol=0)
    assert area_50_side(field) == math.ceil(kernel / math.sqrt(2))


@pytest.mark.parametrize("depth", [2, 4])
def test_stacked_convolutions_have_the_field_of_repeated_sums(depth: int) -> None:
    row = np.ones(1)
    for _ in range(depth):
        row = np.convolve(row, np.ones(3))  # how many ways lead there
    expected = np.zeros((SIZE, SIZE))
    inner = slice(SIZE // 2 - depth, SIZE // 2 + depth + 1)
    expected[inner, inner] = np.outer(row, row) / 9**depth
    field = _field(_plain_convolutions(3, depth))
    np.testing.assert_allclose(field, expected, rtol=1e-5)
    assert area_50_side(field) == _smallest_square(expected)


def test_gradients_are_taken_absolutely_and_averaged_over_images() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 100).square().sum(dim=1, keepdim=True)  # gradient: 2 (x - 100)

    pixels = images(3, 5, 1)
    pixels[0] = 99  # its gradient is negative
    alone = [_field(Square(), pixels[i : i + 1]) for i in range(5)]
    assert all(float(field) == 1 for field in alone)

    class TwoPixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square()(x).sum(dim=(2, 3), keepdim=True)

    pixels = images(4, 5, 2)
    expected = (pixels.double() - 100).abs().sum(dim=(0, 3))
    torch.testing.assert_close(_field(TwoPixels(), pixels), expected / expected.sum())


def test_channels_that_cancel_in_a_plain_sum_count() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 5, padding=2)
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x).movedim(1, 3)).movedim(3, 1)

    torch.manual_seed(0)
    field = _field(Normed())
    inside = field[8:13, 8:13]
    assert float(inside.sum()) == pytest.approx(1)
    assert float(inside.min()) > 0.01  # an even share is 0.04


def test_a_neck_changes_nothing_before_training_and_reaches_all_positions_after() -> None:
    backbone = small_backbone(0, 8).eval()
    neck = MhsaNeck(8, depth=1, heads=2).eval()
    pixels = images(1, 3, 64)
    bare = effective_receptive_field(backbone, pixels)
    assert torch.equal(
        effective_receptive_field(nn.Sequential(backbone, neck).eval(), pixels), bare
    )
    nn.init.normal_(neck[0].projection.weight, generator=torch.Generator().manual_seed(0))
    wide = effective_receptive_field(nn.Sequential(backbone, neck).eval(), pixels)
    cells = wide.unfold(0, 8, 8).unfold(1, 8, 8).sum(dim=(2, 3))  # (8, 8): a cell per position
    assert (cells > 0).all()
    assert int((bare > 0).sum()) <= 9 * 9  # patches of 4 behind windows of 3, two pixels apart
    assert area_50_side(wide) > area_50_side(bare)


def test_it_does_not_need_gradients_to_be_on_and_leaves_none() -> None:
    backbone = small_backbone(0, 8).eval()
    with torch.no_grad():
        field = effective_receptive_field(backbone, images(1, 1, 64))
    assert float(field.sum()) == pytest.approx(1)
    assert all(weight.grad is None for weight in backbone.parameters())


def test_a_map_that_no_pixel_moves_has_an_empty_field() -> None:
    network = _plain_convolutions(3, 1)
    nn.init.zeros_(network[0].weight)
    assert not _field(network).any()


def test_gradients_that_are_no_numbers_are_refused() -> None:
    network = _plain_convolutions(3, 1)
    nn.init.constant_(network[0].weight, math.nan)
    with pytest.raises(EvaluationError, match="add up to nan"):
        _field(network)


@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (14, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_square_is_the_smallest_that_holds_half(shape: tuple[int, int], seed: int) -> None:
    field = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double() ** 4
    side, top, left = area_50_square(field)
    padded = np.pad(field.numpy(), 14)  # it may stand out of the image
    assert side == _smallest_square(padded)
    held = padded[14 + top : 14 + top + side, 14 + left : 14 + left + side].sum()
    assert held >= 0.5 * float(field.sum()) - 1e-12


def test_the_square_lies_where_the_field_is() -> None:
    field = torch.zeros(20, 30)
    field[3:7, 11:15] = 1
    side, top, left = area_50_square(field)
    assert side == 3  # 9 of 16; 2 x 2 hold 4
    assert top in (3, 4)
    assert left in (11, 12)
