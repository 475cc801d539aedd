"""Evaluation sets are found bad before a run trains for them, and the message names the option."""

from pathlib import Path

import numpy as np
import pytest
from detection_folder import write_set
from PIL import Image
from segmentation_folder import painted_set, random_mask
from tiny import tiny_config

from pcd_ray.config import Config, config_to_values
from pcd_ray.data.decode import unreadable
from pcd_ray.errors import ShardError
from pcd_ray.evaluate import eval_sets
from pcd_ray.evaluate.detect.detect_settings import open_detection_set
from pcd_ray.evaluate.eval_sets import look_through, open_knn_images


def labelled(folder: Path, count: int = 10) -> Path:
    for number in range(count):
        path = folder / ("ant", "bee")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (20 * number, 0, 0)).save(path)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    evaluation = {
        "knn_train": str(labelled(tmp_path / "train")),
        "knn_test": str(labelled(tmp_path / "test", 6)),
        "segmentation": painted_set(tmp_path / "probe"),
    }
    return tiny_config(eval=evaluation)


def test_small_sets_are_read_whole_and_large_ones_by_a_sample_that_is_said(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look_through(tiny_config()) == {}
    assert look_through(config) == {
        "eval.knn_train": "all 10 images",
        "eval.knn_test": "all 6 images",
        "eval.segmentation": "all 17 images and masks",
    }
    monkeypatch.setattr(eval_sets, "KNN_SAMPLE", 6)
    monkeypatch.setattr(eval_sets, "PROBE_SAMPLE", 5)
    assert look_through(config) == {
        "eval.knn_train": "6 of 10 images",
        "eval.knn_test": "all 6 images",
        "eval.segmentation": "5 of 17 images and masks",
    }


def test_images_of_all_kinds_of_sets_are_given_up_when_they_take_long(
    config: Config, tmp_path: Path
) -> None:
    evaluation = config_to_values(config.eval)
    detect = {"data": write_set(tmp_path / "boxes")}
    hasty = tiny_config(
        data={"max_decode_s": 1e-9}, eval=evaluation | {"segmentation": "", "detect": detect}
    )
    with pytest.raises(ShardError, match=r"eval\.knn_train: .*data\.max_decode_s=1e-09"):
        look_through(hasty)
    with pytest.raises(ShardError, match=r"eval\.detect\.data: .*data\.max_decode_s=1e-09"):
        open_detection_set(hasty)
    probe = {"segmentation": evaluation["segmentation"]}
    with pytest.raises(ShardError, match=r"eval\.segmentation: .*data\.max_decode_s=1e-09"):
        look_through(tiny_config(data={"max_decode_s": 1e-9}, eval=probe))


@pytest.mark.parametrize("spelt", ["{}/", "file://{}", "{}/../train", "{}_linked"])
def test_a_set_that_votes_on_itself_is_told_however_it_is_spelt(tmp_path: Path, spelt: str) -> None:
    train = str(labelled(tmp_path / "train"))
    (tmp_path / "train_linked").symlink_to(train)
    sets = {"knn_train": spelt.format(train), "knn_test": train}
    images = open_knn_images(tiny_config(eval=sets))
    assert images is not None
    assert images.leave_one_out


@pytest.mark.parametrize("kind", ["train", "test"])
def test_any_unreadable_image_of_knn_is_named_with_its_option(
    config: Config, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind / "bee" / "03.png"
    path.write_bytes(path.read_bytes()[:50])
    message = rf"eval\.knn_{kind}: image 'bee/03\.png' in \S+: truncated; mend or remove the file"
    with pytest.raises(ShardError, match=message):
        look_through(config)


def test_an_image_in_shards_is_packed_again_a_file_is_mended() -> None:
    assert str(unreadable("a", "x/shard-00000.parquet", "truncated")).endswith(
        "truncated; mend it and pack the images again"
    )
    assert str(unreadable("a", "s3://x/a.png?region=eu", "truncated")).endswith(
        "truncated; mend or remove the file"
    )


def test_an_absent_or_bare_set_is_named_with_its_option(config: Config, tmp_path: Path) -> None:
    absent = tiny_config(eval={"knn_train": str(tmp_path / "train"), "knn_test": "nowhere"})
    with pytest.raises(ShardError, match=r"eval\.knn_test: \S+nowhere: there is no such folder"):
        open_knn_images(absent)
    bare = str(tmp_path / "train" / "ant")
    for option in ("knn_train", "knn_test"):
        values = {"knn_train": config.eval.knn_train, "knn_test": config.eval.knn_test}
        with pytest.raises(ShardError, match=rf"eval\.{option}: \S+ant has no labels; give class"):
            open_knn_images(tiny_config(eval=values | {option: bare}))


@pytest.mark.parametrize("name", ["train_11", "val_04"])
def test_any_bad_mask_or_image_of_the_probe_is_named_with_its_option(
    config: Config, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "probe" / "masks" / f"{name}.png"
    good = path.read_bytes()
    mask = random_mask(0)
    mask[0, 0] = 7
    Image.fromarray(mask).save(path)
    with pytest.raises(ShardError, match=rf"eval\.segmentation: \S+{name}\.png: labels \[7\] are"):
        look_through(config)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    with pytest.raises(ShardError, match=rf"eval\.segmentation: \S+{name}\.png: the mask is 4 x 4"):
        look_through(config)
    path.write_bytes(good)
    image = tmp_path / "probe" / "images" / f"{name}.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ShardError, match=rf"eval\.segmentation: \S+{name}\.png: cannot be decoded"):
        look_through(config)


def test_a_probe_that_lacks_a_list_is_named_with_its_option(config: Config, tmp_path: Path) -> None:
    (tmp_path / "probe" / "val.txt").unlink()
    with pytest.raises(ShardError, match=r"eval\.segmentation: \S+val\.txt: is missing"):
        look_through(config)
