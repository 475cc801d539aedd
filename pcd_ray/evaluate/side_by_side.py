"""What several networks make of the same images, drawn side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from pcd_ray.config import Config
from pcd_ray.data.decode import decode_rgb
from pcd_ray.data.shards import read_image_bytes
from pcd_ray.distill.backbones import Backbone, map_shape
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.detect.detect_settings import views_of
from pcd_ray.evaluate.detect.detection_data import DetectionData
from pcd_ray.evaluate.eval_sets import KnnImages
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.figures import pca_maps
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import story_of
from pcd_ray.evaluate.pixels.pixel_pictures import pixel_pictures
from pcd_ray.evaluate.segment.segment_set import SegmentSet

_IMAGES = 5
_ZOOM = 3  # side of the images, in sides of training views: a finer map is easier read


def look_pictures(
    networks: Sequence[JudgedNetwork],
    images: Sequence[Image.Image],
    *,
    pixel: tuple[float, float],
    size_px: int,
    necks: Mapping[str, Student] | None = None,
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Draw all networks' maps of the same images; return file name -> PNG, and what failed -> why.

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

    def maps() -> bytes:
        found = {label: frozen_map(backbone, pixels) for label, backbone in backbones.items()}
        return pca_maps(pixels, found)

    pictures = {"pca_maps.png": maps}
    pictures |= pixel_pictures(backbones, pixels, pixel=pixel, necks=necks)
    drawn: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    for name, draw in pictures.items():
        try:
            drawn[name] = draw()
        except Exception as error:  # whatever its cause, the others can be drawn
            failed[name] = story_of(error)
    return drawn, failed


def classified_images(images: KnnImages, config: Config) -> list[Image.Image]:
    """Return a few images of ``eval.knn_test``, evenly spread."""
    rows = _spread(images.test.num_rows)
    entries = images.test.take(rows).to_pylist()
    contents = read_image_bytes(
        [entry["uri"] for entry in entries],
        [entry["offset"] for entry in entries],
        [entry["size"] for entry in entries],
    )
    data = config.data
    return [
        decode_rgb(content, max_pixels=data.max_pixels, max_decode_s=data.max_decode_s)
        for content in contents
    ]


def segmented_images(opened: SegmentSet, config: Config) -> list[Image.Image]:
    """Return a few validation images of ``eval.segmentation``, evenly spread."""
    del config
    names = opened.data.names("val")
    return [opened.data.decoded(names[row])[0] for row in _spread(len(names))]


def detected_images(data: DetectionData, config: Config) -> list[Image.Image]:
    """Return a few validation images of ``eval.detect.data``, evenly spread."""
    images = data.val.images
    chosen = [images[row] for row in _spread(len(images))]
    views = views_of(config.eval.detect, config.data)
    return [views.pixels_of(image) for image in chosen]


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
