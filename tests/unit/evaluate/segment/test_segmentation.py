from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentation_folder import painted, painted_set, random_mask, write_set
from torch import Tensor

from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.segment.segmentation import linear_probe_miou, upsampled
from pcd_ray.evaluate.segment.segmentation_data import open_segmentation


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep thousands of tiny products from waiting for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _colours(images: Tensor) -> Tensor:
    """Return a map of stride 1 whose channels have very different scales."""
    scales = torch.tensor([1.0, 1e-3, 1e4])
    return (images * scales).permute(0, 3, 1, 2)


def _block_colours(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 4)


def _constant(images: Tensor) -> Tensor:
    return torch.full((len(images), 5, images.shape[1] // 4, images.shape[2] // 4), 7.3)


def _noise(images: Tensor) -> Tensor:
    """Return features that know the image, hence are repeatable, and nothing of its classes."""
    rows = [
        torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(int(image.sum())))
        for image in images
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("height", [3, 20, 45])
def test_upsampling_by_matrices_equals_bilinear_interpolation(height: int) -> None:
    logits = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = F.interpolate(
        logits.permute(0, 3, 1, 2), size=(height, 31), mode="bilinear", align_corners=False
    )
    found = upsampled(logits, height=height, width=31).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)


def test_classes_that_a_line_separates_are_found_whole(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path))
    score = linear_probe_miou(_colours, data, seed=0, num_steps=200).scores["val"]
    assert (score.miou_pct, score.macc_pct, score.aacc_pct) == (100, 100, 100)
    assert score.iou_pct == {"sky": 100, "road": 100, "tree": 100}


def test_a_coarse_map_is_right_between_positions_of_one_class(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path, block=8))  # two positions of 4 px a side
    result = linear_probe_miou(_block_colours, data, seed=0, num_steps=300)
    images, masks = next(data.batches("val", batch_size=8))
    predicted = result.predict(_block_colours, images)
    rows, columns = torch.arange(16) % 8, torch.arange(24) % 8
    between = ((rows >= 2) & (rows < 6))[:, None] & ((columns >= 2) & (columns < 6))
    torch.testing.assert_close(predicted[:, between], masks[:, between], rtol=0, atol=0)
    assert result.scores["val"].miou_pct > 80


@pytest.mark.parametrize("feature_map", [_constant, _noise])
def test_features_without_information_score_the_floor(tmp_path: Path, feature_map: object) -> None:
    data = open_segmentation(painted_set(tmp_path, train=40, val=10))
    masks = torch.cat([masks for _, masks in data.batches("val", batch_size=10)])
    share = float((masks == 0).float().mean())  # the likeliest class, predicted everywhere
    assert callable(feature_map)
    score = linear_probe_miou(feature_map, data, seed=0, num_steps=200).scores["val"]
    assert score.aacc_pct == pytest.approx(100 * share, abs=1e-4)
    assert score.miou_pct == pytest.approx(100 * share / 3, abs=1e-4)
    assert score.macc_pct == pytest.approx(100 / 3)


def test_void_pixels_neither_teach_nor_count(tmp_path: Path) -> None:
    masks = [random_mask(seed) for seed in range(14)]
    images = [painted(mask) for mask in masks]
    for image, mask in zip(images, masks, strict=True):
        image[:12] = painted(2 - mask[:12])  # three quarters of each image lie ...
        mask[:12] = 255  # ... and are void
    pairs = list(zip(images, masks, strict=True))
    data = open_segmentation(write_set(tmp_path, {"train": pairs[:10], "val": pairs[10:]}))
    result = linear_probe_miou(_colours, data, seed=0, num_steps=200)
    assert result.scores["val"].miou_pct == 100


def test_images_of_several_sizes_and_resized_images_are_scored_in_full_size(tmp_path: Path) -> None:
    masks = [random_mask(seed, height=16 + 16 * (seed % 2)) for seed in range(12)]
    pairs = [(painted(mask), mask) for mask in masks]
    uri = write_set(tmp_path, {"train": pairs[:8], "val": pairs[8:]})
    whole = linear_probe_miou(_colours, open_segmentation(uri), seed=0, num_steps=200)
    assert whole.scores["val"].miou_pct == 100
    half = linear_probe_miou(_colours, open_segmentation(uri, size_px=8), seed=0, num_steps=200)
    assert 60 < half.scores["val"].miou_pct < 100  # a coarser view of the same, full-size truth


def test_the_seed_fixes_the_result_and_the_batch_size_does_not_touch_it(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path, train=20))
    first, again, other = (
        linear_probe_miou(_noise, data, seed=seed, num_steps=30, batch_size=size)
        for seed, size in ((0, 16), (0, 3), (1, 16))
    )
    assert first.scores == again.scores
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_scale_and_offset_of_channels_do_not_matter(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path, train=8))
    plain = linear_probe_miou(_block_colours, data, seed=0, num_steps=30)
    moved = linear_probe_miou(lambda x: 50 * _block_colours(x) - 999, data, seed=0, num_steps=30)
    assert moved.scores["val"].miou_pct == pytest.approx(plain.scores["val"].miou_pct, abs=0.5)
    torch.testing.assert_close(50 * moved.head.weight, plain.head.weight, rtol=1e-3, atol=1e-6)


def test_each_split_asked_for_is_scored_by_one_probe(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path))
    both = linear_probe_miou(_block_colours, data, seed=0, splits=("train", "val"), num_steps=30)
    val = linear_probe_miou(_block_colours, data, seed=0, num_steps=30)
    assert list(both.scores) == ["train", "val"]
    assert both.scores["val"] == val.scores["val"]


def test_predicted_masks_are_those_that_were_scored(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path))
    result = linear_probe_miou(_block_colours, data, seed=0, num_steps=50)
    right = total = 0
    for images, masks in data.batches("val", batch_size=2):
        predicted = result.predict(_block_colours, images, size_px=(16, 24))
        assert predicted.dtype == torch.uint8
        right += int((predicted == masks).sum())
        total += masks.numel()
    assert result.scores["val"].aacc_pct == pytest.approx(100 * right / total)


def test_unusable_sets_and_features_are_refused(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path / "good"))
    with pytest.raises(ShardError, match="no split 'test'"):
        linear_probe_miou(_colours, data, seed=0, splits=("test",))
    with pytest.raises(EvaluationError, match="12 of 12 images have infinite or NaN"):
        linear_probe_miou(lambda x: _colours(x) / 0, data, seed=0)
    void = np.full((16, 24), 255, np.uint8)
    pair = (painted(random_mask(0)), void)
    data = open_segmentation(write_set(tmp_path / "void", {"train": [pair], "val": [pair]}))
    with pytest.raises(ShardError, match="train has 0 labelled pixels"):
        linear_probe_miou(_colours, data, seed=0)
