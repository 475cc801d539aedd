"""What decodes, upright and in RGB, and the plain reason of what does not."""

import io
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcd_ray.config import DataConfig
from pcd_ray.data.decode import UnreadableImage, decode_rgb, finish_rgb, open_image, upright_size
from pcd_ray.data.packing import bad_images, pack_part, plan_packing
from pcd_ray.data.sources import list_sources

LIMIT = 1_000_000


def _encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def _noise(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    image = _noise()
    decoded = decode_rgb(_encoded(image, kind), max_pixels=LIMIT)
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_rgb(_encoded(_noise().convert(mode), kind), max_pixels=LIMIT).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode_rgb(_encoded(Image.fromarray(values), "PNG"), max_pixels=LIMIT)
    assert np.array_equal(np.asarray(decoded)[..., 0], values >> 8)


def _tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _xmp(orientation: int) -> bytes:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


_TAGGED: dict[str, Callable[[Image.Image, int], bytes]] = {
    "JPEG": lambda image, tag: _encoded(image, "JPEG", exif=_tag(tag), quality=100, subsampling=0),
    "JPEG, XMP": lambda image, tag: _encoded(image, "JPEG", xmp=_xmp(tag), quality=100),
    "JPEG, two places": lambda image, tag: _encoded(image, "JPEG", exif=_tag(tag), xmp=_xmp(3)),
    "JPEG of two frames": lambda image, tag: _encoded(
        image, "MPO", exif=_tag(tag), save_all=True, append_images=[image]
    ),
    "PNG": lambda image, tag: _encoded(image, "PNG", exif=_tag(tag)),
    "PNG, after the pixels": lambda image, tag: _with_late_exif(image, _tag(tag).tobytes()),
    "WebP": lambda image, tag: _encoded(image, "WEBP", exif=_tag(tag), lossless=True),
    "WebP, XMP": lambda image, tag: _encoded(image, "WEBP", xmp=_xmp(tag), lossless=True),
    "TIFF": lambda image, tag: _encoded(image, "TIFF", tiffinfo={0x0112: tag}),
    "TIFF, XMP": lambda image, tag: _encoded(image, "TIFF", tiffinfo={700: _xmp(tag)}),
    "TIFF, two places": lambda image, tag: _encoded(
        image, "TIFF", tiffinfo={0x0112: tag, 700: _xmp(6)}
    ),
    "TIFF of two frames": lambda image, tag: _encoded(
        image, "TIFF", tiffinfo={0x0112: tag}, save_all=True, append_images=[image]
    ),
}


def _with_late_exif(image: Image.Image, exif: bytes) -> bytes:
    data, chunk = _encoded(image, "PNG"), b"eXIf" + exif.removeprefix(b"Exif\0\0")
    end = len(data) - 12  # IEND
    length, check = len(chunk) - 4, zlib.crc32(chunk)
    return data[:end] + length.to_bytes(4) + chunk + check.to_bytes(4) + data[end:]


@pytest.mark.parametrize("tagged", _TAGGED)
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])  # 0 and 9 have no meaning
def test_orientation_is_applied_and_the_size_is_that_of_the_result(
    tagged: str, orientation: int
) -> None:
    left_half_white = Image.new("RGB", (60, 40))
    left_half_white.paste((255, 255, 255), (0, 0, 30, 20))  # the stored upper left quarter
    data = _TAGGED[tagged](left_half_white, orientation)
    opened = open_image(data, max_pixels=LIMIT)
    size = upright_size(opened)
    pixels = np.asarray(finish_rgb(opened))[..., 0] > 128
    assert size == upright_size(opened) == pixels.shape[::-1]
    assert pixels.shape == ((60, 40) if 5 <= orientation <= 8 else (40, 60))
    height, width = pixels.shape
    quarters = [
        bool(pixels[y, x]) for y in (4, height - 5) for x in (4, width - 5)
    ]  # upper left, upper right, lower left, lower right
    where = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}.get(orientation, 0)
    assert quarters == [place == where for place in range(4)]


def test_an_orientation_that_is_a_text_is_none() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0"  # "6", ASCII
    opened = open_image(_encoded(_noise(), exif=exif), max_pixels=LIMIT)
    assert opened.getexif()[0x0112] == "6"
    assert upright_size(opened) == finish_rgb(opened).size == (60, 40)


def test_an_empty_file_is_called_empty() -> None:
    with pytest.raises(UnreadableImage, match=r"^empty file$"):
        decode_rgb(b"", max_pixels=LIMIT)


@pytest.mark.parametrize("data", [b"a text that calls itself .jpg", b"\xff\xd8\xff"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"^(not an image|truncated)$"):
        decode_rgb(data, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncation_is_found(kind: str, share: float) -> None:
    data = _encoded(_noise(), kind)
    with pytest.raises(UnreadableImage, match=r"^truncated$"):
        decode_rgb(data[: int(share * len(data))], max_pixels=LIMIT)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_has_a_reason_and_no_other_error() -> None:
    # 300 files with 20 random bytes changed: each decodes or is unreadable, nothing else escapes
    rng = np.random.default_rng(0)
    files = [np.frombuffer(_encoded(_noise(), kind), np.uint8) for kind in ("JPEG", "PNG", "TIFF")]
    unreadable = 0
    for number in range(300):
        data = files[number % 3].copy()
        data[rng.integers(0, data.size, 20)] = rng.integers(0, 256, 20)
        try:
            decode_rgb(data.tobytes(), max_pixels=LIMIT)
        except UnreadableImage as error:
            unreadable += bool(str(error))
    assert unreadable > 100


def test_too_many_pixels_are_refused_by_the_header() -> None:
    data = _encoded(Image.new("RGB", (1200, 900)), "PNG")[:200]  # the pixels are not even there
    message = "1200 x 900 = 1,080,000 pixels exceed data.max_pixels=1,000,000"
    with pytest.raises(UnreadableImage, match=message):
        decode_rgb(data, max_pixels=LIMIT)


def test_an_image_over_pillows_own_limit_is_refused_too() -> None:
    data = _encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(UnreadableImage, match=r"400,000,000 pixels exceed data.max_pixels"):
        decode_rgb(data, max_pixels=100_000_000)


def test_no_option_promises_more_pixels_than_pillow_reads() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    limit = 2 * Image.MAX_IMAGE_PIXELS  # above it Pillow refuses, whatever we allow
    assert DataConfig(max_pixels=limit).max_pixels == limit
    message = rf"data\.max_pixels must be in \[1, {limit}\], .*Pillow.*, got {limit + 1}"
    with pytest.raises(ValueError, match=message):
        DataConfig(max_pixels=limit + 1)


def test_a_reduced_jpeg_keeps_at_least_the_size_asked_for() -> None:
    data = _encoded(_noise(800, 600), quality=90)
    sizes = [
        finish_rgb(open_image(data, max_pixels=LIMIT), reduce_to=size).size
        for size in ((801.0, 601.0), (400.0, 300.0), (390.0, 290.0), (100.0, 75.0), (3.0, 2.0))
    ]
    assert sizes == [(800, 600), (400, 300), (400, 300), (100, 75), (100, 75)]


def _many_scans(side_px: int, scans: int) -> bytes:
    """Return a progressive JPEG whose last pass over the pixels is asked for again and again."""
    data = _encoded(Image.new("L", (side_px, side_px), 128), "JPEG", progressive=True)
    end = data.rindex(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda") : end]
    return data[:end] + scan * scans + data[end:]


def test_a_small_file_that_takes_long_is_given_up_in_time() -> None:
    """It would take about 20 s of processor time; what is over the limit is one block's."""
    data = _many_scans(1600, 8000)
    assert len(data) < 300_000
    start = time.thread_time()
    with pytest.raises(
        UnreadableImage, match=r"^decoding takes more than data\.max_decode_s=0\.2$"
    ):
        decode_rgb(data, max_pixels=3_000_000, max_decode_s=0.2)
    assert time.thread_time() - start < 3
    assert decode_rgb(_many_scans(64, 20), max_pixels=LIMIT).size == (64, 64)


def test_a_slow_image_is_listed_as_bad_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes(_encoded(_noise(), "PNG"))
    (tmp_path / "images" / "slow.jpg").write_bytes(_many_scans(1600, 8000))
    plan = plan_packing(
        list_sources([str(tmp_path / "images")]), seed=0, shard_bytes=10**7, max_pixels=10**7
    )
    record = pack_part(str(tmp_path / "packed"), plan, 0, max_decode_s=0.2)
    assert len(record.images) == 1
    assert [(key, reason) for key, _, reason in bad_images(plan, [record])] == [
        ("slow.jpg", "decoding takes more than data.max_decode_s=0.2")
    ]


def test_a_program_that_calls_itself_an_image_is_not_run() -> None:
    """Pillow would give PostScript to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(UnreadableImage, match=r"^not an image$"):
        decode_rgb(eps, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_many_frames_cost_what_one_does(kind: str) -> None:
    frames = [Image.new("RGB", (300, 300), (n, 0, 0)) for n in range(60)]
    sink = io.BytesIO()
    frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
    start = time.thread_time()
    assert decode_rgb(sink.getvalue(), max_pixels=LIMIT).size == (300, 300)
    assert time.thread_time() - start < 0.3
