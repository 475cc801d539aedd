import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.segment.sliding_window import predicted_mask, window_starts, windowed_logits


def wide(images: Tensor, height: int, width: int) -> Tensor:
    """Logits of 3 classes that see 15 pixels, at a quarter of the size."""
    x = images.permute(0, 3, 1, 2).double()
    x = F.avg_pool2d(F.avg_pool2d(x, 7, stride=1, padding=3), 4, stride=4, ceil_mode=True)
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def pointwise(images: Tensor, height: int, width: int) -> Tensor:
    """Logits that see their own pixel alone."""
    assert (height, width) == images.shape[1:3]
    return images.permute(0, 3, 1, 2).double().sqrt()


@pytest.fixture
def image() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (21, 34, 3), generator=random, dtype=torch.uint8)


def test_windows_cover_a_side_and_end_with_it() -> None:
    assert window_starts(10, 4, 3) == [0, 3, 6]
    assert window_starts(11, 4, 3) == [0, 3, 6, 7]
    assert window_starts(4, 4, 3) == window_starts(3, 4, 3) == [0]
    for full in range(1, 40):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                starts = window_starts(full, window, stride)
                seen = {place for start in starts for place in range(start, start + window)}
                assert seen >= set(range(full))
                assert max(starts) + window <= max(full, window)
                assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("window", [0, 34, 100])
def test_a_window_that_covers_the_image_is_the_whole_image(image: Tensor, window: int) -> None:
    whole = wide(image[None], 42, 68).argmax(dim=1)[0]
    found = predicted_mask(wide, image, size_px=(42, 68), window_px=window)
    assert torch.equal(found.long(), whole)
    if window:
        torch.testing.assert_close(
            windowed_logits(wide, image, window_px=window, stride_px=5), wide(image[None], 21, 34)
        )


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (25, 0), (5, 1)])
def test_logits_of_single_pixels_do_not_depend_on_windows(
    image: Tensor, window: int, stride: int
) -> None:
    found = windowed_logits(pointwise, image, window_px=window, stride_px=stride)
    torch.testing.assert_close(found, pointwise(image[None], 21, 34))


def test_logits_are_averaged_where_windows_overlap(image: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(part: Tensor, height: int, width: int) -> Tensor:
        value = torch.full((1, 2, height, width), float(len(seen) + 1), dtype=torch.float64)
        seen.append((part, value))
        return value

    found = windowed_logits(noted, image[:4, :6], window_px=4, stride_px=2)
    assert found[0, 0, 0].tolist() == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    assert torch.equal(seen[1][0][0], image[:4, 2:6])


def test_masks_of_another_size_than_the_image(image: Tensor) -> None:
    found = predicted_mask(wide, image, size_px=(63, 102), window_px=16, stride_px=8)
    windowed = windowed_logits(wide, image, window_px=16, stride_px=8)
    enlarged = F.interpolate(windowed, size=(63, 102), mode="bilinear", align_corners=False)
    assert torch.equal(found.long(), enlarged.argmax(dim=1)[0])


def test_logits_that_are_not_finite_are_refused(image: Tensor) -> None:
    with pytest.raises(EvaluationError, match="infinite or NaN"):
        predicted_mask(lambda *a: wide(*a) / 0, image, size_px=(21, 34))
