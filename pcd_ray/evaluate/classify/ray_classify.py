"""kNN and the linear probe of one network, on features that are computed once and kept on storage.

Features go through a pool of actors (`ray_features`); voting and training are one Ray task on the
device, and so is the probe's pass over augmented views, whose state is kept at each epoch.

Shapes: N training images, M test images, C channels.
"""

import hashlib
import io
import json
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.data.augment import ViewRecipe
from pcd_ray.data.image_index import classes_of, column
from pcd_ray.data.plan import RankPlan
from pcd_ray.data.ray_stream import Batch as ViewBatch
from pcd_ray.data.ray_views import view_batches
from pcd_ray.errors import naming
from pcd_ray.evaluate.classify.classify_settings import (
    crops_and_flips,
    headline_of,
    linear_settings,
    neighbours,
    voters_of,
)
from pcd_ray.evaluate.classify.feature_store import read_features
from pcd_ray.evaluate.classify.knn import knn_hits
from pcd_ray.evaluate.classify.linear_probe import (
    Batch,
    LinearProbe,
    LinearSettings,
    ProbeState,
    ProbeTask,
    chosen,
    fit_cached,
    probe_steps,
)
from pcd_ray.evaluate.classify.ray_features import StoredFeatures, store_features
from pcd_ray.evaluate.eval_sets import KnnImages
from pcd_ray.evaluate.features import FeatureMap, pooled_features
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.scores import Scores, interval_of_mean
from pcd_ray.progress import counted
from pcd_ray.ray_cluster import call_in_task
from pcd_ray.ray_placement import share_of_pool
from pcd_ray.ray_shares import WorkerShare


def judge_knn(
    network: JudgedNetwork,
    data: KnnImages,
    config: Config,
    *,
    place: Place,
    seed: int,
    device: str,
) -> Scores:
    """Classify the images of ``eval.knn_test`` by their neighbours in ``eval.knn_train``.

    Args:
        network: the frozen network.
        data: the sets.
        config: ``eval.knn_ks``, sizes of crops, batches and tasks.
        place: features are kept in ``shared``, for `judge_linear` too.
        seed: of the bootstrap.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``knn_top1`` and ``knn_k1``, ``knn_k10`` ... in percent, with intervals.

    Raises:
        ConfigError: a number of neighbours is above that of images.
        PcdError: as `store_features`.
    """
    ks, _ = neighbours(config.eval.knn_ks, voters_of(data))
    sets = _store_sets(network, data, config, folder=place.shared, device=device)
    work = (sets.train.uri, sets.test.uri, ks, device, data.leave_one_out)
    hits = call_in_task(_knn_hits, *work, share=_share(config, device), what="kNN: voting")
    named = {"knn_top1": hits[headline_of(ks)], **{f"knn_k{k}": hits[k] for k in ks}}
    return _scores(named, sets, seed=seed, about={})


def judge_linear(
    network: JudgedNetwork,
    data: KnnImages,
    config: Config,
    *,
    place: Place,
    seed: int,
    device: str,
) -> Scores:
    """Train a linear classifier on features of ``eval.knn_train``, score it on ``eval.knn_test``.

    Args:
        network: the frozen network.
        data: the sets.
        config: ``eval.linear``, sizes of crops, batches and tasks.
        place: features are kept in ``shared``, as of `judge_knn`, and the state of a long training
            in ``work``.
        seed: of the order of images, of which are held out, and of the bootstrap.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``linear_top1`` and, of more than five classes, ``linear_top5`` in percent, with intervals.

    Raises:
        PcdError: as `store_features`, or training diverges at all rates.
    """
    sets = _store_sets(network, data, config, folder=place.shared, device=device)
    settings = linear_settings(config.eval.linear, seed=seed)
    share = _share(config, device)
    work = _Work(sets.train.uri, sets.test.uri, settings, device, storage.absolute(place.work))
    if config.eval.linear.views == "cached":
        hits, about = call_in_task(_cached_linear, work, share=share, what="linear probe")
    else:
        task = (work, network, data.train, config)
        hits, about = call_in_task(_augmented_linear, *task, share=share, what="linear probe")
    return _scores(hits, sets, seed=seed, about=about)


@dataclass(frozen=True, slots=True)
class _Sets:
    """The two sets and where their features lie."""

    images: KnnImages
    train: StoredFeatures
    test: StoredFeatures


@dataclass(frozen=True, slots=True)
class _Work:
    """What a task trains a probe on."""

    train_uri: str
    test_uri: str
    settings: LinearSettings
    device: str
    folder: str
    """Where the state of a long training is kept."""


_Hits = dict[str, Tensor]


def _store_sets(
    network: JudgedNetwork, images: KnnImages, config: Config, *, folder: str, device: str
) -> _Sets:
    stored = []
    place = storage.absolute(folder)
    for option, index in (("eval.knn_train", images.train), ("eval.knn_test", images.test)):
        with naming(option):
            stored.append(store_features(network, index, config, folder=place, device=device))
    return _Sets(images, *stored)


def _share(config: Config, device: str) -> WorkerShare:
    return share_of_pool(config, device=device, most=1)[1]


def _knn_hits(
    train_uri: str, test_uri: str, ks: tuple[int, ...], device: str, leave_one_out: bool
) -> dict[int, Tensor]:
    train, test = read_features(train_uri), read_features(test_uri)
    return knn_hits(
        train.features,
        train.labels,
        test.features,
        test.labels,
        ks=ks,
        device=torch.device(device),
        leave_one_out=leave_one_out,
    )


def _cached_linear(work: _Work) -> tuple[_Hits, dict[str, Any]]:
    train, device = read_features(work.train_uri), torch.device(work.device)
    probe = fit_cached(train.features, train.labels, work.settings, device=device)
    return _judged(probe, work)


def _augmented_linear(
    work: _Work, network: JudgedNetwork, index: pa.Table, config: Config
) -> tuple[_Hits, dict[str, Any]]:
    """Train on new views in each epoch; go on from the state of an interrupted training."""
    train = read_features(work.train_uri)
    device = torch.device(work.device)
    task = ProbeTask.of(train.features, train.labels, work.settings)
    recipe = crops_and_flips(config)
    place = _state_uri(work, recipe)
    state = _restored(place, task, device)
    views = view_batches(
        index,
        RankPlan(
            plan=task.order,
            global_batch_size=task.batch_size,
            start_step=state.step,
            stop_step=task.num_steps,
        ),
        recipe,
        seed=work.settings.seed,
        data=config.data,
    )
    backbone = network.backbone().to(device)
    per_forward = config.eval.images_per_forward
    steps_per_epoch = -(-len(task.targets) // task.batch_size)
    with closing(views):
        steps = probe_steps(task, state, _features_of(views, backbone, per_forward))
        for _ in counted(steps, "training", "steps", task.num_steps - state.step):
            if state.step % steps_per_epoch == 0 or state.step == task.num_steps:
                _keep(place, state)
    return _judged(chosen(task, state, train.features), work)


def _features_of(
    views: Generator[ViewBatch], backbone: FeatureMap, per_forward: int
) -> Iterator[Batch]:
    for batch in views:
        pixels = torch.from_numpy(batch["student_view"])
        pooled = pooled_features(backbone, pixels.split(per_forward))
        yield pooled, torch.from_numpy(batch["row"])


def _state_uri(work: _Work, recipe: ViewRecipe) -> str:
    """Return where the state of a training lies, by all that it follows from."""
    facts = [storage.name_of(work.train_uri), asdict(work.settings), asdict(recipe)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return storage.join(work.folder, f"linear-{digest[:16]}.pt")


def _keep(uri: str, state: ProbeState) -> None:
    buffer = io.BytesIO()
    torch.save(asdict(state), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def _restored(uri: str, task: ProbeTask, device: torch.device) -> ProbeState:
    """Return the state that is kept, or a new one."""
    if not storage.exists(uri):
        return ProbeState.new(task, device)
    stored = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location=device, weights_only=True)
    return ProbeState(**stored)


def _judged(probe: LinearProbe, work: _Work) -> tuple[_Hits, dict[str, Any]]:
    """Return the probe's hits on the test images, and how its rate was chosen."""
    test = read_features(work.test_uri)
    hits = {"linear_top1": probe.classifier.hits(test.features, test.labels, top=1)}
    if len(probe.classifier.labels) > 5:
        hits["linear_top5"] = probe.classifier.hits(test.features, test.labels, top=5)
    about: dict[str, Any] = {
        "base_lr": probe.base_lr,
        "held_out_top1_pct": {str(rate): top1 for rate, top1 in probe.held_out_top1_pct.items()},
    }
    if notes := list(_notes(probe)):
        about["notes"] = notes
    return hits, about


def _notes(probe: LinearProbe) -> Iterator[str]:
    if probe.at_edge:
        yield (
            f"the chosen rate {probe.base_lr:g} is the smallest or largest of "
            "eval.linear.base_lrs; try rates beyond it"
        )
    if probe.diverged:
        rates = ", ".join(f"{rate:g}" for rate in probe.diverged)
        yield f"training diverged at {rates} of eval.linear.base_lrs, which could not be chosen"


def _scores(
    hits: _Hits,
    sets: _Sets,
    *,
    seed: int,
    about: dict[str, Any],
) -> Scores:
    headline = next(iter(hits))
    return Scores(
        values={name: 100 * float(right.double().mean()) for name, right in hits.items()},
        intervals={
            name: interval_of_mean(100 * right.double(), seed=seed) for name, right in hits.items()
        },
        test_images={name: len(right) for name, right in hits.items()},
        classes={headline: _per_class(hits[headline], sets.images)},
        about={
            **about,
            "features_computed": sets.train.num_computed + sets.test.num_computed,
            "features_s": round(sets.train.seconds + sets.test.seconds, 3),
        },
    )


def _per_class(hits: Tensor, images: KnnImages) -> dict[str, float | None]:
    """Return the accuracy on each class's test images in percent; None: it has none."""
    labels = torch.from_numpy(column(images.test, "label").astype(np.int64))
    found: dict[str, float | None] = {}
    for label, name in enumerate(classes_of(images.train)):
        mine = hits[labels == label]
        found[name] = 100 * float(mine.double().mean()) if len(mine) else None
    return found
