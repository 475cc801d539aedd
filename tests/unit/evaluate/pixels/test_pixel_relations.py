import numpy as np
import pytest
import torch
from networks import small_backbone
from tiny import images
from torch import Tensor, nn

from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.student import Student
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.pixels.pixel_relations import (
    attention_maps,
    pixel_of,
    position_of,
    similarity_map,
)

IMAGE, OTHER = images(0, 2, 64)


def _student(depth: int) -> Student:
    neck = MhsaNeck(8, depth=depth, heads=2)
    for layer in neck:
        nn.init.normal_(layer.projection.weight, generator=torch.Generator().manual_seed(depth))
    return Student(small_backbone(0, 8), neck, []).eval()


def _colours(pixels: Tensor) -> Tensor:
    """A map of one position per pixel: its colour."""
    return pixels.permute(0, 3, 1, 2).float()


def test_a_pixel_belongs_to_the_cell_that_it_lies_in() -> None:
    cells = [position_of((x, 0), (10, 64), (1, 4))[1] for x in range(64)]
    assert cells == [x // 16 for x in range(64)]
    # 10 pixels over 3 rows: cells of three and a third
    rows = [position_of((0, y), (10, 64), (3, 4))[0] for y in range(10)]
    assert rows == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_shares_reach_from_the_first_to_the_last_pixel() -> None:
    assert pixel_of((0, 0), 30, 50) == (0.5, 0.5)
    assert pixel_of((1, 1), 30, 50) == (49.5, 29.5)
    assert pixel_of((0.5, 0.1), 30, 50) == (25.5, 3.5)
    assert position_of(pixel_of((1, 1), 30, 50), (30, 50), (7, 9)) == (6, 8)


@pytest.mark.parametrize("pixel", [(64, 0), (0, 64), (-1, 5)])
def test_a_pixel_outside_the_image_is_refused(pixel: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"is outside the image of 64 x 64 pixels; give x in"):
        similarity_map(_colours, IMAGE, pixel)


def test_colours_at_right_angles_have_cosine_zero_and_equal_ones_one() -> None:
    image = torch.zeros(4, 6, 3, dtype=torch.uint8)
    image[:, :3, 0] = 200  # red on the left
    image[:, 3:, 2] = torch.tensor([10, 60, 250], dtype=torch.uint8)  # blue, however bright
    image[0, 0] = 0  # black has no direction
    expected = torch.zeros(4, 6)
    expected[:, 3:] = 1
    torch.testing.assert_close(similarity_map(_colours, image, (4, 2)), expected)
    expected = 1 - expected
    expected[0, 0] = 0
    torch.testing.assert_close(similarity_map(_colours, image, (0, 3)), expected)


@pytest.mark.parametrize("other", [None, OTHER])
def test_similarity_is_the_cosine_of_features(other: Tensor | None) -> None:
    network = small_backbone(0, 8).eval()
    own = frozen_map(network, IMAGE[None])[0].numpy()  # (8, 8, 8): positions of 8 pixels
    compared = own if other is None else frozen_map(network, other[None])[0].numpy()
    feature = own[:, 5, 2]
    norms = np.linalg.norm(feature) * np.linalg.norm(compared, axis=0)
    expected = np.tensordot(feature, compared, 1) / norms
    found = similarity_map(network, IMAGE, (16, 47), other=other)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if other is None:
        assert float(found[5, 2]) == pytest.approx(1)


def test_attention_of_a_layer_is_on_the_map_that_the_layer_gets() -> None:
    student = _student(2)
    found = attention_maps(student, IMAGE, (16, 47))
    assert found.shape == (2, 2, 8, 8)
    torch.testing.assert_close(found.sum(dim=(2, 3)), torch.ones(2, 2))
    with torch.no_grad():
        first = student.backbone(IMAGE[None])
        second = student.neck[0](first)
        expected = [
            student.neck[0].attention(first, 5, 2)[0],
            student.neck[1].attention(second, 5, 2)[0],
        ]
    torch.testing.assert_close(found, torch.stack(expected))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_student_without_neck_has_no_attention() -> None:
    with pytest.raises(ValueError, match=r"no MHSA neck \(student\.mhsa\.depth=0\)"):
        attention_maps(_student(0), IMAGE, (0, 0))


def test_a_network_in_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        similarity_map(small_backbone(0, 8).train(), IMAGE, (0, 0))
