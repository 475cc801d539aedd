"""Encoded bytes -> an upright RGB image, or a plain reason why not.

Files of strangers are bounded three ways. By format: `FORMATS` alone are recognised, so that no
program is run (Pillow gives EPS to Ghostscript). By pixels, before any are decoded. By time, since
a JPEG of a few kilobytes can ask for thousands of passes over its pixels: Pillow asks for encoded
bytes block by block, and is refused the next one when the time is up. What runs between two blocks
is native code that nothing interrupts; the pixel limit bounds it, and JPEGs get small blocks. Time
is the thread's own on a processor, so that a busy machine makes no image unreadable.
"""

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pcd_ray import storage
from pcd_ray.errors import ShardError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of what is read; its JPEG takes MPO, of some cameras, too."""
MAX_DECODE_S = 10.0
"""The time limit where nobody sets another."""
_JPEG_BLOCK = 1024  # bytes; the shortest pass takes 31, and 16 ms at 16 million pixels


class UnreadableImage(ValueError):  # noqa: N818 - the noun of bad_images.csv
    """One image that cannot be decoded; ``str()`` of it is the reason."""


class _TimedBytes(io.BytesIO):
    """Encoded bytes that are handed out until a thread's time is up."""

    def __init__(self, data: bytes, max_s: float) -> None:
        super().__init__(data)
        self._max_s = max_s
        self._end_s = time.thread_time() + max_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end_s:
            raise UnreadableImage(f"decoding takes more than data.max_decode_s={self._max_s:g}")
        return super().read(size)


def decode_rgb(data: bytes, *, max_pixels: int, max_decode_s: float = MAX_DECODE_S) -> Image.Image:
    """Return an encoded image as RGB, upright (EXIF orientation applied), wholly decoded.

    Args:
        data: encoded bytes in one of `FORMATS`; the first frame of several.
        max_pixels: images with more pixels are refused by their header, before they are decoded.
        max_decode_s: seconds of processor time.

    Raises:
        UnreadableImage: the bytes are no image, are damaged or truncated, have too many pixels or
            take too long.
    """
    return finish_rgb(open_image(data, max_pixels=max_pixels, max_decode_s=max_decode_s))


def open_image(data: bytes, *, max_pixels: int, max_decode_s: float = MAX_DECODE_S) -> Image.Image:
    """Return an image whose header has been read, its pixels not yet; its time runs from now.

    Raises:
        UnreadableImage: the header cannot be read, or says too many pixels.
    """
    if not data:
        raise UnreadableImage("empty file")
    with _explained(max_pixels):
        image = Image.open(_TimedBytes(data, max_decode_s), formats=FORMATS)
    if image.format in ("JPEG", "MPO"):
        image.decodermaxblock = _JPEG_BLOCK
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width} x {height} = {width * height:,} pixels exceed data.max_pixels={max_pixels:,}"
        )
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) in pixels of what `finish_rgb` makes of an opened image.

    Raises:
        UnreadableImage: the orientation cannot be read without the pixels, and these are damaged.
    """
    with _explained(image.width * image.height):
        if image.format != "JPEG":
            image.load()  # TIFF rotates itself meanwhile, PNG may have its EXIF after the pixels
        return image.size[::-1] if _is_turned(image) else image.size


def finish_rgb(image: Image.Image, *, reduce_to: tuple[float, float] | None = None) -> Image.Image:
    """Return an opened image as upright RGB, its pixels decoded to the end.

    Args:
        image: from `open_image`.
        reduce_to: (width, height) of the upright image down to which a JPEG may be scaled while
            it is decoded, by 2, 4 or 8; several times faster for large photographs.

    Raises:
        UnreadableImage: the bytes are damaged or truncated, or take too long.
    """
    with _explained(image.width * image.height):
        if reduce_to is not None and image.format == "JPEG":
            width, height = reduce_to[::-1] if _is_turned(image) else reduce_to
            image.draft("RGB", (max(1, int(width)), max(1, int(height))))
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))


def unreadable(key: str, uri: str, reason: str) -> ShardError:
    """Return the error of an image that was readable when it was packed or listed."""
    packed = storage.name_of(uri).endswith(".parquet")
    fix = "mend it and pack the images again" if packed else "mend or remove the file"
    return ShardError(f"image {key!r} in {uri}: {reason}; {fix}")


@contextmanager
def _explained(max_pixels: int) -> Iterator[None]:
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's parsers let any kind of error through on damaged bytes
        raise UnreadableImage(_reason(error, max_pixels)) from error


def _is_turned(image: Image.Image) -> bool:
    """Say whether the EXIF orientation swaps width and height."""
    return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of 32 bits (mode {image.mode}); convert to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception, max_pixels: int) -> str:
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, before ours is asked
        pixels = int((re.findall(r"\d+", text) or ["0"])[0])
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        over = f"data.max_pixels={max_pixels:,}" if pixels > max_pixels else f"Pillow's {limit:,}"
        return f"{pixels:,} pixels exceed {over}"
    if "truncated" in text.lower():
        return "truncated"
    return f"damaged ({text or type(error).__name__})"
