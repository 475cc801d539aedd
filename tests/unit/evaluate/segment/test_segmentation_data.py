import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from segmentation_folder import painted, painted_set, random_mask, write_set

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.segment.segmentation_data import open_segmentation


def test_every_pixel_and_label_arrives_in_the_order_of_the_list(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path, train=5, val=1))
    assert data.classes == ("sky", "road", "tree")
    batches = list(data.batches("train", batch_size=2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    masks = torch.cat([masks for _, masks in batches])
    expected = np.stack([random_mask(seed) for seed in range(5)])
    np.testing.assert_array_equal(masks, expected)
    images = torch.cat([images for images, _ in batches])
    np.testing.assert_array_equal(images, painted(expected))
    assert images.dtype == masks.dtype == torch.uint8


def test_names_may_have_a_question_mark(tmp_path: Path) -> None:
    folder = painted_set(tmp_path / "parts?", train=1, val=1)
    for kind in ("images", "masks"):
        (tmp_path / "parts?" / kind / "val_00.png").rename(tmp_path / "parts?" / kind / "a?.png")
    (tmp_path / "parts?" / "val.txt").write_text("a?\n")
    data = open_segmentation(folder)
    assert data.names("val") == ("a?",)
    np.testing.assert_array_equal(data.example("a?")[1], random_mask(1))


def test_resizing_keeps_the_shape_of_images_and_leaves_masks_whole(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path), size_px=8)
    images, masks = next(data.batches("val", batch_size=3))
    assert images.shape == (3, 8, 12, 3)
    assert masks.shape == (3, 16, 24)
    colour = images[masks[:, 2::4, 2::4].repeat_interleave(2, 1).repeat_interleave(2, 2) == 0]
    assert colour.float().mean(dim=0)[0] > 150  # class 0 is still red


def test_photographs_are_turned_as_viewers_turn_them(tmp_path: Path) -> None:
    folder = painted_set(tmp_path)
    upright, labels = open_segmentation(folder).decoded("val_00")
    exif = Image.Exif()
    exif[0x0112] = 8  # stored turned by a quarter
    turned = upright.transpose(Image.Transpose.ROTATE_270)
    turned.save(tmp_path / "images" / "val_00.png", exif=exif)
    image, same = open_segmentation(folder).decoded("val_00")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))
    np.testing.assert_array_equal(same, labels)
    mask = Image.fromarray(labels).transpose(Image.Transpose.ROTATE_270)
    mask.save(tmp_path / "masks" / "val_00.png", exif=exif)
    np.testing.assert_array_equal(open_segmentation(folder).decoded("val_00")[1], labels)


@pytest.mark.parametrize(
    ("strip", "size_px", "shown"),
    [
        ((60_000, 1), 240, "60000 x 1 px become 14,400,000 x 240"),
        ((20_000, 2), 64, "20000 x 2 px become 640,000 x 64"),  # a network took 5 GB for it
    ],
)
def test_a_strip_that_resizing_would_make_huge_is_refused(
    strip: tuple[int, int], size_px: int, shown: str, tmp_path: Path
) -> None:
    folder = painted_set(tmp_path)
    Image.new("RGB", strip).save(tmp_path / "images" / "val_01.png")
    message = rf"val_01\.png: its {shown}"
    with pytest.raises(ShardError, match=message):
        open_segmentation(folder, size_px=size_px).decoded("val_01")


def test_lists_are_read_with_byte_order_marks_and_lose_no_line(tmp_path: Path) -> None:
    folder = painted_set(tmp_path)
    before = open_segmentation(folder)
    for name in ("classes.txt", "train.txt", "val.txt"):
        lines = (tmp_path / name).read_text()
        (tmp_path / name).write_text(lines + "\n\n", "utf-8-sig", newline="\r\n")
    assert open_segmentation(folder) == before
    (tmp_path / "classes.txt").write_text("sky\n\nroad\ntree\n")
    with pytest.raises(ShardError, match=r"classes\.txt: line 2 is blank, and line numbers are"):
        open_segmentation(folder)


def test_a_batch_ends_where_the_size_changes(tmp_path: Path) -> None:
    masks = [random_mask(seed, height=height) for seed, height in enumerate((8, 8, 16, 8))]
    pairs = [(painted(mask), mask) for mask in masks]
    data = open_segmentation(write_set(tmp_path, {"train": pairs, "val": pairs[:1]}))
    sizes = [tuple(images.shape[:2]) for images, _ in data.batches("train", batch_size=3)]
    assert sizes == [(2, 8), (1, 16), (1, 8)]


def test_palette_masks_and_subfolders_are_read(tmp_path: Path) -> None:
    painted_set(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind / "city").mkdir()
        (tmp_path / kind / "val_00.png").rename(tmp_path / kind / "city" / "a.b.png")
    path = tmp_path / "masks" / "city" / "a.b.png"
    with Image.open(path) as mask:
        indexed = mask.convert("L")
    palette = Image.fromarray(np.asarray(indexed))
    palette.putpalette([0, 0, 0, 90, 90, 90, 200, 200, 200])
    palette.save(path)
    (tmp_path / "val.txt").write_text("city/a.b\n")
    _, masks = next(open_segmentation(str(tmp_path)).batches("val", batch_size=1))
    np.testing.assert_array_equal(masks[0], random_mask(12))


def test_a_set_without_a_test_split_says_which_splits_it_has(tmp_path: Path) -> None:
    data = open_segmentation(painted_set(tmp_path))
    with pytest.raises(ShardError, match=r"no split 'test'; it has train, val.*test\.txt"):
        data.names("test")


def test_a_mask_of_another_size_than_its_image_is_named(tmp_path: Path) -> None:
    painted_set(tmp_path)
    Image.fromarray(random_mask(0, height=8)).save(tmp_path / "masks" / "train_03.png")
    data = open_segmentation(str(tmp_path), size_px=8)
    with pytest.raises(
        ShardError, match=r"train_03\.png: the mask is 24 x 8 px, its image 24 x 16"
    ):
        list(data.batches("train", batch_size=4))


def test_labels_beyond_the_class_list_are_named(tmp_path: Path) -> None:
    painted_set(tmp_path)
    mask = random_mask(0)
    mask[0, 0], mask[0, 1], mask[0, 2] = 3, 254, 255  # the last is void and allowed
    Image.fromarray(mask).save(tmp_path / "masks" / "val_01.png")
    with pytest.raises(
        ShardError, match=r"val_01\.png: labels \[3, 254\] are beyond the 3 classes"
    ):
        list(open_segmentation(str(tmp_path)).batches("val", batch_size=4))


def png_of(values: NDArray[np.uint8], *, depth: int, color: int, interlaced: bool) -> bytes:
    """Return a PNG that holds these values as they are, after its specification.

    Args:
        values: (Y, X) grays or palette indices.
        depth: bits of a value: 1, 2, 4 or 8.
        color: PNG's color type: 0 gray, 3 palette.
        interlaced: in Adam7's seven passes.
    """

    def packed(part: NDArray[np.uint8]) -> bytes:
        bits = np.unpackbits(part[:, :, None], axis=2)[:, :, 8 - depth :]
        rows = np.packbits(bits.reshape(len(part), -1), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in rows) if part.shape[1] else b""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4)]
    passes += [(2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]  # first row, step, first column, step
    parts = [values[y::dy, x::dx] for y, dy, x, dx in passes] if interlaced else [values]
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    palette = bytes(range(255, -1, -1)) * 3
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette[: 3 * 2**depth]) if color == 3 else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(map(packed, parts))))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("color", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_labels_of_few_bits_are_those_that_are_stored(
    depth: int, color: int, interlaced: bool, tmp_path: Path
) -> None:
    painted_set(tmp_path, train=1, val=1)
    labels = np.minimum(random_mask(7), 2**depth - 1)
    png = png_of(labels, depth=depth, color=color, interlaced=interlaced)
    (tmp_path / "masks" / "val_00.png").write_bytes(png)
    found = open_segmentation(str(tmp_path)).decoded("val_00")[1]
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.uint8


def test_an_opaque_alpha_channel_changes_no_label(tmp_path: Path) -> None:
    painted_set(tmp_path, train=1, val=1)
    mask = Image.fromarray(random_mask(7))
    opaque = Image.merge("LA", (mask, Image.new("L", mask.size, 255)))
    opaque.save(tmp_path / "masks" / "val_00.png")
    data = open_segmentation(str(tmp_path))
    np.testing.assert_array_equal(data.decoded("val_00")[1], random_mask(7))


def test_masks_are_turned_as_their_photographs_are(tmp_path: Path) -> None:
    painted_set(tmp_path, train=1, val=1)
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down: the size is the same
    for kind in ("images", "masks"):
        path = tmp_path / kind / "val_00.png"
        with Image.open(path) as upright:
            turned = upright.transpose(Image.Transpose.ROTATE_180)
        turned.save(path, exif=exif)
    image, labels = open_segmentation(str(tmp_path)).decoded("val_00")
    np.testing.assert_array_equal(labels, random_mask(1))
    np.testing.assert_array_equal(np.asarray(image), painted(labels))


def palette_mask(grays: list[int]) -> Image.Image:
    """Return a mask whose palette shows index 0, 1, ... as these grays."""
    mask = Image.fromarray(np.minimum(random_mask(3), len(grays) - 1))
    mask.putpalette([gray for gray in grays for _ in range(3)])
    return mask


def deep_mask() -> Image.Image:
    return Image.fromarray(random_mask(3).astype(np.uint16))


def in_colors(mode: str) -> Image.Image:
    return Image.fromarray(painted(random_mask(3))).convert(mode)


def see_through() -> Image.Image:
    mask = Image.fromarray(random_mask(3))
    return Image.merge("LA", (mask, mask))


NO_LABELS: dict[str, tuple[Callable[[], Image.Image], dict[str, Any], str]] = {
    "colors": (lambda: in_colors("RGB"), {}, r"its mode is RGB; save it as an 8-bit PNG"),
    "colors and alpha": (lambda: in_colors("RGBA"), {}, r"its mode is RGBA; save it"),
    "gray, partly transparent": (see_through, {}, r"its mode is LA; save it as an 8-bit PNG"),
    "16 bits": (deep_mask, {}, r"it has 16 bits per channel; save it as an 8-bit PNG"),
    "jpeg": (lambda: in_colors("L"), {"format": "JPEG"}, r"it is a JPEG file; save masks as PNG"),
    "webp": (lambda: in_colors("RGB"), {"format": "WEBP"}, r"it is a WEBP file; save masks as PNG"),
    "tiff": (lambda: in_colors("L"), {"format": "TIFF"}, r"it is a TIFF file; save masks as PNG"),
    "palette made of grays": (
        lambda: palette_mask([0, 2]),
        {},
        r"its palette shows index 1 as gray 2, and both could be the label; save it as an 8-bit",
    ),
    "palette made of grays with void": (
        lambda: palette_mask([0, 1, 255]),
        {},
        r"its palette shows index 2 as gray 255, and both could be the label; save it as an 8-bit",
    ),
    "palette sorted by frequency": (
        lambda: palette_mask([1, 0, 2]),
        {},
        r"its palette shows index 0 as gray 1, and both could be the label; save it as an 8-bit",
    ),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_files_that_hold_no_labels_are_refused_by_content(kind: str, tmp_path: Path) -> None:
    make, how, message = NO_LABELS[kind]
    painted_set(tmp_path)
    make().save(tmp_path / "masks" / "val_00.png", **how)
    with pytest.raises(ShardError, match=rf"masks/val_00\.png: {message}"):
        list(open_segmentation(str(tmp_path)).batches("val", batch_size=4))


@pytest.mark.parametrize("grays", [[0, 255], [255, 0], [0, 128, 255], [0, 1, 2]])
def test_indices_of_a_palette_made_for_viewing_are_the_labels(
    grays: list[int], tmp_path: Path
) -> None:
    painted_set(tmp_path)
    palette_mask(grays).save(tmp_path / "masks" / "val_00.png")
    (labels,) = open_segmentation(str(tmp_path)).decoded("val_00")[1:]
    np.testing.assert_array_equal(labels, np.minimum(random_mask(3), len(grays) - 1))


@pytest.mark.parametrize("name", ["images/val_00.JPG", "masks/val_00.PNG"])
def test_two_files_of_one_id_are_refused(name: str, tmp_path: Path) -> None:
    painted_set(tmp_path)
    Image.fromarray(random_mask(0)).save(tmp_path / name)
    with pytest.raises(ShardError, match=r"are two files of the id 'val_00'; remove one of them"):
        open_segmentation(str(tmp_path))


def test_classes_of_one_name_are_told_apart_by_their_labels(tmp_path: Path) -> None:
    painted_set(tmp_path)
    (tmp_path / "classes.txt").write_text("door\nroad\ndoor\n")
    assert open_segmentation(str(tmp_path)).classes == ("door (0)", "road (1)", "door (2)")


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_missing_files_are_counted_and_named(tmp_path: Path, kind: str) -> None:
    painted_set(tmp_path)
    for index in range(4):
        (tmp_path / f"{kind}s" / f"val_{index:02d}.png").unlink()
    expected = (
        rf"4 of 5 ids in val\.txt have no {kind} in {kind}s/ \(val_00, val_01, val_02, \.\.\.\)"
    )
    with pytest.raises(ShardError, match=expected):
        open_segmentation(str(tmp_path))


@pytest.mark.parametrize("name", ["classes.txt", "train.txt", "val.txt"])
def test_missing_and_empty_lists_are_named(tmp_path: Path, name: str) -> None:
    painted_set(tmp_path)
    (tmp_path / name).write_text("\n")
    with pytest.raises(ShardError, match=rf"{name}: is empty; write one name per line"):
        open_segmentation(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ShardError, match=rf"{name}: is missing; a segmentation set has images/"):
        open_segmentation(str(tmp_path))


def test_more_classes_than_8_bits_hold_are_refused(tmp_path: Path) -> None:
    painted_set(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(f"class{index}" for index in range(256)))
    with pytest.raises(ShardError, match=r"256 classes do not fit 8-bit masks"):
        open_segmentation(str(tmp_path))


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    painted_set(tmp_path)
    path = tmp_path / kind / "train_02.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ShardError, match=rf"{kind}/train_02\.png: cannot be decoded"):
        list(open_segmentation(str(tmp_path)).batches("train", batch_size=4))


def test_camvid_is_read_as_its_readme_says(shared: Path) -> None:
    data = open_segmentation(str(shared / "data" / "segmentation"), size_px=36)
    assert len(data.classes) == 11
    sizes = {split: len(names) for split, names in data.splits.items()}
    assert sizes == {"train": 367, "val": 101, "test": 233}
    masks = torch.cat([masks for _, masks in data.batches("val", batch_size=16)])
    assert masks.shape == (101, 360, 480)
    road = data.classes.index("road")
    assert float((masks == road).float().mean()) == pytest.approx(0.2895, abs=5e-5)
    assert float((masks == 255).float().mean()) == pytest.approx(0.0170, abs=5e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_that_a_split_lists_twice_is_refused(split: str, tmp_path: Path) -> None:
    painted_set(tmp_path)
    list_file = tmp_path / f"{split}.txt"
    list_file.write_text(f"{list_file.read_text()}\n {split}_00 \n")
    message = rf"{split}\.txt: 1 lines occur more than once \({split}_00\).*remove the repeated"
    with pytest.raises(ShardError, match=message):
        open_segmentation(str(tmp_path))
