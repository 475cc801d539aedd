import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pcd_ray.evaluate.figures import (
    loss_curve,
    pca_colours,
    pca_maps,
    segmentation_grid,
    views_grid,
)

HISTORY = [
    {
        "step": step,
        "train/loss": 9 - 0.1 * step,
        "train/loss_at_teacher": 6.0,
        "eval/knn_top1_pct": 20.0 + step,
    }
    for step in range(12)
]
BOXES = np.array([[3, 4, 50, 60, 0], [10, 0, 40, 30, 1]], np.float32)
RED, BLUE = (250, 10, 20), (15, 25, 240)


def _pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _share(png: bytes, color: tuple[int, int, int]) -> float:
    return float((_pixels(png) == np.array(color, np.uint8)).all(axis=2).mean())


def _plain(color: tuple[int, int, int], count: int = 2) -> NDArray[np.uint8]:
    return np.full((count, 16, 16, 3), color, np.uint8)


def test_curves_depend_on_steps_not_on_the_order_of_lines() -> None:
    assert loss_curve(HISTORY) == loss_curve(HISTORY[::-1])


def test_a_step_that_was_logged_again_after_a_resume_counts_once_and_as_logged_last() -> None:
    stale = [{"step": 5, "train/loss": 70.0, "eval/knn_top1_pct": 1.0}]
    assert loss_curve([*HISTORY[:5], *stale, *HISTORY[5:]]) == loss_curve(HISTORY)
    assert loss_curve([*HISTORY, *stale]) != loss_curve(HISTORY)


def test_only_logged_metrics_get_a_panel() -> None:
    bare = [{"step": line["step"], "train/loss": line["train/loss"]} for line in HISTORY]
    one, two = _pixels(loss_curve(bare)), _pixels(loss_curve(HISTORY))
    assert one.shape[1] < two.shape[1]


def test_the_loss_at_the_teacher_is_drawn_as_it_was_logged_whatever_one_step_stood_above_it() -> (
    None
):
    gaps = [{**line, "train/loss_above_teacher": 0.3 * line["step"]} for line in HISTORY]
    assert loss_curve(gaps) == loss_curve(HISTORY)
    assert loss_curve([{**line, "train/loss_at_teacher": 5.0} for line in HISTORY]) != loss_curve(
        HISTORY
    )
    bare = [{k: v for k, v in line.items() if k != "train/loss_at_teacher"} for line in HISTORY]
    assert loss_curve(bare) != loss_curve(HISTORY)
    old = {"train/loss_floor": 6.0, "train/loss_above_floor": 0.5}  # as runs were stored before
    assert loss_curve([line | old for line in bare]) == loss_curve(bare)


def test_a_single_logged_step_shows_its_loss_at_the_teacher_as_a_line() -> None:
    faint = np.array((0x6B, 0x72, 0x80), np.uint8)

    def longest(history: list[dict[str, float]]) -> int:
        return int((_pixels(loss_curve(history)) == faint).all(axis=2).sum(axis=1).max())

    line = {"step": 3, "train/loss": 9.0, "train/positive_cosine": 0.5}
    assert longest([line]) < 30  # letters alone
    assert longest([line | {"train/loss_at_teacher": 6.0}]) > 200


def test_the_unit_of_the_loss_is_shown() -> None:
    assert loss_curve(HISTORY) == loss_curve(HISTORY, loss_unit="nats")
    assert loss_curve(HISTORY) != loss_curve(HISTORY, loss_unit="")


def test_references_are_drawn_into_the_knn_panel() -> None:
    orange = (0xD5, 0x5E, 0x00)
    assert _share(loss_curve(HISTORY), orange) == 0
    assert (
        _share(loss_curve(HISTORY, knn_references={"untrained": 20.0, "teacher": 25.0}), orange)
        > 1e-4
    )


def test_a_history_without_known_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match="the 1 lines of metrics have none"):
        loss_curve([{"step": 0, "time/step_s": 0.1}])


def test_views_are_drawn_in_their_own_colours() -> None:
    both = views_grid(_plain(RED), _plain(BLUE), BOXES, BOXES)
    assert _share(both, RED) > 0.1
    assert _share(both, RED) == pytest.approx(_share(both, BLUE), rel=0.02)


def test_a_view_that_serves_both_networks_is_drawn_once() -> None:
    shared = views_grid(torch.from_numpy(_plain(RED)), None, torch.from_numpy(BOXES), BOXES)
    both = views_grid(_plain(RED), _plain(BLUE), BOXES, BOXES)
    assert _pixels(shared).shape[0] < 0.5 * _pixels(both).shape[0]
    assert _share(shared, RED) > 0.5


def test_a_map_of_rank_one_varies_in_red_alone() -> None:
    amounts = torch.linspace(-1, 1, 60).view(2, 1, 5, 6)
    direction = torch.tensor([0.1, -0.2, 0.9, 0.3]).view(1, 4, 1, 1)  # the largest is positive
    colours = pca_colours(amounts * direction + 5)
    np.testing.assert_array_equal(colours[..., 1:], 0.5)
    low, high = np.quantile(amounts, 0.02), np.quantile(amounts, 0.98)
    expected = np.clip((amounts[:, 0].numpy() - low) / (high - low), 0, 1)
    np.testing.assert_allclose(colours[..., 0], expected, atol=1e-5)


def test_components_come_in_order_of_variance_whatever_the_channels() -> None:
    parts = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = torch.cat([0.1 * parts[:, 2:], 9 * parts[:, :1], 3 * parts[:, 1:2]], dim=1)
    colours = torch.from_numpy(pca_colours(features)).permute(3, 0, 1, 2).flatten(1)
    for component in range(3):
        stacked = torch.stack([colours[component], parts[:, component].flatten()])
        assert torch.corrcoef(stacked)[0, 1] > 0.9


def test_all_images_share_one_basis_and_one_scale() -> None:
    features = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        pca_colours(features[order]), pca_colours(features)[order], atol=1e-5
    )


def test_a_constant_map_and_a_map_of_two_channels_are_drawn() -> None:
    assert (pca_colours(torch.full((2, 8, 3, 3), 0.1)) == 0.5).all()
    two = pca_colours(torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert (two[..., 2] == 0.5).all()
    assert (two[..., 1] != 0.5).any()


def test_maps_are_drawn_beside_their_images() -> None:
    left = pca_maps(_plain(RED), {"teacher": torch.ones(2, 4, 2, 2)})
    assert _share(left, RED) > 0.2
    assert _share(left, (127, 127, 127)) == pytest.approx(_share(left, RED), rel=0.02)


def test_equal_masks_look_equal_and_every_class_has_its_own_colour() -> None:
    mask = np.repeat(np.arange(24, dtype=np.uint8), 32).reshape(24, 32).repeat(2, axis=0)
    classes = [f"class {index}" for index in range(30)]
    image = np.zeros((48, 32, 3), np.uint8)
    png = segmentation_grid([image], [mask], {"student": [mask], "teacher": [mask]}, classes)
    colours, counts = np.unique(_pixels(png).reshape(-1, 3), axis=0, return_counts=True)
    large = {tuple(map(int, colour)) for colour in colours[counts > 2000]}
    page, ink, image_itself = (255, 255, 255), (0x2B, 0x2F, 0x36), (0, 0, 0)
    assert len(large - {page, ink, image_itself}) == 24


def test_the_legend_names_void_only_where_it_is() -> None:
    image, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    void = mask.copy()
    void[0, 0] = 255
    grey = (0xE8, 0xE8, 0xE8)
    assert _share(segmentation_grid([image], [mask], {"a": [mask]}, ["x"]), grey) == 0
    shown = segmentation_grid([image], [void], {"a": [mask]}, ["x"])
    assert _share(shown, grey) > 0
