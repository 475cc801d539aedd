"""Real Ray: a network judged by segmentation, as a probe and as an FCN."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_folder import painted, random_mask, write_set
from tiny import tiny_config

from pcd_ray.config import Config, config_from_values
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.errors import ConfigError, EvaluationError
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.segment.ray_segmentation import judge_segmentation
from pcd_ray.evaluate.segment.segment_set import open_segment_set
from pcd_ray.evaluate.students import open_rows

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    masks = [random_mask(seed, height=64, width=96, block=32) for seed in range(17)]
    pairs = [(painted(mask), mask) for mask in masks]
    splits = {"train": pairs[:9], "val": pairs[9:14], "test": pairs[14:]}
    return write_set(tmp_path_factory.mktemp("painted") / "set", splits)


@pytest.fixture(scope="module")
def network() -> JudgedNetwork:
    torch.manual_seed(0)
    return JudgedNetwork(
        label="small",
        timm_name="test_resnet",
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        weights=build_backbone("test_resnet").body.state_dict(),
        sha256="0" * 64,
        source="drawn",
    )


def config_of(uri: str, **segment: Any) -> Config:
    small = {"probe_steps": 30, "steps": 20, "global_batch_size": 4, "crop_px": 64, "lr": 0.02}
    return config_from_values(
        {
            "train": {"num_workers": 2, "threads_per_worker": 1, "global_batch_size": 2},
            "eval": {"segmentation": uri, "segment": small | segment},
        }
    )


def judged(network: JudgedNetwork, config: Config, place: Path) -> tuple[Scores, str]:
    with contextlib.redirect_stderr(io.StringIO()) as console:
        scores = judge_segmentation(
            network,
            open_segment_set(config),
            config,
            place=Place(str(place), str(place)),
            seed=0,
            device="cpu",
        )
    return scores, console.getvalue()


def assert_complete(scores: Scores) -> None:
    names = [f"{before}{name}" for before in ("", "test_") for name in ("miou", "macc", "aacc")]
    assert list(scores.values) == list(scores.intervals) == names
    assert set(scores.classes) == {"iou", "test_iou"}
    assert list(scores.classes["iou"]) == ["sky", "road", "tree"]
    for name in ("segmentation.png", "confusion.png", "test_confusion.png"):
        assert Image.open(io.BytesIO(scores.pictures[name])).width > 200
    assert scores.test_images == {name: 3 if "test" in name else 5 for name in names}
    pixels = np.array(scores.about["confusion"]["val"])
    assert pixels.sum() == 5 * 64 * 96
    assert scores.values["aacc"] == pytest.approx(100 * np.trace(pixels) / pixels.sum())


def test_the_probe_and_the_fcn_are_judged_alike(
    folder: str, network: JudgedNetwork, tmp_path: Path
) -> None:
    probe, _ = judged(network, config_of(folder), tmp_path)
    assert_complete(probe)
    config = config_of(folder, method="fcn", window_px=64)
    fcn, console = judged(network, config, tmp_path)
    assert_complete(fcn)
    assert "step 20/20 |" in console
    assert (probe.about["output_stride"], fcn.about["output_stride"]) == (32, 8)
    assert Image.open(io.BytesIO(fcn.pictures["training.png"])).width > 200
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # each 20 steps
    again, console = judged(network, config, tmp_path)
    assert console == ""  # nothing is trained twice
    assert (again.values, again.about) == (fcn.values, fcn.about)
    assert again.pictures == fcn.pictures


def test_sets_and_networks_that_cannot_be_used_are_told_before_anything_is_trained(
    folder: str, network: JudgedNetwork, tmp_path: Path
) -> None:
    fixed = open_rows(["vit:untrained"], tiny_config(student={"backbone": "test_vit"}))
    config = config_of(folder)
    small = replace(config, eval=replace(config.eval, segmentation_size_px=40))  # 40 x 60 px
    with pytest.raises(ConfigError, match=r"^eval\.segmentation_size_px=40 does not split"):
        judged(fixed[0].networks[0], small, tmp_path)
    weights = {name: value.clone() for name, value in network.weights.items()}
    first = next(value for name, value in weights.items() if name.endswith("conv1.weight"))
    first.fill_(1e38)  # finite: what comes of it is not
    broken = JudgedNetwork(
        label="broken",
        timm_name="test_resnet",
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        weights=weights,
        sha256="1" * 64,
        source="drawn",
    )
    with pytest.raises(EvaluationError, match=r"^features: 1 of 1 images have infinite or NaN"):
        judged(broken, config_of(folder, method="fcn"), tmp_path)
