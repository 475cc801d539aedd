"""What several networks make of the same images, drawn side by side."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.data.decode import decode_rgb
from pcd_ray.data.shards import read_image_bytes
from pcd_ray.distill.backbones import Backbone, map_shape
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.detection_data import open_detection
from pcd_ray.evaluate.eval_sets import open_knn_images, open_probe
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.figures import pca_maps
from pcd_ray.evaluate.pixel_pictures import draw_pixel_pictures
from pcd_ray.evaluate.students import JudgedNetwork

_IMAGES = 5
_ZOOM = 3  # side of the images, in sides of training views: a finer map is easier read


def look_pictures(
    networks: Sequence[JudgedNetwork],
    images: Sequence[Image.Image],
    *,
    pixel: tuple[float, float],
    size_px: int,
    necks: Mapping[str, Student] | None = None,
) -> dict[str, bytes]:
    """Draw all networks' maps of the same images; return file name -> PNG.

    Args:
        networks: at least one, with different labels.
        images: at least one; a square is cut from the middle of each.
        pixel: the place asked about: shares in [0, 1] of width and height, from the left and top.
        size_px: side of those squares, made larger where all networks take it.
        necks: label -> student, in eval mode, of those that were trained with an MHSA neck.
    """
    backbones = {network.label: network.backbone() for network in networks}
    side = _ZOOM * size_px if _take(backbones, _ZOOM * size_px) else size_px
    pixels = torch.from_numpy(np.stack([_square(image, side) for image in images]))
    maps: Mapping[str, Tensor] = {
        label: frozen_map(backbone, pixels) for label, backbone in backbones.items()
    }
    drawn = {"pca_maps.png": pca_maps(pixels, maps)}
    return drawn | draw_pixel_pictures(backbones, pixels, pixel=pixel, necks=necks)


def classified_images(config: Config) -> list[Image.Image]:
    """Return a few images of ``eval.knn_test``, evenly spread."""
    images = open_knn_images(config)
    assert images is not None  # checked before anything is judged
    rows = _spread(images.test.num_rows)
    entries = images.test.take(rows).to_pylist()
    contents = read_image_bytes(
        [entry["uri"] for entry in entries],
        [entry["offset"] for entry in entries],
        [entry["size"] for entry in entries],
    )
    return [decode_rgb(content, max_pixels=config.data.max_pixels) for content in contents]


def segmented_images(config: Config) -> list[Image.Image]:
    """Return a few validation images of ``eval.segmentation``, evenly spread."""
    data = open_probe(config)
    assert data is not None  # checked before anything is judged
    names = data.names("val")
    chosen = [names[row] for row in _spread(len(names))]
    return [
        Image.open(io.BytesIO(storage.read_bytes(data.images[name]))).convert("RGB")
        for name in chosen
    ]


def detected_images(config: Config) -> list[Image.Image]:
    """Return a few validation images of ``eval.detect.data``, evenly spread."""
    images = open_detection(config.eval.detect.data, masks=False).val.images
    chosen = [images[row] for row in _spread(len(images))]
    return [image.pixels(max_pixels=config.data.max_pixels) for image in chosen]


def _spread(count: int) -> "list[int]":
    return [int(row) for row in np.linspace(0, count - 1, min(_IMAGES, count))]


def _square(image: Image.Image, side: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))


def _take(backbones: Mapping[str, Backbone], size: int) -> bool:
    try:
        for backbone in backbones.values():
            map_shape(backbone, size)
    except ConfigError:  # a network made for one size
        return False
    return True
