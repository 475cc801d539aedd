"""Real Ray: features through a pool of actors, kept on storage, and what is judged on them."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from tiny_run import CLASSES, write_images

from pcd_ray.config import Config
from pcd_ray.data.augment import eval_view, views_of_bytes
from pcd_ray.data.sources import open_index
from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.classify.classify_settings import (
    crops_and_flips,
    linear_settings,
    open_images,
)
from pcd_ray.evaluate.classify.feature_store import MANIFEST, read_features
from pcd_ray.evaluate.classify.knn import knn_top1_pct
from pcd_ray.evaluate.classify.linear_probe import ProbeState, ProbeTask, fit_cached, probe_steps
from pcd_ray.evaluate.classify.ray_classify import judge_knn, judge_linear
from pcd_ray.evaluate.classify.ray_features import StoredFeatures, store_features
from pcd_ray.evaluate.features import pooled_features
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.students import open_rows
from pcd_ray.seeds import derive_seed

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_IMAGES, PER_PART = 23, 8  # whole tasks to a part: each forward pass is the same again
SIZE_PX = 32


def config_for(root: Path, **evaluation: object) -> Config:
    """Return a config of two sets of coloured images."""
    train = write_images(root / "train", NUM_IMAGES, seed=0)
    test = write_images(root / "test", 12, seed=1)
    return tiny_config(
        data={"images_per_task": 4},
        eval={
            "knn_train": train,
            "knn_test": test,
            "image_size_px": SIZE_PX,
            "images_per_forward": 3,
            **evaluation,
        },
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_for(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def network(config: Config) -> JudgedNetwork:
    return open_rows(["untrained"], config)[0].networks[0]


def stored(network: JudgedNetwork, config: Config, folder: Path) -> StoredFeatures:
    return store_features(
        network,
        open_index(config.eval.knn_train),
        config,
        folder=str(folder),
        device="cpu",
        images_per_part=PER_PART,
    )


def written_at(found: StoredFeatures) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(found.uri).iterdir()}


@pytest.fixture(scope="module")
def first(
    config: Config,
    network: JudgedNetwork,
    tmp_path_factory: pytest.TempPathFactory,
    ray_session: None,
) -> StoredFeatures:
    del ray_session
    return stored(network, config, tmp_path_factory.mktemp("features"))


def test_features_are_those_computed_directly_and_computed_once(
    config: Config, network: JudgedNetwork, first: StoredFeatures
) -> None:
    assert (first.num_images, first.num_computed) == (NUM_IMAGES, NUM_IMAGES)
    read = read_features(first.uri)
    features, labels = direct(network, config.eval.knn_train)
    torch.testing.assert_close(read.features, features, rtol=1e-5, atol=1e-6)  # other batches
    assert torch.equal(read.labels, labels)
    manifest = json.loads((Path(first.uri) / MANIFEST).read_text())
    assert manifest["request"]["network_sha256"] == network.sha256
    assert [part["images"] for part in manifest["parts"]] == [8, 8, 7]

    before = written_at(first)
    again = stored(network, config, Path(first.uri).parent)
    assert (again.uri, again.num_computed) == (first.uri, 0)
    assert written_at(again) == before


def test_only_what_is_missing_or_damaged_is_computed_after_an_interruption(
    config: Config, network: JudgedNetwork, first: StoredFeatures, tmp_path: Path
) -> None:
    folder = tmp_path / Path(first.uri).name
    shutil.copytree(first.uri, folder)
    (folder / MANIFEST).unlink()
    (folder / "part-00000.parquet").unlink()
    (folder / "part-00002.parquet").write_bytes(b"no parquet")
    kept = (folder / "part-00001.parquet").stat().st_mtime_ns
    again = stored(network, config, tmp_path)
    assert (again.uri, again.num_computed) == (str(folder), 8 + 7)
    assert (folder / "part-00001.parquet").stat().st_mtime_ns == kept
    assert torch.equal(read_features(again.uri).features, read_features(first.uri).features)


def test_another_size_of_crops_has_a_folder_of_its_own(
    config: Config, network: JudgedNetwork, first: StoredFeatures
) -> None:
    larger = replace(config, eval=replace(config.eval, image_size_px=40))
    found = stored(network, larger, Path(first.uri).parent)
    assert found.num_computed == NUM_IMAGES
    assert found.uri != first.uri
    assert stored(network, config, Path(first.uri).parent).num_computed == 0


def test_an_image_that_cannot_be_decoded_is_named_and_finished_parts_are_kept(
    network: JudgedNetwork, tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    index = open_index(config.eval.knn_train)
    key, uri = (index.column(name)[20].as_py() for name in ("key", "uri"))
    good = Path(uri).read_bytes()
    bad = good[: len(good) // 2]
    Path(uri).write_bytes(bad)
    with pytest.raises(ShardError, match=f"image '{key}' in .*truncated; mend or remove"):
        stored(network, config, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert not (folder / MANIFEST).exists()
    kept = len(list(folder.glob("part-*")))
    assert kept == 2  # the image is of the third
    Path(uri).write_bytes(bad + good[len(bad) :])  # mended, no byte more or less


def test_features_that_are_not_finite_are_refused(
    config: Config, network: JudgedNetwork, tmp_path: Path
) -> None:
    name = next(name for name, value in network.weights.items() if value.ndim == 4)
    huge = network.weights[name].sign() * 1e38  # finite: what comes of it is not
    weights = {**network.weights, name: huge}
    with pytest.raises(EvaluationError, match="images have infinite or NaN values"):
        stored(replace(network, weights=weights, sha256="other"), config, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all judgements of the network keep what they share."""
    return tmp_path_factory.mktemp("judged")


def place_in(folder: Path) -> Place:
    return Place(str(folder), f"{folder}/part")


def test_scores_are_those_of_features_computed_directly_and_share_them(
    config: Config, network: JudgedNetwork, folder: Path
) -> None:
    scores = judge_knn(
        network, open_images(config), config, place=place_in(folder), seed=0, device="cpu"
    )
    train, test = (direct(network, uri) for uri in (config.eval.knn_train, config.eval.knn_test))
    expected = knn_top1_pct(*train, *test, ks=(1, 10, 20))
    named = {f"knn_k{k}": value for k, value in expected.items()}
    assert scores.values == {"knn_top1": expected[20], **named}
    assert scores.intervals.keys() == scores.values.keys()
    assert scores.test_images == dict.fromkeys(scores.values, 12)
    assert scores.about["features_computed"] == NUM_IMAGES + 12
    assert set(scores.classes["knn_top1"]) == set(CLASSES)

    again = judge_linear(
        network, open_images(config), config, place=place_in(folder), seed=0, device="cpu"
    )
    assert again.about["features_computed"] == 0
    settings = linear_settings(config.eval.linear, seed=0)
    probe = fit_cached(*train, settings, device=torch.device("cpu"))
    expected_top1 = 100 * probe.classifier.hits(*test, top=1).double().mean()
    assert again.values == {"linear_top1": pytest.approx(float(expected_top1))}  # of 3 classes
    assert again.about["base_lr"] == probe.base_lr
    assert list(again.about["held_out_top1_pct"]) == [str(r) for r in settings.base_lrs]


def direct(network: JudgedNetwork, uri: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of a folder's crops and labels, without Ray."""
    files = sorted(Path(uri).glob("*/*.jpg"))
    crops = np.stack([eval_view(Image.open(file), SIZE_PX) for file in files])
    features = pooled_features(network.backbone(), [torch.from_numpy(crops)])
    classes = sorted({file.parent.name for file in files})
    return features, torch.tensor([classes.index(file.parent.name) for file in files])


def test_augmented_views_train_the_probe_as_planned_and_an_interruption_is_not_noticed(
    network: JudgedNetwork, config: Config, folder: Path
) -> None:
    linear = replace(
        config.eval.linear, views="augmented", epochs=3, global_batch_size=8, base_lrs=(0.1, 1.0)
    )
    config = replace(config, eval=replace(config.eval, linear=linear))
    whole = judge_linear(
        network, open_images(config), config, place=place_in(folder), seed=5, device="cpu"
    )
    state = only_state(folder)
    assert state["step"] == math.ceil(3 * NUM_IMAGES / 8)

    index = open_index(config.eval.knn_train)
    features, labels = direct(network, config.eval.knn_train)
    task = ProbeTask.of(features, labels, linear_settings(linear, seed=5))
    expected = ProbeState.new(task, torch.device("cpu"))
    epochs, rows = task.order.rows(0, task.num_steps * task.batch_size)
    recipe = crops_and_flips(config)
    entries = index.select(["key", "uri"]).to_pylist()
    views = []
    for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True):
        own_seed = derive_seed(5, "augment", epoch, entries[row]["key"])
        content = Path(entries[row]["uri"]).read_bytes()
        views.append(views_of_bytes(content, recipe, own_seed, max_pixels=10**6).student)
    pooled = pooled_features(network.backbone(), torch.from_numpy(np.stack(views)).split(32))
    batches = zip(pooled.split(8), torch.from_numpy(rows).split(8), strict=True)
    half = {}
    for _ in probe_steps(task, expected, batches):
        if expected.step == 4:
            half = {name: copy_of(value) for name, value in asdict(expected).items()}
    torch.testing.assert_close(state["weight"], expected.weight, rtol=1e-3, atol=1e-5)
    assert pooled.std(dim=0).max() > 0

    torch.save(half, state_file(folder))
    again = judge_linear(
        network, open_images(config), config, place=place_in(folder), seed=5, device="cpu"
    )
    resumed = only_state(folder)
    torch.testing.assert_close(resumed["weight"], state["weight"], rtol=1e-3, atol=1e-5)
    assert again.values == whole.values


def state_file(folder: Path) -> Path:
    (found,) = folder.glob("part/work/linear-*.pt")
    return found


def only_state(folder: Path) -> dict[str, Any]:
    return dict(torch.load(state_file(folder), weights_only=True))


def copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
