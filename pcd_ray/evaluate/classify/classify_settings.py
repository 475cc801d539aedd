"""What kNN and the linear probe are asked for, with defaults resolved for the sets."""

from dataclasses import asdict
from typing import Any

from pcd_ray.config import Config, LinearConfig
from pcd_ray.data.augment import ViewRecipe
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.classify.feature_store import TRANSFORM, set_sha256
from pcd_ray.evaluate.classify.knn import TEMPERATURE
from pcd_ray.evaluate.classify.linear_probe import LinearSettings
from pcd_ray.evaluate.eval_sets import KnnImages, crop_size_px, open_knn_images

DEFAULT_KS = (1, 10, 20, 100, 200)
HEADLINE_K = 20
"""Neighbours behind ``knn_top1``; the largest number below it where it is not among those asked."""


def open_images(config: Config) -> KnnImages:
    """Return the images of ``eval.knn_train`` and ``eval.knn_test``.

    Raises:
        ConfigError: the options are empty.
        ShardError: as `open_knn_images`.
    """
    images = open_knn_images(config)
    if images is None:
        raise ConfigError(
            "eval.knn_train='' and eval.knn_test='': there is nothing to classify; give two parts "
            "of one data set, as class folders, packed shards or list files"
        )
    return images


def open_for_knn(config: Config) -> KnnImages:
    """Return the images, enough of them to vote.

    Raises:
        ConfigError: the options are empty, or a number of neighbours is above that of images.
        ShardError: as `open_knn_images`.
    """
    images = open_images(config)
    neighbours(config.eval.knn_ks, voters_of(images))
    return images


def knn_notes(images: KnnImages, config: Config) -> list[str]:
    """Return which images and numbers of neighbours are left out, and why."""
    return [*images.left_out, *neighbours(config.eval.knn_ks, voters_of(images))[1]]


def linear_notes(images: KnnImages, config: Config) -> list[str]:
    """Return which images are left out, and why."""
    del config
    if not images.leave_one_out:
        return list(images.left_out)
    same = "eval.knn_test is eval.knn_train: the probe is scored on images that it was trained on"
    return [*images.left_out, same]


def knn_facts(images: KnnImages, config: Config, device: str) -> dict[str, Any]:
    """Return all that numbers follow from besides sets and network, as plain data."""
    del device
    ks, _ = neighbours(config.eval.knn_ks, voters_of(images))
    return {
        **_facts(images, config),
        "ks": list(ks),
        "headline_k": headline_of(ks),
        "temperature": TEMPERATURE,
        "leave_one_out": images.leave_one_out,
    }


def linear_facts(images: KnnImages, config: Config, device: str) -> dict[str, Any]:
    """Return all that numbers follow from besides sets, network and seed, as plain data."""
    del device
    linear = config.eval.linear
    settings = asdict(linear_settings(linear, seed=0))
    del settings["seed"]
    settings["base_lrs"] = list(linear.base_lrs)
    if linear.views == "augmented":
        recipe = asdict(crops_and_flips(config))
        settings["augmentation"] = {name: value for name, value in recipe.items() if value}
    return {**_facts(images, config), "views": linear.views, **settings}


def contents_of(images: KnnImages) -> list[str]:
    """Return what differs where the sets do."""
    return [set_sha256(images.train), set_sha256(images.test)]


def _facts(images: KnnImages, config: Config) -> dict[str, Any]:
    return {
        "crop_px": crop_size_px(config),
        "crop": TRANSFORM,
        "train_images": images.train.num_rows,
        "test_images": images.test.num_rows,
    }


def voters_of(images: KnnImages) -> int:
    """Return how many images may vote on one."""
    return int(images.train.num_rows) - images.leave_one_out


def headline_of(ks: tuple[int, ...]) -> int:
    """Return the number of neighbours behind ``knn_top1``."""
    return max((k for k in ks if k <= HEADLINE_K), default=min(ks))


def neighbours(asked: tuple[int, ...], num_images: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the numbers of neighbours to judge by, and a line if usual ones are left out.

    Raises:
        ConfigError: one that the user asked for is above the number of images that vote.
    """
    above = [k for k in asked or DEFAULT_KS if k > num_images]
    if asked and above:
        raise ConfigError(
            f"eval.knn_ks={list(asked)}: {above} are more neighbours than the {num_images:,} "
            f"images of eval.knn_train; use {num_images} at most, or give more images"
        )
    if not above:
        return asked or DEFAULT_KS, ()
    line = f"k = {', '.join(map(str, above))}: eval.knn_train has {num_images:,} images"
    return tuple(k for k in DEFAULT_KS if k <= num_images), (line,)


def linear_settings(linear: LinearConfig, *, seed: int) -> LinearSettings:
    """Return how a probe is trained, as plain values."""
    return LinearSettings(
        epochs=linear.epochs,
        global_batch_size=linear.global_batch_size,
        base_lrs=linear.base_lrs,
        held_out_fraction=linear.held_out_fraction,
        standardise=linear.standardise,
        seed=seed,
    )


def crops_and_flips(config: Config) -> ViewRecipe:
    """Return the augmentation that linear probes are trained with: all that is on."""
    return ViewRecipe(
        image_size_px=crop_size_px(config),
        min_scale=config.eval.linear.min_scale,
        max_scale=1.0,
        flip_prob=0.5,
        teacher_rendered=False,
    )
