"""Generated scenes with exact pixel labels, for the offline demo and for tests.

A scene is a textured background with a few objects that overlap, in one light, with noise. A class
is a shape *and* a texture; colours, sizes, angles and places are random, so that colour alone says
nothing. The class of the object that shows most is the scene's label.

Shapes: S = side of a scene in pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pcd_ray import storage
from pcd_ray.seeds import derive_seed

Plane = np.ndarray[Any, np.dtype[np.float64]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_OBJECTS_PER_SCENE = (2, 5)  # at least, less than
_OBJECTS_PER_PICTURE = (1, 2)
_RADIUS = (0.16, 0.32)  # of the side
_PICTURE_RADIUS = (0.3, 0.5)
_NOISE = 0.02
_JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene."""

    image: Pixels
    """(S, S, 3)."""
    mask: Pixels
    """(S, S) class of each pixel: position in `CLASSES`."""
    label: int
    """Class of the object with most visible pixels."""


def _length(x: Plane, y: Plane) -> Plane:
    length: Plane = np.hypot(x, y)
    return length


def _disc(x: Plane, y: Plane) -> Plane:
    return 1 - _length(x, y)


def _square(x: Plane, y: Plane) -> Plane:
    return 0.85 - np.maximum(np.abs(x), np.abs(y))


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.minimum(0.5 - y, 0.5 * y - 0.866 * np.abs(x) + 0.5)


def _ring(x: Plane, y: Plane) -> Plane:
    return 0.32 - np.abs(_length(x, y) - 0.68)


def _cross(x: Plane, y: Plane) -> Plane:
    wide, high = np.abs(x), np.abs(y)
    bars = np.minimum(0.36 - wide, 0.95 - high), np.minimum(0.36 - high, 0.95 - wide)
    inside: Plane = np.maximum(*bars)
    return inside


def _star(x: Plane, y: Plane) -> Plane:
    outline: Plane = 0.62 + 0.33 * np.cos(5 * np.arctan2(y, x))
    return outline - _length(x, y)


def _spots(x: Plane, y: Plane) -> Plane:
    return (np.sin(9 * x) * np.sin(9 * y) > 0.25).astype(float)


def _stripes(x: Plane, y: Plane) -> Plane:
    return (np.sin(11 * (x + 0.2 * y)) > 0).astype(float)


def _chequers(x: Plane, y: Plane) -> Plane:
    return (np.sin(8 * x) * np.sin(8 * y) > 0).astype(float)


def _rings(x: Plane, y: Plane) -> Plane:
    share: Plane = 0.5 + 0.5 * np.sin(16 * _length(x, y))
    return share


def _zigzag(x: Plane, y: Plane) -> Plane:
    waves: Plane = np.sin(12 * y + 3 * np.abs(((2 * x) % 2) - 1))
    return (waves > 0).astype(float)


def _shade(x: Plane, y: Plane) -> Plane:
    share: Plane = np.clip(0.5 + 0.45 * x + 0.2 * y, 0, 1)
    return share


_OBJECTS: dict[str, tuple[Callable[[Plane, Plane], Plane], Callable[[Plane, Plane], Plane]]] = {
    # name -> distance inside its outline in units of its radius, and texture in [0, 1]
    "spotted disc": (_disc, _spots),
    "striped square": (_square, _stripes),
    "shaded triangle": (_triangle, _shade),
    "chequered ring": (_ring, _chequers),
    "zigzag cross": (_cross, _zigzag),
    "ringed star": (_star, _rings),
}
CLASSES = ("background", *_OBJECTS)


def make_scene(seed: int, size_px: int) -> Scene:
    """Return one scene of several objects, the same for the same seed and size."""
    return _painted(seed, size_px, _OBJECTS_PER_SCENE, _RADIUS)


def make_picture(seed: int, size_px: int) -> Scene:
    """Return a picture of one large object: what image-level training is used to see."""
    return _painted(seed, size_px, _OBJECTS_PER_PICTURE, _PICTURE_RADIUS)


@dataclass(frozen=True, slots=True)
class _Canvas:
    """What is painted on, and where its pixels' centres lie in [0, 1]."""

    x: Plane  # (S, S)
    y: Plane  # (S, S)
    image: Plane  # (S, S, 3)
    mask: Pixels  # (S, S)


def _painted(
    seed: int, size_px: int, objects: tuple[int, int], radii: tuple[float, float]
) -> Scene:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size_px, 0:size_px] / size_px + 0.5 / size_px
    canvas = _Canvas(x, y, _background(rng, x, y), np.zeros((size_px, size_px), np.uint8))
    for _ in range(rng.integers(*objects)):
        _paint_object(rng, canvas, radii)
    counts = np.bincount(canvas.mask.ravel(), minlength=len(CLASSES))[1:]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.35 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
    image = canvas.image * light[..., None] + rng.normal(0, _NOISE, canvas.image.shape)
    pixels = (255 * np.clip(image, 0, 1)).round().astype(np.uint8)
    return Scene(pixels, canvas.mask, 1 + int(counts.argmax()))


def write_scenes(  # noqa: PLR0913 - how many of what, and who follows them
    folder: str,
    *,
    num_train: int,
    num_test: int,
    size_px: int,
    seed: int,
    num_segmentation: tuple[int, int] = (200, 100),
    on_scene: Callable[[], object] = lambda: None,
) -> None:
    """Write scenes where `pack`, kNN and the segmentation probe can read them.

    ``train`` and ``test`` hold one folder per label; ``segmentation`` holds images, masks,
    classes.txt, train.txt and val.txt. No scene stands in two of them.

    Args:
        folder: URI to write under.
        num_train: scenes of ``train``.
        num_test: scenes of ``test``.
        size_px: side of a scene.
        seed: root of all scenes.
        num_segmentation: scenes of the probe's train and val split.
        on_scene: called after each scene.
    """
    for split, count in (("train", num_train), ("test", num_test)):
        for number in range(count):
            scene = make_scene(derive_seed(seed, "scene", split, number), size_px)
            name = CLASSES[scene.label].replace(" ", "_")
            uri = storage.join(folder, split, name, f"{number:05d}.jpg")
            storage.write_bytes(uri, _encoded(scene.image, "JPEG"))
            on_scene()
    probe = storage.join(folder, "segmentation")
    for split, count in zip(("train", "val"), num_segmentation, strict=True):
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            scene = make_scene(derive_seed(seed, "probe", split, number), size_px)
            image, mask = _encoded(scene.image, "JPEG"), _encoded(scene.mask, "PNG")
            storage.write_bytes(storage.join(probe, "images", f"{name}.jpg"), image)
            storage.write_bytes(storage.join(probe, "masks", f"{name}.png"), mask)
            on_scene()
        storage.write_text(storage.join(probe, f"{split}.txt"), "\n".join(names) + "\n")
    storage.write_text(storage.join(probe, "classes.txt"), "\n".join(CLASSES) + "\n")


def _background(rng: np.random.Generator, x: Plane, y: Plane) -> Plane:
    """Blend two colours by a texture that is coarser than any object's."""
    angle, scale = rng.uniform(0, np.pi), rng.uniform(4, 10)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    kind = rng.integers(4)
    if kind == 0:
        share = u - u.min()
    elif kind == 1:
        share = 0.5 + 0.5 * np.sin(scale * u)
    elif kind == 2:
        share = 0.5 + 0.5 * np.sin(scale * u) * np.sin(scale * v)
    else:
        waves = [rng.uniform(2, 12, 2) for _ in range(4)]
        share = 0.5 + 0.15 * sum(np.sin(a * u + b * v + a) for a, b in waves)
    first, second = rng.uniform(0.1, 0.9, (2, 3))
    colours: Plane = first + np.clip(share, 0, 1)[..., None] * (second - first)
    return colours


def _paint_object(rng: np.random.Generator, canvas: _Canvas, radii: tuple[float, float]) -> None:
    """Paint one object over what is there; its edge is one pixel soft, its label is exact."""
    number = int(rng.integers(len(_OBJECTS)))
    outline, texture = list(_OBJECTS.values())[number]
    radius, angle = rng.uniform(*radii), rng.uniform(0, 2 * np.pi)
    left, top = rng.uniform(0.1, 0.9, 2)
    x, y = canvas.x - left, canvas.y - top
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius
    inside = outline(u, v) * radius * len(x)  # in pixels
    first, second = rng.uniform(0, 1, (2, 3))
    colour = first + texture(u, v)[..., None] * (second - first)
    cover = np.clip(inside + 0.5, 0, 1)[..., None]
    canvas.image[...] += cover * (colour - canvas.image)
    canvas.mask[inside > 0] = 1 + number


def _encoded(pixels: Pixels, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": _JPEG_QUALITY} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
