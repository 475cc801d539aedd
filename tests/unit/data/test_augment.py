"""Laws of the views: seeds, boxes, independence of draws, and equality with torchvision."""

import dataclasses
import io
import math
import resource

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from pcd_ray.data.augment import (
    ViewRecipe,
    Views,
    eval_view,
    make_views,
    shifted_hue,
    teacher_view_of_bytes,
    views_of_bytes,
)
from pcd_ray.seeds import derive_seed

PLAIN = ViewRecipe(
    image_size_px=48,
    min_scale=0.08,
    max_scale=1.0,
    flip_prob=0.5,
    jitter_prob=0.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_prob=0.0,
    student_blur_prob=0.0,
    teacher_blur_prob=0.0,
    student_solarize_prob=0.0,
    teacher_solarize_prob=0.0,
    swap_colors=False,
    two_crops=False,
    two_colours=False,
)
FULL = dataclasses.replace(
    PLAIN,
    jitter_prob=0.8,
    grey_prob=0.2,
    student_blur_prob=1.0,
    teacher_blur_prob=0.1,
    teacher_solarize_prob=0.2,
    swap_colors=True,
    two_crops=True,
    two_colours=True,
)


def _photo(width: int = 160, height: int = 120) -> Image.Image:
    """Return an image with structure at all scales: gradients, waves and noise."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    waves = [np.sin(x / 9 + k) + np.cos(y / (5 + k)) + (x + 2 * y) / 200 for k in range(3)]
    pixels = 110 + 40 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _same(one: Views, two: Views) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in Views.__slots__)


def test_the_seed_is_the_views() -> None:
    views = [make_views(_photo(), FULL, seed) for seed in (5, 5, 6)]
    assert _same(views[0], views[1])
    assert not np.array_equal(views[0].student, views[2].student)
    assert not np.array_equal(views[0].student_box, views[2].student_box)


def test_one_view_serves_both_networks_unless_asked_otherwise() -> None:
    views = make_views(_photo(), PLAIN, 0)
    assert views.teacher is None
    assert np.array_equal(views.student_box, views.teacher_box)


def test_two_colours_of_one_crop_share_the_box() -> None:
    recipe = dataclasses.replace(FULL, two_crops=False)
    views = make_views(_photo(), recipe, 1)
    assert np.array_equal(views.student_box, views.teacher_box)
    assert views.teacher is not None
    assert not np.array_equal(views.student, views.teacher)


def test_two_crops_have_two_boxes() -> None:
    views = make_views(_photo(), FULL, 1)
    assert not np.array_equal(views.student_box, views.teacher_box)


def test_two_crops_with_one_set_of_colours_are_refused() -> None:
    with pytest.raises(ValueError, match="two_crops=True with two_colours=False"):
        dataclasses.replace(PLAIN, two_crops=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_box_is_where_the_view_comes_from(seed: int) -> None:
    image = _photo()
    views = make_views(image, dataclasses.replace(PLAIN, two_crops=True, two_colours=True), seed)
    assert views.teacher is not None
    pairs = ((views.student, views.student_box), (views.teacher, views.teacher_box))
    for view, (left, top, width, height, flip) in pairs:
        part = (left, top, left + width, top + height)
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR, box=part))
        assert np.array_equal(view, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("seed", range(10))
def test_the_crop_is_torchvisions_away_from_its_rim(seed: int) -> None:
    image = _photo()
    recipe = dataclasses.replace(PLAIN, flip_prob=0.0)
    views = make_views(image, recipe, seed)
    left, top, width, height, _ = (int(value) for value in views.student_box)
    expected = tv.resized_crop(
        image, top, left, height, width, [48, 48], InterpolationMode.BILINEAR, antialias=True
    )
    # ours may look one filter width beyond the box, torchvision's cut cannot: 2 pixels of rim
    inside = (slice(2, -2), slice(2, -2))
    difference = views.student.astype(int) - np.asarray(expected)
    assert np.abs(difference[inside]).max() <= 1  # rounding


def test_boxes_follow_their_law() -> None:
    image = _photo(400, 400)  # square: a long image would refuse more tall crops than wide ones
    recipe = dataclasses.replace(PLAIN, image_size_px=8)
    boxes = np.array([make_views(image, recipe, seed).student_box for seed in range(600)])
    left, top, width, height, flip = boxes.T.astype(np.float64)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 400).all()
    assert (top + height <= 400).all()
    area, ratio = width * height / 160_000, width / height
    assert area.min() > 0.078  # rounding a 100-pixel side to a whole one changes it by 0.5%
    assert 0.74 < ratio.min() < 0.80
    assert 1.26 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.03  # uniform in the logarithm: deviation 0.166 / sqrt(600)
    assert abs(flip.mean() - 0.5) < 0.1  # five deviations


def test_an_extreme_shape_falls_back_to_its_centre() -> None:
    recipe = dataclasses.replace(PLAIN, min_scale=1.0, flip_prob=0.0)
    box = make_views(_photo(300, 30), recipe, 0).student_box
    assert box.tolist() == [130, 0, 40, 30, 0]


@pytest.mark.parametrize(
    "switched_off",
    [
        {"jitter_prob": 0.0},
        {"grey_prob": 0.0},
        {"student_blur_prob": 0.0, "teacher_blur_prob": 0.0},
        {"teacher_solarize_prob": 0.0},
    ],
)
def test_switching_colours_off_leaves_the_geometry(switched_off: dict[str, float]) -> None:
    less = dataclasses.replace(FULL, **switched_off)
    for seed in range(5):
        one, two = make_views(_photo(), FULL, seed), make_views(_photo(), less, seed)
        assert np.array_equal(one.student_box, two.student_box)
        assert np.array_equal(one.teacher_box, two.teacher_box)


def test_the_teachers_colours_leave_the_students_alone_where_none_are_swapped() -> None:
    fixed = dataclasses.replace(FULL, swap_colors=False)
    other = dataclasses.replace(fixed, teacher_blur_prob=1.0, teacher_solarize_prob=1.0)
    one, two = make_views(_photo(), fixed, 3), make_views(_photo(), other, 3)
    assert np.array_equal(one.student, two.student)
    assert not np.array_equal(one.teacher, two.teacher)


@pytest.mark.parametrize("two_crops", [False, True])
def test_swapped_colors_leave_the_boxes(two_crops: bool) -> None:
    swapping = dataclasses.replace(FULL, two_crops=two_crops)
    fixed = dataclasses.replace(swapping, swap_colors=False)
    for seed in range(10):
        one, two = make_views(_photo(), swapping, seed), make_views(_photo(), fixed, seed)
        assert np.array_equal(one.student_box, two.student_box)
        assert np.array_equal(one.teacher_box, two.teacher_box)


SEEDS = 400


def _altered(recipe: ViewRecipe) -> NDArray[np.bool_]:
    """Return whether the student's, the teacher's view differs from the image, (SEEDS, 2)."""
    image = _square()  # sharp noise: even a blur of sigma 0.1 changes pixels
    rows = []
    for seed in range(SEEDS):
        views = make_views(image, recipe, seed)
        pair = (views.student, views.student if views.teacher is None else views.teacher)
        rows.append([not np.array_equal(view, np.asarray(image)) for view in pair])
    return np.array(rows)


@pytest.mark.parametrize("operation", ["blur", "solarize"])
@pytest.mark.parametrize("two_colours", [False, True])
def test_both_networks_see_an_operation_as_often_as_the_mean_of_both_recipes(
    operation: str, two_colours: bool
) -> None:
    probs = {f"student_{operation}_prob": 0.9, f"teacher_{operation}_prob": 0.1}
    fixed = dataclasses.replace(_whole(**probs), two_colours=two_colours)
    swapping = dataclasses.replace(fixed, swap_colors=True)
    student, teacher = _altered(swapping).mean(axis=0)
    five_deviations = 5 * math.sqrt(0.5 * 0.5 / SEEDS)
    assert abs(student - 0.5) < five_deviations
    assert abs(teacher - 0.5) < five_deviations
    student, teacher = _altered(fixed).mean(axis=0)
    assert student > 0.5 + five_deviations
    assert (teacher < 0.5 - five_deviations) == two_colours  # else both see the student's view


def test_of_two_views_exactly_one_has_each_recipe() -> None:
    recipe = dataclasses.replace(
        _whole(student_solarize_prob=1.0, teacher_solarize_prob=0.0),
        two_colours=True,
        swap_colors=True,
    )
    student, teacher = _altered(recipe).T
    assert (student != teacher).all()
    assert 0 < student.sum() < SEEDS


def _whole(**settings: float) -> ViewRecipe:
    """Return a recipe that leaves the geometry of a 48-pixel image alone."""
    recipe = dataclasses.replace(PLAIN, min_scale=1.0, flip_prob=0.0)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return dataclasses.replace(recipe, **{**off, **settings})


def _drawn_factor(seed: int, operation: int) -> float:
    """Redo the draws of the student's colours: chances, order, factors."""
    rng = np.random.default_rng(derive_seed(seed, "student"))
    rng.random(4)
    rng.permutation(4)
    return float(rng.uniform(-1, 1, 4)[operation])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("operation", "name", "function"),
    [
        (0, "brightness", tv.adjust_brightness),
        (1, "contrast", tv.adjust_contrast),
        (2, "saturation", tv.adjust_saturation),
        (3, "hue", tv.adjust_hue),
    ],
)
def test_each_jitter_is_torchvisions(
    seed: int, operation: int, name: str, function: object
) -> None:
    image = _square()
    view = make_views(image, _whole(jitter_prob=1.0, **{name: 0.4}), seed).student
    factor = 0.4 * _drawn_factor(seed, operation)
    expected = function(image, factor if name == "hue" else 1 + factor)
    assert np.array_equal(view, np.asarray(expected))


def _square() -> Image.Image:
    return _photo().resize((48, 48))


def test_all_jitters_together_are_applied_in_a_random_order() -> None:
    image = _square()
    recipe = _whole(jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    brighter_first = 0
    for seed in range(40):
        expected, order = image, _drawn_order(seed)
        for operation in order:
            factor = (0.4, 0.4, 0.2, 0.1)[operation] * _drawn_factor(seed, operation)
            expected = functions[operation](expected, factor if operation == 3 else 1 + factor)
        assert np.array_equal(make_views(image, recipe, seed).student, np.asarray(expected))
        brighter_first += order.index(0) < order.index(1)
    assert 8 < brighter_first < 32  # half of 40; nearly four deviations


def _drawn_order(seed: int) -> list[int]:
    rng = np.random.default_rng(derive_seed(seed, "student"))
    rng.random(4)
    return [int(operation) for operation in rng.permutation(4)]


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.004, 0.0, 0.03, 0.5])
def test_the_hue_is_torchvisions(shift: float) -> None:
    image = _square()
    assert np.array_equal(
        np.asarray(shifted_hue(image, shift)), np.asarray(tv.adjust_hue(image, shift))
    )


def test_grey_and_solarise_are_torchvisions() -> None:
    image = _square()
    grey = make_views(image, _whole(grey_prob=1.0), 0).student
    assert np.array_equal(grey, np.asarray(tv.rgb_to_grayscale(image, num_output_channels=3)))
    solarised = make_views(image, _whole(student_solarize_prob=1.0), 0).student
    assert np.array_equal(solarised, np.asarray(tv.solarize(image, 128)))


def test_probabilities_are_met() -> None:
    image, recipe = _square(), _whole(grey_prob=0.2)
    views = [make_views(image, recipe, seed).student for seed in range(500)]
    grey = sum(bool((view == view[..., :1]).all()) for view in views)
    assert abs(grey - 100) < 45  # five deviations of a binomial (500, 0.2)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_pillows_blur_is_a_gaussian_of_that_sigma(sigma: float) -> None:
    # the derivative of an edge's response is the filter; 8 bits leave it steps of 1/255, and three
    # box filters are not quite a Gaussian: within 0.02 of a peak of 0.2 to 0.8
    edge = np.zeros((41, 41), np.uint8)
    edge[:, 21:] = 255
    image = Image.fromarray(edge).convert("RGB").filter(ImageFilter.GaussianBlur(sigma))
    line = np.diff(np.asarray(image, np.float64)[20, :, 0]) / 255
    offsets = np.arange(40) - 20
    assert math.isclose((line * offsets**2).sum(), sigma**2, rel_tol=0.05)
    gaussian = np.exp(-(offsets**2) / (2 * sigma**2))
    assert np.abs(line - gaussian / gaussian.sum()).max() < 0.02


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(4))
def test_views_of_bytes_are_the_views_of_the_image(seed: int) -> None:
    data = _jpeg(_photo())
    with Image.open(io.BytesIO(data)) as image:
        expected = make_views(image.convert("RGB"), FULL, seed)
    assert _same(views_of_bytes(data, FULL, seed, max_pixels=10**6), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_large_jpeg_decoded_small_gives_nearly_the_same_views(seed: int) -> None:
    data = _jpeg(_photo(1600, 1200).filter(ImageFilter.GaussianBlur(1)))
    recipe = dataclasses.replace(PLAIN, min_scale=0.5)
    with Image.open(io.BytesIO(data)) as image:
        expected = make_views(image.convert("RGB"), recipe, seed)
    views = views_of_bytes(data, recipe, seed, max_pixels=10**7)
    assert np.array_equal(views.student_box, expected.student_box)
    difference = np.abs(views.student.astype(int) - expected.student)
    assert difference.mean() < 1.5  # of 255: two antialiasing filters in a row against one
    assert difference.max() <= 12


def test_the_evaluation_view_is_the_centre() -> None:
    image = _photo(200, 100)
    short = round(56 * 256 / 224)
    expected = tv.center_crop(
        tv.resize(image, short, InterpolationMode.BICUBIC, antialias=True), [56, 56]
    )
    view = eval_view(image, 56)
    assert view.shape == (56, 56, 3)
    assert np.array_equal(view, np.asarray(expected))


@pytest.mark.parametrize(
    "size", [(160, 120), (120, 160), (33, 33), (8, 64), (500, 63), (2000, 64), (64, 4000)]
)
def test_evaluation_views_are_cut_from_the_resized_image(size: tuple[int, int]) -> None:
    """Also of panoramas that are not enlarged, and of strips up to 8 to 1 that are."""
    image = _photo(*size)
    scale = 64 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.BICUBIC)
    left, top = (resized.width - 56) // 2, (resized.height - 56) // 2
    expected = resized.crop((left, top, left + 56, top + 56))
    assert np.array_equal(eval_view(image, 56), np.asarray(expected))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (40_000, 3), (2, 1_000)])
def test_the_middle_of_a_long_strip_is_seen_in_little_memory(size: tuple[int, int]) -> None:
    """Resized as a whole, the longest would take 4 GB."""
    across = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(across[:, None, None], (max(size), min(size), 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if size[0] > size[1]:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    assert image.size == size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    view = eval_view(image, 128)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert view.shape == (128, 128, 3)
    assert np.abs(view.astype(int) - 127).max() <= 1


TWO_CROPS, TWO_COLOURS = FULL, dataclasses.replace(FULL, two_crops=False)
ONE_VIEW = dataclasses.replace(TWO_COLOURS, two_colours=False)
FIXED = dataclasses.replace(TWO_COLOURS, swap_colors=False)


@pytest.mark.parametrize("recipe", [TWO_CROPS, TWO_COLOURS, ONE_VIEW, FIXED])
@pytest.mark.parametrize("seed", range(6))
def test_views_are_the_same_made_together_or_each_alone(recipe: ViewRecipe, seed: int) -> None:
    """Also of JPEGs that are decoded at a reduced size, which depends on both boxes."""
    sink = io.BytesIO()
    _photo(640, 480).save(sink, "JPEG")
    recipe = dataclasses.replace(recipe, min_scale=0.5, image_size_px=32)
    both = views_of_bytes(sink.getvalue(), recipe, seed, max_pixels=10**6)
    teacher = teacher_view_of_bytes(sink.getvalue(), recipe, seed, max_pixels=10**6)
    assert np.array_equal(teacher, both.student if both.teacher is None else both.teacher)
    without = dataclasses.replace(recipe, teacher_rendered=False)
    alone = views_of_bytes(sink.getvalue(), without, seed, max_pixels=10**6)
    assert alone.teacher is None
    assert _same(alone, dataclasses.replace(both, teacher=None))
