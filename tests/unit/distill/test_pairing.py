import pytest
import reference
import torch
from torch import Tensor

from pcd_ray.distill.pairing import Pairs, pair_positions, pick

GRIDS = [(7, 7), (5, 3), (1, 4)]


def boxes(seed: int, count: int) -> Tensor:
    """Random crops of a 640 x 480 image, with and without flip."""
    random = torch.Generator().manual_seed(seed)
    share = torch.rand(count, 5, generator=random)
    width, height = 40 + share[:, 2] * 600, 40 + share[:, 3] * 440
    left, top = share[:, 0] * (640 - width), share[:, 1] * (480 - height)
    return torch.stack([left, top, width, height, (share[:, 4] < 0.5).float()], dim=1)


def geometric(
    student: Tensor, teacher: Tensor, grid: tuple[int, int], radius: float = 0.7
) -> Pairs:
    return pair_positions("cross_view_geometric", student, teacher, grid=grid, radius=radius)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_view_paired_with_itself_pairs_each_position_with_itself(grid: tuple[int, int]) -> None:
    box = boxes(0, 20)
    pairs = geometric(box, box, grid)
    own = torch.arange(grid[0] * grid[1]).expand(20, -1)
    assert torch.equal(pairs.positions, own)
    assert torch.equal(pairs.weights, torch.ones_like(own, dtype=torch.float32))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_mirrored_view_pairs_mirrored_columns(grid: tuple[int, int]) -> None:
    box = boxes(1, 20)
    mirrored = box.clone()
    mirrored[:, 4] = 1 - box[:, 4]
    pairs = geometric(box, mirrored, grid)
    index = torch.arange(grid[0] * grid[1]).view(grid)
    assert torch.equal(pairs.positions, index.flip(1).flatten().expand(20, -1))
    assert pairs.weights.all()


def test_crops_side_by_side_pair_nothing() -> None:
    student = torch.tensor([[0.0, 0, 100, 100, 0], [0, 0, 100, 100, 1]])
    teacher = torch.tensor([[200.0, 0, 100, 100, 0], [0, 300, 100, 100, 0]])
    assert not geometric(student, teacher, (7, 7)).weights.any()


def test_a_crop_shifted_by_two_cells_pairs_shifted_positions() -> None:
    student = torch.tensor([[0.0, 0, 70, 70, 0]])
    teacher = torch.tensor([[20.0, 0, 70, 70, 0]])
    pairs = geometric(student, teacher, (7, 7), radius=0.5)
    positions, weights = pairs.positions.view(7, 7), pairs.weights.view(7, 7)
    index = torch.arange(49).view(7, 7)
    assert torch.equal(positions[:, 2:], index[:, :5])
    # the half diagonal is 7.07 pixels: the first two columns lie 20 and 10 outside
    assert torch.equal(weights, (torch.arange(7) >= 2).float().expand(7, 7))


@pytest.mark.parametrize("radius", [0.3, 0.7, 2.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_pairs_of_random_crops_equal_the_reference(grid: tuple[int, int], radius: float) -> None:
    student, teacher = boxes(2, 40), boxes(3, 40)
    pairs = geometric(student, teacher, grid, radius)
    paired = 0
    for b in range(40):
        expected = reference.pairs(student[b].tolist(), teacher[b].tolist(), grid, radius)
        for i, position in enumerate(expected):
            assert bool(pairs.weights[b, i]) == (position is not None)
            if position is not None:
                assert pairs.positions[b, i] == position
                paired += 1
    assert 0 < paired < 40 * grid[0] * grid[1]


@pytest.mark.parametrize("kind", ["same_view", "cross_view_index"])
def test_pairs_by_index_leave_the_teacher_as_it_is(kind: str) -> None:
    pairs = pair_positions(kind, boxes(4, 3), boxes(5, 3), grid=(7, 7), radius=0.7)
    assert pairs.positions is None
    assert pairs.weights is None
    pixels = torch.randn(3, 49, 8)
    assert pick(pixels, pairs) is pixels


def test_pick_takes_the_pixel_of_each_position() -> None:
    pairs = geometric(boxes(6, 5), boxes(7, 5), (4, 3))
    pixels = torch.randn(5, 12, 8)
    picked = pick(pixels, pairs)
    for b in range(5):
        for i in range(12):
            assert torch.equal(picked[b, i], pixels[b, pairs.positions[b, i]])
