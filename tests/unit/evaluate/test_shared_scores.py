"""What is measured once for all counts for the same network on the same images alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from segmentation_folder import painted_set
from tiny import tiny_config

from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone, build_backbone
from pcd_ray.evaluate.classify.classify_settings import contents_of
from pcd_ray.evaluate.eval_sets import KnnImages, open_knn_images, open_probe
from pcd_ray.evaluate.segment.segmentation import LinearHead, ProbeResult, linear_probe_miou
from pcd_ray.evaluate.shared_scores import shared_probe, store_knn, stored_knn

TOP1 = {1: 50.0, 5: 75.0}


def network(name: str = "test_resnet", **options: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, **options).eval()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for number in range(6):
        path = tmp_path / "photos" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (40 * number, 0, 0)).save(path)
    sets = {name: str(tmp_path / "photos") for name in ("knn_train", "knn_test")}
    sets |= {
        "references": str(tmp_path / "shared"),
        "segmentation": painted_set(tmp_path / "probe"),
    }
    return tiny_config(eval=sets)


def images_of(config: Config) -> KnnImages:
    images = open_knn_images(config)
    assert images is not None
    return images


def recentred() -> Backbone:
    found = network("test_vit", kwargs={"img_size": 64})
    found.recentre()
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (network, lambda: network(output_stride=8)),
        (network, lambda: network(mean=(0.1, 0.1, 0.1))),
        (network, lambda: network(std=(0.1, 0.1, 0.1))),
        (lambda: network("test_vit", kwargs={"img_size": 64}), recentred),
    ],
    ids=["stride", "mean", "std", "recentred"],
)
def test_equal_weights_are_not_equal_networks(
    config: Config, one: Callable[[], Backbone], other: Callable[[], Backbone]
) -> None:
    sets = contents_of(images_of(config))
    first, second = one(), other()
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)
    store_knn(config, first, sets, TOP1)
    assert stored_knn(config, one(), sets) == TOP1
    assert stored_knn(config, second, sets) is None


def test_other_images_at_the_same_place_are_another_set(config: Config, tmp_path: Path) -> None:
    store_knn(config, network(), contents_of(images_of(config)), TOP1)
    assert stored_knn(config, network(), contents_of(images_of(config))) == TOP1
    Image.new("RGB", (13, 12)).save(tmp_path / "photos" / "ant" / "0.png")
    assert stored_knn(config, network(), contents_of(images_of(config))) is None


def test_a_probe_is_trained_once_and_again_for_other_masks(config: Config, tmp_path: Path) -> None:
    trained = 0

    def probed() -> ProbeResult:
        data = open_probe(config)
        assert data is not None

        def measure() -> ProbeResult:
            nonlocal trained
            trained += 1
            return linear_probe_miou(network(), data, seed=0, num_steps=2)

        return shared_probe(config, network(), data, measure)

    first, again = probed(), probed()
    assert trained == 1
    assert again.scores == first.scores
    assert torch.equal(again.head.weight, first.head.weight)
    Image.new("L", (24, 16)).save(tmp_path / "probe" / "masks" / "val_00.png")
    probed()
    assert trained == 2


def test_a_stored_head_predicts_wherever_the_map_lies() -> None:
    head = LinearHead(torch.randn(4, 3), torch.randn(3))
    found = head.predict(torch.empty(2, 4, 2, 3, device="meta"), height_px=8, width_px=12)
    assert (found.shape, found.device.type) == ((2, 8, 12), "meta")
