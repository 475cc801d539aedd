"""Generated scenes: the same for the same seed, exact masks, and the layout that readers expect."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcd_ray.data.image_index import classes_of
from pcd_ray.data.scenes import CLASSES, Scene, _Canvas, _paint_object, make_scene, write_scenes
from pcd_ray.data.sources import list_images


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, 64) for seed in range(300)]


def test_the_seed_is_the_scene() -> None:
    one, again, other = make_scene(5, 48), make_scene(5, 48), make_scene(6, 48)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.mask, again.mask)
    assert not np.array_equal(one.mask, other.mask)


def _canvas(colour: float) -> _Canvas:
    y, x = np.mgrid[0:64, 0:64] / 64 + 0.5 / 64
    return _Canvas(x, y, np.full((64, 64, 3), colour), np.zeros((64, 64), np.uint8))


@pytest.mark.parametrize("seed", range(25))
def test_the_mask_is_where_the_object_was_painted(seed: int) -> None:
    # on a canvas of -1000 an object in [0, 1] shows its cover: over half of it is inside
    canvas = _canvas(-1000.0)
    _paint_object(np.random.default_rng(seed), canvas, (0.15, 0.3))
    value = canvas.image.mean(axis=-1)
    on_the_edge = np.abs(value + 500) < 1  # the colour itself moves the middle by up to 0.5
    inside = canvas.mask > 0
    assert np.array_equal(inside[~on_the_edge], (value > -500)[~on_the_edge])
    assert on_the_edge.sum() <= 4
    assert len(set(canvas.mask[inside].tolist())) == 1


def test_later_objects_cover_earlier_ones() -> None:
    rng, canvas = np.random.default_rng(0), _canvas(0.0)
    for _ in range(6):
        before = canvas.mask.copy()
        _paint_object(rng, canvas, (0.15, 0.3))
        changed = canvas.mask[before != canvas.mask]
        assert len(set(changed.tolist())) <= 1  # one object, one class
        assert (changed > 0).all()  # nothing turns back into background


def test_masks_do_not_depend_on_the_size() -> None:
    # each pixel of 48 covers 2 x 2 of 96: the majority agrees except along outlines
    disagreeing = []
    for seed in range(20):
        small, large = make_scene(seed, 48).mask, make_scene(seed, 96).mask
        whole = large.reshape(48, 2, 48, 2).swapaxes(1, 2).reshape(48, 48, 4)
        uniform = (whole == whole[..., :1]).all(-1)
        disagreeing.append((small != whole[..., 0])[uniform].mean())
    assert np.mean(disagreeing) < 0.01


def test_the_label_is_the_object_that_shows_most(scenes: list[Scene]) -> None:
    for scene in scenes:
        counts = np.bincount(scene.mask.ravel(), minlength=len(CLASSES))
        assert counts.size == len(CLASSES)
        assert scene.label >= 1
        assert counts[scene.label] == counts[1:].max() > 0


def test_every_class_is_a_label_about_equally_often(scenes: list[Scene]) -> None:
    counts = np.bincount([scene.label for scene in scenes], minlength=len(CLASSES))[1:]
    # 300 scenes, 6 classes: 50 each, deviation 6.5; shapes differ in area, hence a wide band
    assert counts.min() >= 15
    assert counts.max() <= 95


def test_mean_colour_does_not_give_the_class_away(scenes: list[Scene]) -> None:
    # the nearest class mean in mean RGB, on the scenes that the means come from, stays near chance
    colours = np.array([scene.image[scene.mask == scene.label].mean(0) for scene in scenes])
    labels = np.array([scene.label for scene in scenes])
    means = np.array([colours[labels == label].mean(0) for label in range(1, len(CLASSES))])
    nearest = 1 + np.linalg.norm(colours[:, None] - means, axis=-1).argmin(1)
    assert (nearest == labels).mean() < 0.35  # chance 0.17


def test_scenes_are_written_where_packing_and_the_probe_look(tmp_path: Path) -> None:
    write_scenes(
        str(tmp_path), num_train=40, num_test=25, size_px=32, seed=1, num_segmentation=(3, 2)
    )
    for split, count in (("train", 40), ("test", 25)):
        index = list_images(str(tmp_path / split))
        assert index.num_rows == count
        assert set(classes_of(index)) <= {name.replace(" ", "_") for name in CLASSES[1:]}
    probe = tmp_path / "segmentation"
    assert (probe / "classes.txt").read_text().splitlines() == list(CLASSES)
    names = [(probe / f"{split}.txt").read_text().split() for split in ("train", "val")]
    assert [len(split) for split in names] == [3, 2]
    for name in names[0] + names[1]:
        with Image.open(probe / "masks" / f"{name}.png") as mask:
            assert mask.mode == "L"
            assert np.asarray(mask).max() < len(CLASSES)
        with Image.open(probe / "images" / f"{name}.jpg") as image:
            assert image.size == (32, 32)


def test_no_scene_stands_in_two_splits(tmp_path: Path) -> None:
    write_scenes(
        str(tmp_path), num_train=12, num_test=12, size_px=16, seed=0, num_segmentation=(12, 12)
    )
    contents = [path.read_bytes() for path in sorted(tmp_path.rglob("*.jpg"))]
    assert len(contents) == 48
    assert len(set(contents)) == 48
