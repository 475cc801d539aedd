"""A plan that is printed is a run that can begin."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from stored_shards import write_shards
from tiny import images, tiny_config

from pcd_ray.config import Config
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import fit_pca_head, load_teacher
from pcd_ray.errors import WeightsError
from pcd_ray.train.run_plan import plan_run

NUM_IMAGES, POSITIONS, CHANNELS = 3, 4, 96  # of the shards and of test_resnet at 64 px


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    write_shards(root)
    torch.manual_seed(0)
    body = build_backbone("test_resnet").body.state_dict()
    safetensors.torch.save_file(body, root / "teacher.safetensors")
    return root


def config_of(folder: Path, *, dim: int, num_images: int, size_px: int = 64) -> Config:
    return tiny_config(
        run={"root": str(folder), "name": "new"},
        augment={"image_size_px": size_px},
        teacher={
            "weights": str(folder / "teacher.safetensors"),
            "head": "pca",
            "fit": {"dim": dim, "images": num_images},
        },
        train={"global_batch_size": 1, "epochs": 4},
    )


@pytest.mark.parametrize(
    ("dim", "num_images", "size_px", "most"),
    [
        (11, 1000, 64, None),  # 3 images of 4 positions have 11 components beside their mean
        (12, 1000, 64, 11),
        (7, 2, 64, None),
        (8, 2, 64, 7),
        (96, 3, 256, None),
        (97, 3, 256, 96),  # pixels enough, but not channels
    ],
)
def test_a_head_that_cannot_be_fitted_is_refused_before_workers_try(
    dim: int, num_images: int, size_px: int, most: int | None, folder: Path
) -> None:
    config = config_of(folder, dim=dim, num_images=num_images, size_px=size_px)
    shards = open_shards(str(folder / "packed"))
    loaded = load_teacher(config.teacher)
    batches = [images(0, min(num_images, NUM_IMAGES), size_px)]
    if most is None:
        assert plan_run(config, shards, device="cpu").embedding_width == dim
        assert fit_pca_head(loaded, batches, config.teacher.fit)[0].out_features == dim
        return
    for attempt in (
        lambda: plan_run(config, shards, device="cpu"),
        lambda: fit_pca_head(loaded, batches, config.teacher.fit),
    ):
        with pytest.raises(WeightsError, match=rf"fit\.dim={dim} exceeds .*; use at most {most}"):
            attempt()
