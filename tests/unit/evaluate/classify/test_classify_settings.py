"""Which numbers of neighbours and which augmentation an evaluation uses."""

from dataclasses import MISSING, fields

import pyarrow as pa
import pytest
from tiny import tiny_config

from pcd_ray.config import EvalConfig, config_from_values
from pcd_ray.data.augment import ViewRecipe
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.classify.classify_settings import (
    DEFAULT_KS,
    crops_and_flips,
    linear_facts,
    linear_settings,
    neighbours,
)
from pcd_ray.evaluate.eval_sets import KnnImages


def test_usual_numbers_of_neighbours_beyond_the_set_are_left_out_and_said() -> None:
    assert neighbours((), 1000) == (DEFAULT_KS, ())
    ks, (line,) = neighbours((), 99)
    assert ks == (1, 10, 20)
    assert line == "k = 100, 200: eval.knn_train has 99 images"


def test_numbers_of_neighbours_that_a_user_asks_for_are_taken_or_refused() -> None:
    assert neighbours((5, 3), 5) == ((5, 3), ())
    with pytest.raises(
        ConfigError,
        match=r"eval\.knn_ks=\[3, 50, 6\]: \[50, 6\] are more neighbours than the 5 images of "
        r"eval\.knn_train; use 5 at most",
    ):
        neighbours((3, 50, 6), 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"knn_ks": [0, 3]}, r"eval\.knn_ks must be different numbers > 0"),
        ({"knn_ks": [3, 3]}, r"eval\.knn_ks must be different numbers > 0"),
        ({"linear": {"base_lrs": []}}, r"eval\.linear\.base_lrs must be different numbers > 0"),
        ({"linear": {"base_lrs": [0.1, 0.1]}}, r"eval\.linear\.base_lrs must be different"),
        ({"linear": {"epochs": 0}}, r"eval\.linear\.epochs must be > 0"),
        ({"linear": {"held_out_fraction": 0.6}}, r"held_out_fraction must be in \(0, 0\.5\]"),
        ({"linear": {"min_scale": 0}}, r"eval\.linear\.min_scale must be in \(0, 1\]"),
        ({"linear": {"views": "crops"}}, r"eval\.linear\.views='crops' is not one of"),
    ],
)
def test_options_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_values({"eval": values})


def test_the_settings_are_the_options() -> None:
    settings = linear_settings(EvalConfig().linear, seed=7)
    assert (settings.epochs, settings.global_batch_size, settings.seed) == (90, 1024, 7)
    assert 0.1 in settings.base_lrs  # MoCo v3's


def test_a_probe_is_trained_with_random_crops_and_flips_whatever_a_run_is_augmented_with() -> None:
    config = tiny_config(
        augment={"image_size_px": 24, "jitter_prob": 1.0, "grey_prob": 1.0, "max_scale": 0.9},
        eval={"linear": {"views": "augmented", "min_scale": 0.3}},
    )
    on = {"image_size_px": 24, "min_scale": 0.3, "max_scale": 1.0, "flip_prob": 0.5}
    assert crops_and_flips(config) == ViewRecipe(**on, teacher_rendered=False)
    images = KnnImages(pa.table({"key": ["a"]}), pa.table({"key": ["b"]}))
    assert linear_facts(images, config, "cpu")["augmentation"] == on


def test_an_augmentation_that_a_recipe_does_not_name_is_off() -> None:
    """Else a new one would change probes, and their stored scores would be read all the same."""
    defaults = {f.name: f.default for f in fields(ViewRecipe) if f.default is not MISSING}
    assert [name for name, value in defaults.items() if value] == ["max_scale", "teacher_rendered"]
