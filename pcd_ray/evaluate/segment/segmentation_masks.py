"""Mask files: the labels exactly as the file stores them.

Shapes: Y x X pixels of the mask.
"""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pcd_ray.errors import ShardError

Labels = NDArray[np.uint8]


def stored_labels(image: Image.Image, data: bytes, *, known: Collection[int]) -> Labels:
    """Return the values of a mask (Y, X) as its file stores them, upright as viewers show it.

    Args:
        image: from `open_image` of the same bytes.
        data: the encoded file.
        known: values that masks of this set may hold.

    Raises:
        ShardError: the file cannot hold labels, or it is unclear what its labels are.
        Exception: any that Pillow raises on damaged bytes.
    """
    if image.format != "PNG":  # whatever the file is called: lossy formats invent labels
        raise ShardError(
            f"it is a {image.format} file; save masks as PNG, which stores labels exactly"
        )
    depth = data[data.index(b"IHDR") + 12]  # after the chunk's name, width and height
    image.load()
    image = ImageOps.exif_transpose(image)
    values = np.asarray(_one_channel(image, depth)).astype(np.uint8)
    if image.mode == "P":
        _check_palette(image, values, known)
        return values
    # Pillow scales gray of 2 and 4 bits to 0 to 255; of 1 bit it gives 0 and 1
    return values if depth in (1, 8) else values // np.uint8(255 // (2**depth - 1))


def _one_channel(image: Image.Image, depth: int) -> Image.Image:
    """Return the channel of a mask that holds its labels.

    Raises:
        ShardError: it has several, or values of 16 bits.
    """
    if depth == 16:
        raise ShardError("it has 16 bits per channel; save it as an 8-bit PNG with one channel")
    if image.mode in ("1", "L", "P"):
        return image
    if image.mode == "LA" and image.getchannel("A").getextrema() == (255, 255):
        return image.getchannel("L")
    raise ShardError(
        f"its mode is {image.mode}; save it as an 8-bit PNG with one channel whose values are "
        "labels (no colors, no transparency)"
    )


def _check_palette(image: Image.Image, indices: Labels, known: Collection[int]) -> None:
    """Refuse a palette that may have been made from a gray mask by a program that saves space.

    Its indices are then not the labels, its grays are. A palette made for viewing has other colors,
    black and white alone, or grays that are no labels.

    Raises:
        ShardError: the grays of the palette could be labels too, and differ from the indices.
    """
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    used = used[used < len(palette)]
    colors = palette[used]  # (n, 3)
    grays = colors[:, 0]
    if (colors != grays[:, None]).any() or not all(int(gray) in known for gray in grays):
        return
    unclear = grays != used
    if unclear.any() and not np.isin(grays, (0, 255)).all():
        index, gray = int(used[unclear][0]), int(grays[unclear][0])
        raise ShardError(
            f"its palette shows index {index} as gray {gray}, and both could be the label; save it "
            "as an 8-bit gray PNG without a palette"
        )
