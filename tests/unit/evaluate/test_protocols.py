"""What numbers follow from is in their protocol, resolved, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detection_folder import record
from detection_folder import write_set as write_detection
from PIL import Image
from segmentation_folder import painted, random_mask, write_set
from stored_shards import write_images
from tiny import tiny_config

from pcd_ray.config import Config
from pcd_ray.errors import ConfigError, ShardError
from pcd_ray.evaluate.detect.detect_settings import open_detection_set
from pcd_ray.evaluate.judging import protocol_of
from pcd_ray.evaluate.ray_kinds import KINDS


@pytest.fixture
def config_with(tmp_path: Path) -> Callable[..., Config]:
    masks = [random_mask(seed, height=32, width=48, block=16) for seed in range(3)]
    pairs = [(painted(mask), mask) for mask in masks]
    splits = {"train": pairs[:2], "val": pairs[2:]}
    sets = {
        "knn_train": write_images(tmp_path / "images"),
        "knn_test": str(tmp_path / "images"),
        "segmentation": write_set(tmp_path / "masks", splits),
    }
    data = write_detection(tmp_path / "boxes")

    def config_with(train: dict[str, Any] | None = None, **given: Any) -> Config:
        detect = {"data": data, **given.pop("detect", {})}
        values = {**sets, "detect": detect, **given}
        more = given.pop("sections", {})
        values.pop("sections", None)
        return tiny_config(eval=values, train=train or {}, **more)

    return config_with


def protocol(kind: str, config: Config, device: str = "cpu") -> str:
    chosen = KINDS[kind]
    return protocol_of(chosen, chosen.open(config), config, device)


FCN = {"method": "fcn"}
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("knn", {}, {"images_per_forward": 3}),
    ("knn", {}, {"knn_ks": [1]}),  # the default on three images
    ("knn", {}, {"linear": {"epochs": 3}}),
    ("linear", {}, {"knn_ks": [1]}),
    ("linear", {}, {"linear": {"min_scale": 0.5}}),  # of augmented views
    ("segment", {}, {"segment": {"crop_px": 99, "lr": 7.0}}),  # of the FCN
    ("segment", {}, {"image_size_px": 32}),
    ("segment", {"segment": FCN}, {"segment": {**FCN, "crop_px": 32}}),  # the default
    ("segment", {"segment": FCN}, {"segment": {**FCN, "steps": 13}}),  # 100 passes over 2 images
    ("segment", {"segment": FCN}, {"segment": {**FCN, "checkpoint_every_steps": 7}}),
    ("segment", {"segment": FCN}, {"segment": {**FCN, "log_every_steps": 7}}),
    ("segment", {"segment": FCN}, {"segment": {**FCN, "probe_steps": 7}}),
    ("detect", {}, {"detect": {"steps": 90_000}}),  # the preset's
    ("detect", {}, {"detect": {"checkpoint_every_steps": 7, "log_every_steps": 7}}),
    ("detect", {}, {"image_size_px": 32}),
    ("detect", {}, {"sections": {"augment": {"image_size_px": 96}}}),
]
OTHER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("knn", {}, {"image_size_px": 32}),
    ("linear", {}, {"linear": {"epochs": 3}}),
    ("linear", {}, {"linear": {"views": "augmented"}}),
    ("segment", {}, {"segment": {"probe_steps": 7}}),
    ("segment", {}, {"segmentation_size_px": 16}),
    ("segment", {}, {"segment": FCN}),
    ("segment", {"segment": FCN}, {"segment": {**FCN, "window_px": 16}}),
    ("detect", {}, {"detect": {"preset": "coco_2x"}}),
    ("detect", {}, {"detect": {"masks": False}}),
    ("detect", {}, {"detect": {"global_batch_size": 8}}),
]


@pytest.mark.parametrize(("kind", "one", "other"), SAME)
def test_what_changes_no_number_changes_no_protocol(
    kind: str, one: dict[str, Any], other: dict[str, Any], config_with: Callable[..., Config]
) -> None:
    assert protocol(kind, config_with(**one)) == protocol(kind, config_with(**other))


@pytest.mark.parametrize(("kind", "one", "other"), OTHER)
def test_what_changes_numbers_changes_the_protocol(
    kind: str, one: dict[str, Any], other: dict[str, Any], config_with: Callable[..., Config]
) -> None:
    assert protocol(kind, config_with(**one)) != protocol(kind, config_with(**other))


def test_batchnorm_of_a_worker_counts_where_it_is_local(config_with: Callable[..., Config]) -> None:
    one, two = (config_with({"num_workers": count}, segment=FCN) for count in (1, 2))
    assert protocol("segment", one) != protocol("segment", two)
    facts = [KINDS["segment"].facts(KINDS["segment"].open(two), two, d) for d in ("cpu", "cuda")]
    assert [each["images_per_worker"] for each in facts] == [8, 8]
    assert [each["batchnorm_images"] for each in facts] == [8, 16]
    probes = (config_with({"num_workers": count}) for count in (1, 2))
    assert len({protocol("segment", each) for each in probes}) == 1, "a probe is of one worker"


@pytest.mark.parametrize(("kind", "section"), [("segment", "segment"), ("detect", "detect")])
def test_a_batch_that_does_not_split_is_told_with_what_does(
    kind: str, section: str, config_with: Callable[..., Config]
) -> None:
    options = {section: {"global_batch_size": 7, **(FCN if kind == "segment" else {})}}
    config = config_with({"num_workers": 2}, **options)
    words = rf"^eval\.{section}\.global_batch_size=7 does not split over train\.num_workers=2; "
    with pytest.raises(ConfigError, match=f"{words}use 6 or 8$"):
        KINDS[kind].open(config)
    if kind == "segment":
        probe = config_with({"num_workers": 2}, segment={"global_batch_size": 7})
        KINDS[kind].open(probe)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_is_not_as_its_record_says_is_told_before_anything_is_trained(
    split: str, tmp_path: Path
) -> None:
    given = record(4, start=0 if split == "train" else 4)
    given["images"][3]["width"] -= 1  # no box reaches so far
    uri = write_detection(tmp_path / "boxes", **{split: given})
    image = tmp_path / "boxes" / "images" / given["images"][3]["file_name"]
    Image.new("RGB", (96, 64)).save(image)
    config = tiny_config(eval={"detect": {"data": uri}})
    with pytest.raises(ShardError, match=r"^eval\.detect\.data: .*is 96 x 64 px .* says 95 x 64"):
        open_detection_set(config)
