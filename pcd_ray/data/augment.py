"""One image and one seed -> its views, with crop box and flip.

Shapes: S = side of a view in pixels. A box is (left, top, width, height, flip): pixels of the
upright original image, flip 0 or 1. The operations are torchvision's on PIL images, without
importing torch into Ray Data's workers: bit for bit but for the outermost pixels of a crop, whose
resizing filter reads beyond the box where torchvision's sees the cut-out part alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pcd_ray.data.decode import MAX_DECODE_S, finish_rgb, open_image, upright_size
from pcd_ray.seeds import derive_seed

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Box = np.ndarray[Any, np.dtype[np.float32]]

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_SIGMA_PX = (0.1, 2.0)
_SOLARIZE_FROM = 128
_EVAL_MARGIN = 256 / 224
_MAX_ASPECT = 8  # of an image that is enlarged for evaluation
_OVERSAMPLING = 2.0  # a JPEG decoded at half size keeps twice the pixels a view needs, or more


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecipe:
    """How an image becomes views, as plain values; their meaning is `AugmentConfig`'s.

    An augmentation that is not named is off: evaluation names those that it uses.
    """

    image_size_px: int
    min_scale: float
    max_scale: float = 1.0
    flip_prob: float = 0.0
    jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey_prob: float = 0.0
    student_blur_prob: float = 0.0
    teacher_blur_prob: float = 0.0
    student_solarize_prob: float = 0.0
    teacher_solarize_prob: float = 0.0
    swap_colors: bool = False
    """The student's and the teacher's color recipe change places in half of the views."""
    two_crops: bool = False
    """The teacher sees another crop than the student."""
    two_colours: bool = False
    """The teacher's view has its own colours; needed for two crops."""
    teacher_rendered: bool = True
    """The teacher's view is made where it is another one; its box is drawn in any case."""

    def __post_init__(self) -> None:
        if self.two_crops and not self.two_colours:
            raise ValueError("two_crops=True with two_colours=False: two crops have two colours")


@dataclass(frozen=True, slots=True)
class Views:
    """One image's views: (S, S, 3) pixels and (5,) boxes.

    There is no teacher's view where one serves both, or where its map is stored.
    """

    student: Pixels
    teacher: Pixels | None
    student_box: Box
    teacher_box: Box


def make_views(image: Image.Image, recipe: ViewRecipe, seed: int) -> Views:
    """Return the views of an RGB image; geometry and each view's colours draw on their own."""
    return _render(image, image.size, recipe, seed)


def views_of_bytes(
    data: bytes,
    recipe: ViewRecipe,
    seed: int,
    *,
    max_pixels: int,
    max_decode_s: float = MAX_DECODE_S,
) -> Views:
    """Return the views of an encoded image.

    The same as `make_views` of the decoded image, but a JPEG several times larger than its views
    need is decoded at a reduced size.

    Raises:
        UnreadableImage: the bytes cannot be decoded.
    """
    return _render(*_decoded(data, recipe, seed, max_pixels, max_decode_s), recipe, seed)


def teacher_view_of_bytes(
    data: bytes,
    recipe: ViewRecipe,
    seed: int,
    *,
    max_pixels: int,
    max_decode_s: float = MAX_DECODE_S,
) -> Pixels:
    """Return the view alone that the teacher sees of an encoded image, as `views_of_bytes` does.

    Raises:
        UnreadableImage: the bytes cannot be decoded.
    """
    image, size = _decoded(data, recipe, seed, max_pixels, max_decode_s)
    student_box, teacher_box = _boxes(size, recipe, seed)
    if not recipe.two_colours:
        return _student_view(_crop(image, size, student_box, recipe.image_size_px), recipe, seed)
    return _teacher_view(_crop(image, size, teacher_box, recipe.image_size_px), recipe, seed)


def _decoded(
    data: bytes, recipe: ViewRecipe, seed: int, max_pixels: int, max_decode_s: float
) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image, as large as its views need, and the size of the original."""
    opened = open_image(data, max_pixels=max_pixels, max_decode_s=max_decode_s)
    size = upright_size(opened)
    zoom = max(
        _OVERSAMPLING * recipe.image_size_px / min(box[2:4]) for box in _boxes(size, recipe, seed)
    )
    image = finish_rgb(opened, reduce_to=(size[0] * zoom, size[1] * zoom) if zoom < 1 else None)
    return image, size


def eval_view(image: Image.Image, size_px: int) -> Pixels:
    """Return an image's center crop, (size_px, size_px, 3); its short side is 256/224 of that.

    Of a long strip that is enlarged, the ends are cut off first: they would not be seen.
    """
    short = round(size_px * _EVAL_MARGIN)
    if min(image.size) < short:
        image = _without_ends(image, _MAX_ASPECT * min(image.size))
    width, height = image.size
    scale = short / min(width, height)
    resized = image.resize(
        (max(short, round(width * scale)), max(short, round(height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (resized.width - size_px) // 2, (resized.height - size_px) // 2
    return np.asarray(resized.crop((left, top, left + size_px, top + size_px)))


def _without_ends(image: Image.Image, longest: int) -> Image.Image:
    """Return the middle of an image of which no side is longer than ``longest`` pixels."""
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _render(image: Image.Image, size: tuple[int, int], recipe: ViewRecipe, seed: int) -> Views:
    """Draw and make the views of an image whose original is ``size`` pixels large."""
    student_box, teacher_box = _boxes(size, recipe, seed)
    boxes = _array(student_box), _array(teacher_box)
    crop = _crop(image, size, student_box, recipe.image_size_px)
    student = _student_view(crop, recipe, seed)
    if not (recipe.two_colours and recipe.teacher_rendered):
        return Views(student, None, *boxes)
    if recipe.two_crops:
        crop = _crop(image, size, teacher_box, recipe.image_size_px)
    return Views(student, _teacher_view(crop, recipe, seed), *boxes)


def _student_view(crop: Image.Image, recipe: ViewRecipe, seed: int) -> Pixels:
    return _view_of(crop, recipe, seed, "student", teachers_colors=_swapped(recipe, seed))


def _teacher_view(crop: Image.Image, recipe: ViewRecipe, seed: int) -> Pixels:
    return _view_of(crop, recipe, seed, "teacher", teachers_colors=not _swapped(recipe, seed))


def _swapped(recipe: ViewRecipe, seed: int) -> bool:
    """Say whether student and teacher exchange color recipes in the views of this seed."""
    return recipe.swap_colors and derive_seed(seed, "swap_colors") % 2 == 1


def _view_of(
    crop: Image.Image, recipe: ViewRecipe, seed: int, network: str, *, teachers_colors: bool
) -> Pixels:
    """Color a crop for ``network`` (its draws' name) by one of the two color recipes."""
    student = recipe.student_blur_prob, recipe.student_solarize_prob
    teacher = recipe.teacher_blur_prob, recipe.teacher_solarize_prob
    blur_prob, solarize_prob = teacher if teachers_colors else student
    rng = np.random.default_rng(derive_seed(seed, network))
    view = _coloured(crop, recipe, rng, blur_prob=blur_prob, solarize_prob=solarize_prob)
    return np.asarray(view)


_PlainBox = tuple[int, int, int, int, bool]


def _array(box: _PlainBox) -> Box:
    return np.array(box, np.float32)


def _boxes(size: tuple[int, int], recipe: ViewRecipe, seed: int) -> tuple[_PlainBox, _PlainBox]:
    """Draw the student's and the teacher's box; the same one where both see one crop."""
    rng = np.random.default_rng(derive_seed(seed, "geometry"))
    student = _random_box(size, recipe, rng)
    return student, _random_box(size, recipe, rng) if recipe.two_crops else student


def _random_box(size: tuple[int, int], recipe: ViewRecipe, rng: np.random.Generator) -> _PlainBox:
    """Draw a random resized crop: area and log-ratio uniform, else the largest centre crop."""
    width, height = size
    flip = bool(rng.random() < recipe.flip_prob)
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(_TRIES):
        area = width * height * rng.uniform(recipe.min_scale, recipe.max_scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), w, h, flip
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h, flip


def _crop(image: Image.Image, size: tuple[int, int], box: _PlainBox, side_px: int) -> Image.Image:
    """Cut, resize (antialiased bilinear) and flip in as few passes as Pillow can."""
    left, top, width, height, flip = box
    x, y = image.width / size[0], image.height / size[1]  # 1 unless decoded at a reduced size
    part = (left * x, top * y, (left + width) * x, (top + height) * y)
    view = image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=part)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def _coloured(
    view: Image.Image,
    recipe: ViewRecipe,
    rng: np.random.Generator,
    *,
    blur_prob: float,
    solarize_prob: float,
) -> Image.Image:
    """Jitter, grey, blur and solarise a view, each with its probability.

    Every number is drawn whether used or not, so that switching one operation off leaves the
    others as they were.
    """
    chance = rng.random(4)  # jitter, grey, blur, solarise
    order = rng.permutation(4)
    factors = rng.uniform(-1, 1, 4)
    sigma = rng.uniform(*_SIGMA_PX)
    if chance[0] < recipe.jitter_prob:
        view = _jittered(view, recipe, order.tolist(), factors.tolist())
    if chance[1] < recipe.grey_prob:
        view = view.convert("L").convert("RGB")
    if chance[2] < blur_prob:
        view = view.filter(ImageFilter.GaussianBlur(sigma))
    if chance[3] < solarize_prob:
        view = ImageOps.solarize(view, _SOLARIZE_FROM)
    return view


def _jittered(
    view: Image.Image, recipe: ViewRecipe, order: list[int], factors: list[float]
) -> Image.Image:
    """Apply brightness, contrast, saturation and hue in the drawn order; factors in [-1, 1]."""
    for operation in order:
        factor = factors[operation]
        if operation == 0 and recipe.brightness:
            view = ImageEnhance.Brightness(view).enhance(_around_one(recipe.brightness, factor))
        elif operation == 1 and recipe.contrast:
            view = ImageEnhance.Contrast(view).enhance(_around_one(recipe.contrast, factor))
        elif operation == 2 and recipe.saturation:
            view = ImageEnhance.Color(view).enhance(_around_one(recipe.saturation, factor))
        elif operation == 3 and recipe.hue:
            view = shifted_hue(view, recipe.hue * factor)
    return view


def _around_one(strength: float, factor: float) -> float:
    """Map [-1, 1] to [max(0, 1 - strength), 1 + strength], evenly."""
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + (high - low) * (factor + 1) / 2


def shifted_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue of an RGB image by a share of the colour circle in [-0.5, 0.5]."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.array(shift * 255).astype(np.int32).astype(np.uint8)  # wraps round the circle
    return Image.fromarray(hsv, "HSV").convert("RGB")
