import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pcd_ray.evaluate.pixels.pixel_figures import (
    attention_figure,
    receptive_field_figure,
    similarity_figure,
)

BLACK = np.zeros((2, 32, 32, 3), np.uint8)
LOW, HIGH, MARK = (68, 1, 84), (253, 231, 36), (0xD5, 0x5E, 0)
"""The ends of the colour map, and the colour of marks."""


def _pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _count(png: bytes, color: tuple[int, int, int]) -> int:
    distance = np.abs(_pixels(png).astype(int) - np.array(color)).max(axis=2)
    return int((distance <= 1).sum())


def _halves() -> torch.Tensor:
    """Two maps whose left half is alike and whose right half is not."""
    maps = torch.zeros(2, 8, 8)
    maps[:, :, :4] = 1
    return maps


def test_alike_and_unlike_have_the_ends_of_the_scale() -> None:
    png = similarity_figure(BLACK, {"student": _halves()}, [None, None])
    assert _count(png, HIGH) == pytest.approx(_count(png, LOW), rel=0.05)
    assert _count(png, HIGH) + _count(png, LOW) > 0.2 * _pixels(png)[..., 0].size


def test_each_network_has_its_own_scale() -> None:
    weak = 0.9 + 0.01 * _halves()
    both = similarity_figure(BLACK, {"a": _halves(), "b": weak}, [None, None])
    same = similarity_figure(BLACK, {"a": _halves(), "b": _halves()}, [None, None])
    assert _count(both, HIGH) == pytest.approx(_count(same, HIGH), rel=0.02)


def test_a_pixel_is_marked_where_it_is_and_nowhere_else() -> None:
    maps = {"student": _halves()}
    none = similarity_figure(BLACK, maps, [None, None])
    one = similarity_figure(BLACK, maps, [(8.5, 8.5), None])
    two = similarity_figure(BLACK, maps, [(8.5, 8.5), (8.5, 8.5)])
    assert _count(none, MARK) == 0
    assert _count(two, MARK) == pytest.approx(2 * _count(one, MARK), rel=0.1)
    moved = _pixels(similarity_figure(BLACK, maps, [(24.5, 8.5), None])) != _pixels(one)
    assert moved[: len(moved) // 2].any()
    assert not moved[len(moved) // 2 :].any()


def test_attention_is_drawn_for_every_image_layer_and_head() -> None:
    def drawn(layers: int, heads: int) -> int:
        peak = torch.zeros(layers, heads, 4, 4)
        peak[..., :2, :] = 1 / 8
        png = attention_figure(BLACK, [peak, peak], [(16.5, 16.5)] * 2)
        return _count(png, HIGH) + _count(png, LOW)

    assert drawn(2, 8) == pytest.approx(2 * drawn(1, 8), rel=0.1)
    assert drawn(1, 16) == pytest.approx(2 * drawn(1, 8), rel=0.1)
    assert drawn(1, 12) == pytest.approx(1.5 * drawn(1, 8), rel=0.1)


def test_every_field_gets_its_frame() -> None:
    field = torch.zeros(64, 64, dtype=torch.float64)
    field[16:48, 16:48] = 1 / 32**2
    one = _count(receptive_field_figure({"a": field}), MARK)
    assert one > 100
    many = receptive_field_figure(dict.fromkeys("abcde", field))
    four = receptive_field_figure(dict.fromkeys("abcd", field))
    assert _count(many, MARK) == pytest.approx(1.25 * _count(four, MARK), rel=0.1)


def test_a_field_of_nothing_is_drawn() -> None:
    assert _count(receptive_field_figure({"dead": torch.zeros(16, 16)}), LOW) > 1000
