"""COCO's json files: what is read, what is left out and counted, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detection_folder import SIZE, annotation, record, square, write_set
from PIL import Image
from pycocotools import mask as coco_mask

from pcd_ray.errors import PcdError, ShardError
from pcd_ray.evaluate.detect.detection_data import open_detection
from pcd_ray.evaluate.detect.detection_masks import (
    area_of,
    bitmap_of,
    parse_segmentation,
    run_lengths_of,
    segmentation_values,
)

HEIGHT, WIDTH = SIZE


def test_ids_with_gaps_become_labels_and_back(tmp_path: Path) -> None:
    data = open_detection(write_set(tmp_path), masks=True)
    assert data.classes == ("red", "blue")
    assert data.category_ids == (3, 7)
    first = record(4)["annotations"][:2]
    image = data.train.images[0]
    assert [data.category_ids[label] for label in image.labels] == [3, 7]
    left, top, width, height = first[1]["bbox"]
    assert image.boxes[1].tolist() == [left, top, left + width, top + height]
    assert data.notes == ()


def test_crowds_empty_images_and_boxes_partly_outside_are_kept_and_counted(tmp_path: Path) -> None:
    train = record(3)
    train["annotations"] = [
        annotation(1, 100, [-10, 5, 30, 20]),
        annotation(2, 100, [90, 60, 6.4, 4.3]),  # beyond the edge by less than a pixel
        annotation(3, 100, [5, 5, 0, 9]),
        annotation(7, 100, [5, 5, 9, -2]),
        annotation(
            4, 101, [0, 0, WIDTH, HEIGHT], iscrowd=1,
            segmentation={"size": [HEIGHT, WIDTH], "counts": [100, HEIGHT * WIDTH - 100]},
        ),
    ]  # fmt: skip
    data = open_detection(write_set(tmp_path, train), masks=True)
    first, second, third = data.train.images
    assert first.boxes.tolist() == [[0, 5, 20, 25], [90, 60, 96, 64]]
    assert second.crowd.tolist() == [True]
    assert third.boxes.shape == (0, 4)
    assert data.train.num_objects == 2
    assert data.notes == (
        "instances_train.json: 1 boxes reach beyond their image by more than a pixel and are "
        "clipped (ids 1)",
        "instances_train.json: 2 boxes without a width and height above 0 are left out (ids 3, 7)",
        "instances_train.json: 1 crowd regions are no training targets; AP ignores what is found "
        "in them (ids 4)",
        "instances_train.json: 1 images have no annotation; they are kept (ids 102)",
        "instances_train.json: 1 of 2 classes have no object (blue)",
    )


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    before = open_detection(folder, masks=True)
    for split in ("train", "val"):
        file = tmp_path / f"instances_{split}.json"
        file.write_text(file.read_text(), "utf-8-sig")
    assert open_detection(folder, masks=True).sha256 == before.sha256


@pytest.mark.parametrize(
    ("segmentation", "why"),
    [
        ([5, 5, 20, 30], "their segmentation is 4 numbers, a box in place of a polygon"),
        ([[5, 5, 20, 30]], "their segmentation is 4 numbers, a box in place of a polygon"),
        ([[5, 5, 20, 30], [1, 2, 3, 4]], "their segmentation is 4 numbers, a box in place of a"),
        ([[5, 5]], "no polygon of their segmentation has 3 points"),
        ([[]], "no polygon of their segmentation has 3 points"),
    ],
)
def test_objects_without_an_outline_are_counted_and_named_with_the_reason(
    segmentation: Any, why: str, tmp_path: Path
) -> None:
    train = record(3)
    for item in train["annotations"][1:]:
        item["segmentation"] = segmentation
    data = open_detection(write_set(tmp_path, train), masks=True)
    assert data.train.num_objects == 1
    note = data.notes[0]
    assert note.startswith(f"instances_train.json: 5 objects are left out: {why}")
    assert note.endswith("(ids 1, 2, 3, ...)")
    train["annotations"][0]["segmentation"] = segmentation
    uri = write_set(tmp_path, train)
    with pytest.raises(ShardError, match=rf"0 objects to learn \(instances.*json: 6 .*{why}.*add"):
        open_detection(uri, masks=True)
    assert open_detection(uri, masks=False).train.num_objects == 6


def test_two_categories_of_one_name_are_two_classes(tmp_path: Path) -> None:
    train, val = record(4), record(3, start=4)
    for given in (train, val):
        for category in given["categories"]:
            category["name"] = "cat"
    data = open_detection(write_set(tmp_path, train, val), masks=True)
    assert data.classes == ("cat (3)", "cat (7)")


def test_coco_as_it_is_downloaded_is_recognised(tmp_path: Path) -> None:
    ours = Path(write_set(tmp_path / "ours"))
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        file = ours / f"instances_{split}.json"
        shutil.copytree(ours / "images", coco / f"{split}2017")
        shutil.copy(file, coco / "annotations" / f"instances_{split}2017.json")
    one, other = (open_detection(str(folder), masks=True) for folder in (ours, coco))
    assert [i.id for i in other.val.images] == [i.id for i in one.val.images]
    assert other.val.images[0].uri == str(coco / "val2017" / "104.png")


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    given = record(2)
    change(given)
    return given


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "annotation without image": (
        lambda r: r["annotations"][0].update(image_id=9),
        r"annotation 0: there is no image 9; mend or remove it",
    ),
    "unknown category": (
        lambda r: r["annotations"][1].update(category_id=5),
        r"annotation 1: there is no category 5; mend or remove it",
    ),
    "box outside": (
        lambda r: r["annotations"][2].update(bbox=[200, 3, 5, 5]),
        r"annotation 2: bbox=\[200, 3, 5, 5\] lies outside its image of 96 x 64 px; mend",
    ),
    "no box": (
        lambda r: r["annotations"][0].update(bbox=[1, 2, float("nan"), 4]),
        r"annotation 0: bbox=\[1, 2, nan, 4\] is not \[left, top, width, height\]",
    ),
    "no mask": (
        lambda r: r["annotations"][0].pop("segmentation"),
        r"annotation 0: it has no segmentation; set eval.detect.masks=false",
    ),
    "odd polygon": (
        lambda r: r["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        r"annotation 0: a polygon of it has an odd count",
    ),
    "mask of another size": (
        lambda r: r["annotations"][0].update(segmentation={"size": [9, 9], "counts": [81]}),
        r"annotation 0: its run-length code is of size \[9, 9\], its image \[64, 96\]",
    ),
    "short mask": (
        lambda r: r["annotations"][0].update(segmentation={"size": [64, 96], "counts": [81]}),
        r"annotation 0: its run-length code does not cover its image",
    ),
    "annotation twice": (
        lambda r: r["annotations"][1].update(id=0),
        r"1 ids in 'annotations' occur more than once \(0\); give each its own",
    ),
    "image twice": (
        lambda r: r["images"][1].update(id=100),
        r"1 ids in 'images' occur more than once \(100\)",
    ),
    "no categories": (
        lambda r: r["categories"].clear(),
        r"'categories' is empty; list the classes",
    ),
    "no images": (
        lambda r: (r["images"].clear(), r["annotations"].clear()),
        r"'images' is empty; list the images",
    ),
    "no objects": (
        lambda r: r["annotations"].clear(),
        r"0 objects to learn \(.*: 2 images have no annotation.*\); correct or add annotations",
    ),
    "numbers as segmentation": (
        lambda r: r["annotations"][0].update(segmentation=[5, 5, 20, 30, 8, 8]),
        r"annotation 0: its segmentation is neither a list of polygons .* nor a run-length code",
    ),
    "empty segmentation": (
        lambda r: r["annotations"][0].update(segmentation=[]),
        r"annotation 0: it has no segmentation; set eval.detect.masks=false",
    ),
    "no size": (
        lambda r: r["images"][0].pop("width"),
        r"image 100 is None x 64 px; give width and height",
    ),
    "text as box": (
        lambda r: r["annotations"][0].update(bbox=["1", "2", "3", "4"]),
        r"train.json: annotation 0: bbox=\['1', '2', '3', '4'\] is not \[left, top, width, "
        r"height\] in pixels, four finite numbers; mend or remove it",
    ),
    "truth as box": (
        lambda r: r["annotations"][0].update(bbox=[True, 2, 3, 4]),
        r"annotation 0: bbox=\[True, 2, 3, 4\] is not \[left",
    ),
    "huge box": (
        lambda r: r["annotations"][0].update(bbox=[1, 2, 10**400, 4]),
        r"annotation 0: bbox=\[1, 2, 10{60,} is not \[left",
    ),
    "no number as area": (
        lambda r: r["annotations"][0].update(area=float("nan")),
        r"annotation 0: area=nan is no finite number of pixels from 0; without an area it is "
        r"computed; mend",
    ),
    "infinite area": (
        lambda r: r["annotations"][0].update(area=float("inf")),
        r"annotation 0: area=inf is no finite number",
    ),
    "negative area": (
        lambda r: r["annotations"][0].update(area=-1),
        r"annotation 0: area=-1 is no finite number of pixels from 0",
    ),
    "list as area": (
        lambda r: r["annotations"][0].update(area=[12]),
        r"annotation 0: area=\[12\] is no finite number",
    ),
    "text as area": (
        lambda r: r["annotations"][0].update(area="12"),
        r"annotation 0: area='12' is no finite number",
    ),
    "list as image id": (
        lambda r: r["annotations"][0].update(image_id=[100]),
        r"train.json: annotation 0: image_id=\[100\] is no whole number; mend or remove it",
    ),
    "fraction as image id": (
        lambda r: r["annotations"][0].update(image_id=100.0),
        r"annotation 0: image_id=100.0 is no whole number",
    ),
    "mapping as category": (
        lambda r: r["annotations"][1].update(category_id={"id": 3}),
        r"annotation 1: category_id=\{'id': 3\} is no whole number; mend or remove it",
    ),
    "truth as category": (
        lambda r: r["annotations"][0].update(category_id=True),
        r"annotation 0: category_id=True is no whole number",
    ),
    "text as crowd": (
        lambda r: r["annotations"][0].update(iscrowd="0"),
        r"annotation 0: iscrowd='0' is neither 0 nor 1; mend or remove it",
    ),
    "text as polygon": (
        lambda r: r["annotations"][0].update(segmentation=[["1", "2", "9", "2", "9", "9"]]),
        r"annotation 0: its polygons hold something else than numbers",
    ),
    "truth in a polygon": (
        lambda r: r["annotations"][0].update(segmentation=[[True, 2, 9.5, 2, 9, 9]]),
        r"annotation 0: its polygons hold something else than numbers",
    ),
    "far polygon": (
        lambda r: r["annotations"][0].update(segmentation=[[1, 2, 1e9, 2, 9, 9]]),
        r"annotation 0: a polygon of it has a coordinate beyond 960 px, its image is 96 x 64 px",
    ),
    "no list": (lambda r: r.pop("annotations"), r"has no list 'annotations'; a COCO file has one"),
    "no id": (lambda r: r["images"][0].update(id="a"), r"in 'images' has no whole number as id"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_used_is_refused_in_one_message(kind: str, tmp_path: Path) -> None:
    change, message = WRONG[kind]
    uri = write_set(tmp_path)
    (tmp_path / "instances_train.json").write_text(json.dumps(broken(change)))
    with pytest.raises(PcdError, match=message):
        open_detection(uri, masks=True)


def test_a_missing_image_or_file_is_named(tmp_path: Path) -> None:
    uri = write_set(tmp_path)
    (tmp_path / "images" / "101.png").unlink()
    with pytest.raises(PcdError, match=r"1 of 4 images are not in .*images .*101\.png\); add"):
        open_detection(uri, masks=True)
    (tmp_path / "instances_val.json").unlink()
    with pytest.raises(PcdError, match=r"is no detection set; it needs images/"):
        open_detection(uri, masks=True)


def test_other_categories_in_the_two_files_are_refused(tmp_path: Path) -> None:
    val = record(1, start=4)
    val["categories"][0]["name"] = "green"
    with pytest.raises(PcdError, match=r"categories \(3, 'green'\) are not those of"):
        open_detection(write_set(tmp_path, val=val), masks=True)


def test_an_image_of_another_size_than_its_record_is_refused(tmp_path: Path) -> None:
    data = open_detection(write_set(tmp_path), masks=True)
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "100.png")
    with pytest.raises(PcdError, match=r"is 50 x 40 px \(upright\), its record 100 says 96 x 64"):
        data.train.images[0].pixels(max_pixels=10**6, max_decode_s=10)
    (tmp_path / "images" / "101.png").write_bytes(b"no image")
    with pytest.raises(PcdError, match=r"not an image; mend or remove the file"):
        data.train.images[1].pixels(max_pixels=10**6, max_decode_s=10)


POLYGONS = [[10.5, 5.2, 60.3, 9.9, 44.4, 50.1], [62, 30, 80, 30, 80, 60.5, 62, 60]]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [700, 33, 31, 40, HEIGHT * WIDTH - 804]}


def cocos(segmentation: Any) -> Any:
    """The bitmap that pycocotools makes of a segmentation."""
    codes = coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)
    return coco_mask.decode(coco_mask.merge(codes) if isinstance(codes, list) else codes)


@pytest.mark.parametrize("form", ["polygons", "runs", "compressed"])
def test_masks_are_those_of_pycocotools(form: str) -> None:
    given: Any = POLYGONS if form == "polygons" else RUNS
    wanted = cocos(given)
    if form == "compressed":
        code = coco_mask.encode(np.asfortranarray(wanted))
        given = {"size": list(code["size"]), "counts": code["counts"].decode()}
    segmentation = parse_segmentation(given, height=HEIGHT, width=WIDTH)
    assert segmentation is not None
    assert np.array_equal(bitmap_of(segmentation, from_size=SIZE, to_size=SIZE), wanted)
    mirrored = bitmap_of(segmentation, from_size=SIZE, to_size=SIZE, flipped=True)
    # a polygon's rim may fall on the other side of a pixel's centre once it is mirrored
    assert (mirrored != wanted[:, ::-1]).mean() < (0.03 if form == "polygons" else 1e-9)
    assert area_of(segmentation, height=HEIGHT, width=WIDTH) == wanted.sum()
    assert json.loads(json.dumps(segmentation_values(segmentation)))


def test_bitmaps_survive_run_lengths() -> None:
    bitmap = (np.random.default_rng(0).random(SIZE) < 0.4).astype(np.uint8)
    code = run_lengths_of(bitmap)
    assert np.array_equal(bitmap_of(code, from_size=SIZE, to_size=SIZE), bitmap)
    assert np.array_equal(coco_mask.decode(code), bitmap)


def test_resized_masks_cover_the_same_share_of_the_image() -> None:
    polygons = parse_segmentation(square(8, 16, 48, 32), height=HEIGHT, width=WIDTH)
    runs = run_lengths_of(bitmap_of(polygons, from_size=SIZE, to_size=SIZE))
    for segmentation in (polygons, runs):
        assert segmentation is not None
        small = bitmap_of(segmentation, from_size=SIZE, to_size=(32, 24))
        assert small.sum() == 12 * 16
        assert small[8:24, 2:14].all()
