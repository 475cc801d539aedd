"""All pictures of one pixel, of several networks on the same images."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.student import Student
from pcd_ray.evaluate.drawing import Pixels
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.pixels.pixel_figures import (
    attention_figure,
    receptive_field_figure,
    similarity_figure,
)
from pcd_ray.evaluate.pixels.pixel_relations import (
    Place,
    attention_maps,
    cosines,
    pixel_of,
    position_of,
)
from pcd_ray.evaluate.pixels.receptive_field import effective_receptive_field

SHOWN_IMAGES = 4


def draw_pixel_pictures(
    networks: Mapping[str, Backbone],
    images: Pixels | Tensor,
    *,
    pixel: Place = (0.5, 0.5),
    necks: Mapping[str, Student] | None = None,
) -> dict[str, bytes]:
    """Draw similarity, receptive fields and attention; return file name -> PNG.

    ``similarity.png``: the pixel of each image against the rest of that image.
    ``similarity_across.png``: the pixel of the first image against all; of two images or more.
    ``receptive_fields.png``: of each network, without and with its neck.
    ``attention_NAME.png``: of the neck of each student, head by head.

    Args:
        networks: name -> frozen network in eval mode.
        images: uint8 (B, H, W, 3), of a size that all networks take; the first few are shown, and
            all count for the receptive fields.
        pixel: the place asked about: shares in [0, 1] of width and height, from the left and top.
        necks: name -> student in eval mode, with an MHSA neck on the network of that name.

    Raises:
        ValueError: a network is in train mode, or a student has no neck.
        EvaluationError: features are infinite or NaN.
    """
    pictures = pixel_pictures(networks, images, pixel=pixel, necks=necks)
    return {name: draw() for name, draw in pictures.items()}


def pixel_pictures(
    networks: Mapping[str, Backbone],
    images: Pixels | Tensor,
    *,
    pixel: Place = (0.5, 0.5),
    necks: Mapping[str, Student] | None = None,
) -> dict[str, Callable[[], bytes]]:
    """Return what draws each of these pictures, so that one that fails costs itself alone."""
    images = torch.as_tensor(images)
    shown = images[:SHOWN_IMAGES]
    place = pixel_of(pixel, *images.shape[1:3])
    pictures: dict[str, Callable[[], bytes]] = {
        "similarity.png": lambda: _similarity(networks, shown, place)
    }
    if len(shown) > 1:
        pictures["similarity_across.png"] = lambda: _similarity(networks, shown, place, across=True)
    pictures["receptive_fields.png"] = lambda: receptive_field_figure(
        dict(_receptive_fields(networks, necks or {}, images))
    )
    for name, student in (necks or {}).items():
        file = f"attention_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png"
        pictures[file] = partial(_attention, student, shown, place)
    return pictures


def _attention(student: Student, images: Tensor, place: Place) -> bytes:
    attention = [attention_maps(student, image, place) for image in images]
    return attention_figure(images, attention, [place] * len(images))


def _similarity(
    networks: Mapping[str, Backbone], images: Tensor, pixel: Place, *, across: bool = False
) -> bytes:
    """Draw the similarity of a pixel of each image, or of the first one, with its features."""
    size = images.shape[1], images.shape[2]
    found = {}
    for name, network in networks.items():
        maps = frozen_map(network, images)  # (B, C, h, w)
        row, column = position_of(pixel, size, (maps.shape[2], maps.shape[3]))
        asked = maps[:1] if across else maps
        features = asked[:, :, row, column].expand(len(maps), -1)  # (B, C)
        found[name] = torch.stack(
            [cosines(one, of) for one, of in zip(features, maps, strict=True)]
        ).cpu()
    rest: list[Place | None] = [None if across else pixel] * (len(images) - 1)
    return similarity_figure(images, found, [pixel, *rest])


def _receptive_fields(
    networks: Mapping[str, Backbone], necks: Mapping[str, Student], images: Tensor
) -> Iterator[tuple[str, Tensor]]:
    for name, network in networks.items():
        yield name, effective_receptive_field(network, images)
        if name in necks:
            whole = nn.Sequential(network, necks[name].neck).eval()
            yield f"{name}, with its neck", effective_receptive_field(whole, images)
