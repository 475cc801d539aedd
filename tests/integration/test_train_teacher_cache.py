"""Runs that train on stored maps of their teachers, through Ray."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny_run import NUM_IMAGES, changed, prepare, write_teacher
from torch import Tensor

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import Checkpoint, RunFolder, find_checkpoint
from pcd_ray.config import Config
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.plan import EpochPlan, RankPlan
from pcd_ray.data.ray_views import view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.build import adapted_teacher
from pcd_ray.distill.build_teacher import load_teachers
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.errors import CheckpointError, ShardError, TrainingError
from pcd_ray.ray_shares import WorkerShare
from pcd_ray.train.ray_heads import fit_head
from pcd_ray.train.ray_launch import TrainResult, dry_run, train
from pcd_ray.train.ray_teacher_cache import build_caches
from pcd_ray.train.teacher_cache import TeacherCache, cache_of

pytestmark = pytest.mark.usefixtures("ray_session")

EPOCHS, VIEWS = 3, 2
SHARE = WorkerShare("cpu", 0.0, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    """A run of three epochs, with two crops and a published head, judged by nothing."""
    del ray_session
    config = prepare(tmp_path_factory.mktemp("cached"))
    return changed(
        config,
        pairing={"kind": "cross_view_geometric"},
        train={"epochs": EPOCHS, "checkpoint_every_steps": 0, "keep_last": 9},
        eval={"every_epochs": 0, "knn_train": "", "knn_test": ""},
    )


def with_cache(config: Config, name: str, *, views: int, **sections: dict[str, Any]) -> Config:
    """Return the same run under another name, on stored maps."""
    teacher = sections.pop("teacher", {}) | {"cache": {"views": views}}
    return changed(config, run={"name": name}, teacher=teacher, **sections)


def elsewhere(config: Config, folder: str) -> Config:
    """Return the same run with runs and caches in a folder of its own."""
    return changed(config, run={"root": str(Path(config.run.root) / folder)})


def trained(config: Config) -> tuple[TrainResult, str]:
    with contextlib.redirect_stderr(io.StringIO()) as console:
        result = train(config)
    return result, console.getvalue()


def caches(config: Config, *, per_part: int = 0) -> list[TeacherCache]:
    shards = open_shards(config.data.shards)
    teachers = load_teachers(config)
    found = [cache_of(config, loaded, shards, per_part=per_part) for loaded in teachers]
    return [cache for cache in found if cache is not None]


def stored_maps(cache: TeacherCache) -> Tensor:
    """Return all maps (V, N, D, H, W), as numpy reads their files."""
    files = sorted(Path(cache.maps.uri).glob("part-*.npy"))
    maps = torch.from_numpy(np.concatenate([np.load(file) for file in files])).float()
    return maps.reshape(cache.maps.views, NUM_IMAGES, *cache.maps.shape)


def newest(config: Config) -> Checkpoint:
    return find_checkpoint(RunFolder.of(config).uri)


@dataclass
class Run:
    """The first run of a cache, and what was planned and said."""

    config: Config
    plan: dict[str, Any]
    result: TrainResult
    console: str


@pytest.fixture(scope="module")
def first(prepared: Config) -> Run:
    config = with_cache(prepared, "first", views=VIEWS)
    plan = dry_run(config).summary()["teacher_cache"]
    result, console = trained(config)
    return Run(config, plan, result, console)


def test_the_cost_is_said_before_anything_is_computed(first: Run) -> None:
    (cache,) = caches(first.config)
    count = VIEWS * NUM_IMAGES
    assert first.plan == {
        "maps": count,
        "bytes": sum(file.stat().st_size for file in Path(cache.maps.uri).glob("*.npy")),
        "uri": cache.maps.uri,
        "state": "missing",
    }
    cost = f"teacher cache: {count} maps of 16 x 4 x 4 in float16, 0.045 MB, in {cache.maps.uri}\n"
    done = f"teacher cache: {count} maps computed"
    assert first.console.index(cost) < first.console.index(done)
    assert dry_run(first.config).summary()["teacher_cache"]["state"] == "whole"


def test_a_run_without_a_labeled_set_says_how_to_evaluate_it(first: Run) -> None:
    how = first.result.summary()["not_evaluated"]
    assert how.startswith("no labeled set is given (eval.knn_train and eval.knn_test, or eval.seg")
    assert f"`pcd-ray eval knn {first.result.path} eval.knn_train=FOLDER eval.knn_test=" in how
    assert first.console.endswith(f"note: not evaluated: {how}\n")


def test_the_manifest_says_whose_maps_they_are(first: Run) -> None:
    (cache,) = caches(first.config)
    manifest = json.loads((Path(cache.maps.uri) / "manifest.json").read_text())
    about = newest(first.config).about["teacher"]
    assert manifest["teacher"] == about
    assert about["licence"] == "MIT"
    assert manifest["made_of"] == cache.made_of
    assert (manifest["bytes"], manifest["views"]) == (first.plan["bytes"], VIEWS)


def test_views_are_those_without_a_cache_until_they_come_again(prepared: Config) -> None:
    """Bit by bit; the map beside each is the teacher's on the view that it would have seen."""
    config = elsewhere(with_cache(prepared, "views", views=VIEWS), "views")
    shards = open_shards(config.data.shards)
    assert build_caches(config, shards, share=SHARE, say=print) == VIEWS * NUM_IMAGES
    (cache,) = caches(config)
    cached = batches_of(config, {"teacher": cache.maps})
    plain = batches_of(config, {})
    whole = stored_maps(cache)
    teacher = teacher_alone(config)
    for one, other in zip(cached, plain, strict=True):
        assert "teacher_view" not in one
        assert np.array_equal(one["row"], other["row"])
        assert np.array_equal(one["epoch"], other["epoch"])
        new = one["epoch"] < VIEWS
        for name in ("student_view", "student_box", "teacher_box"):
            assert np.array_equal(one[name][new], other[name][new]), name
        numbers = torch.from_numpy(one["epoch"] % VIEWS)
        read = torch.from_numpy(one["teacher_map"].copy())
        assert read.dtype == torch.float16
        assert torch.equal(read.float(), whole[numbers, torch.from_numpy(one["row"])])
        if new.all():
            exact = teacher(torch.from_numpy(other["teacher_view"]))
            # half of float16's last bit, and float32's own rounding in batches of other sizes
            torch.testing.assert_close(read.float(), exact, rtol=2**-11 + 1e-5, atol=1e-6)
    seen = {
        (epoch, row): view
        for batch in cached
        for epoch, row, view in zip(
            batch["epoch"], batch["row"], batch["student_view"], strict=True
        )
    }
    for row in range(NUM_IMAGES):
        assert np.array_equal(seen[0, row], seen[VIEWS, row])
        assert not np.array_equal(seen[0, row], seen[1, row])


def batches_of(config: Config, maps: dict[str, StoredMaps]) -> list[dict[str, Any]]:
    """Return all batches of a run of one worker."""
    shards = open_shards(config.data.shards)
    plan = EpochPlan(shards.plan_sources, config.run.seed)
    batches = view_batches(
        shards.index,
        RankPlan(plan=plan, global_batch_size=11, stop_step=plan.total_steps(EPOCHS, 11)),
        recipe_from(config.augment, config.pairing.kind),
        seed=config.run.seed,
        data=config.data,
        maps=maps,
    )
    return list(batches)


def teacher_alone(config: Config) -> FrozenTeacher:
    (loaded,) = load_teachers(config)
    return adapted_teacher(config, loaded, None)


def test_a_run_learns_from_the_stored_maps_and_from_nothing_else(first: Run) -> None:
    """The queue holds the pooled maps as stored, to rounding in float32, not as the teacher's."""
    (cache,) = caches(first.config)
    keys = F.normalize(stored_maps(cache).mean((3, 4)), dim=2)
    assert_queue_is_of(newest(first.config), keys[(EPOCHS - 1) % VIEWS])


def assert_queue_is_of(stored: Checkpoint, keys: Tensor) -> None:
    """All vectors of the queue are among the keys (N, D)."""
    nearest = (stored.state["queues"][0]["negatives"] @ keys.T).max(dim=1).values
    torch.testing.assert_close(nearest, torch.ones_like(nearest), rtol=0, atol=1e-6)


def test_a_second_run_computes_no_map_and_follows_the_files_alone(
    first: Run, tmp_path: Path
) -> None:
    """Maps that were drawn at random are what it learns from: the teacher is not asked."""
    (cache,) = caches(first.config)
    moved = tmp_path / Path(cache.maps.uri).name
    shutil.copytree(cache.maps.uri, moved)
    (part,) = moved.glob("part-*.npy")
    random = np.random.default_rng(0)
    drawn = random.normal(size=(VIEWS * NUM_IMAGES, *cache.maps.shape)).astype(np.float16)
    np.save(part, drawn)
    before = {file: file.stat().st_mtime_ns for file in moved.iterdir()}
    config = changed(
        first.config,
        run={"name": "second"},
        teacher={"cache": {"views": VIEWS, "path": str(tmp_path)}},
        train={"epochs": 1, "accumulation_steps": 2, "num_workers": 1},
    )
    _, console = trained(config)
    assert f"in {moved}: all there\n" in console
    assert "computed" not in console
    assert {file: file.stat().st_mtime_ns for file in moved.iterdir()} == before
    means = torch.from_numpy(drawn).float().reshape(VIEWS, NUM_IMAGES, 16, -1).mean(3)
    assert_queue_is_of(newest(config), F.normalize(means[0], dim=1))


def losses(result: TrainResult) -> dict[int, float]:
    return {line["step"]: line[names.LOSS] for line in result.history if names.LOSS in line}


def test_a_run_is_the_uncached_one_to_rounding_until_views_come_again(
    prepared: Config, first: Run
) -> None:
    """Maps in float16 have relative errors of 2^-11 at most, and so have the first losses.

    Later ones drift apart as after any rounding, and from the third epoch on views are others.
    """
    plain = changed(prepared, run={"name": "plain"})
    without, _ = trained(plain)
    one, other = losses(without), losses(first.result)
    for step in (2, 4, 6, 8):
        assert other[step] == pytest.approx(one[step], rel=2e-3), step
    assert newest(plain).state["audit"] == newest(first.config).state["audit"]
    assert newest(plain).about["teacher"] == newest(first.config).about["teacher"]


def test_a_run_that_is_stopped_goes_on_and_makes_a_deleted_cache_again(prepared: Config) -> None:
    """Two teachers, one with a fitted head, which the cache and the run share."""
    second = {
        "weights": write_teacher(Path(prepared.run.root) / "second.safetensors", seed=1),
        "head": "pca",
        "kwargs": {"output_stride": 8},
        "fit": {"dim": 8, "images": 20},
        "cache": {"views": VIEWS},
    }
    config = changed(
        with_cache(prepared, "two", views=VIEWS, train={"num_workers": 1}),
        teacher_2=second,
        pairing={"kind": "same_view"},
    )
    plan = dry_run(config).summary()
    assert plan["teacher_2"]["teacher_cache"]["maps"] == VIEWS * NUM_IMAGES
    _, console = trained(changed(config, train={"epochs": 1}))
    assert "fitting the teacher_2's 8-wide pca head\n" in console
    both = caches(config)
    assert [cache.maps.shape[0] for cache in both] == [16, 8]
    head = Path(RunFolder.of(config).fitted_head("teacher_2"))
    fitted = head.read_bytes()
    assert fitted == Path(both[1].head_uri).read_bytes()
    own = fit_head(
        load_teachers(config)[1],
        open_shards(config.data.shards),
        config,
        device=torch.device("cpu"),
    )
    for name, value in safetensors.torch.load(fitted).items():  # another number of threads
        torch.testing.assert_close(own.head.state_dict()[name], value, rtol=1e-4, atol=1e-5)

    before = [stored_maps(cache) for cache in both]
    for cache in both:
        shutil.rmtree(cache.maps.uri)
    _, console = trained(changed(config, run={"allow_changes": True}))  # of more epochs
    assert "resumed at step 11" in console
    assert "fitting" not in console
    assert head.read_bytes() == fitted == Path(both[1].head_uri).read_bytes()
    assert all(torch.equal(stored_maps(c), b) for c, b in zip(both, before, strict=True))
    more = {"cache": {"views": VIEWS + 1}}
    other = changed(config, teacher=more, teacher_2=second | more)
    with pytest.raises(CheckpointError, match=r"teacher\.cache\.views: 2 -> 3"):
        dry_run(other)


def test_an_interrupted_build_keeps_its_parts_and_damage_is_refused(prepared: Config) -> None:
    """Parts of 16 maps: 88 maps are 6 files, of which two are missing and one is too short."""
    config = with_cache(prepared, "parts", views=VIEWS, pairing={"kind": "cross_view_index"})
    config = elsewhere(config, "parts")
    shards = open_shards(config.data.shards)
    (cache,) = caches(config, per_part=16)
    said: list[str] = []

    def build() -> int:
        return build_caches(config, shards, share=SHARE, say=said.append, per_part=16)

    assert build() == VIEWS * NUM_IMAGES
    whole = stored_maps(cache)
    folder = Path(cache.maps.uri)
    assert len(list(folder.glob("*.npy"))) == 6
    (folder / "manifest.json").unlink()
    (folder / "part-00001.npy").unlink()
    (folder / "part-00005.npy").unlink()  # 8 maps
    kept = (folder / "part-00002.npy").stat().st_mtime_ns
    assert cache.state() == "partial"
    said.clear()
    assert build() == 16 + 8
    assert said[0].endswith(": 64 there already")
    assert (folder / "part-00002.npy").stat().st_mtime_ns == kept
    assert torch.equal(stored_maps(cache), whole)
    assert (build(), cache.state()) == (0, "whole")

    short = folder / "part-00003.npy"
    short.write_bytes(short.read_bytes()[:-2])
    with pytest.raises(ShardError, match=r"part-00003\.npy: has .* delete the folder and give"):
        build()


def test_a_fitted_head_is_fitted_once_for_all_rules_of_the_adaptor(prepared: Config) -> None:
    fit = {"dim": 8, "hidden": 24, "images": 20, "views": 3, "steps": 20}
    teacher = {"head": "contrastive", "fit": fit}
    config = elsewhere(with_cache(prepared, "gate", views=1, teacher=teacher), "rules")
    shards = open_shards(config.data.shards)
    said: list[str] = []
    made = {}
    for rule in ("gate", "naive"):  # behind ReLU tangent is gate
        each = changed(config, run={"name": rule}, teacher={"adaptor": {"rule": rule}})
        assert build_caches(each, shards, share=SHARE, say=said.append) == NUM_IMAGES
        made[rule] = caches(each)[0]
    fitting = [line for line in said if line.startswith("fitting")]
    assert fitting == ["fitting the teacher's 8-wide contrastive head"]
    heads = {Path(cache.head_uri).read_bytes() for cache in made.values()}
    assert heads == {Path(made["gate"].shared_head_uri).read_bytes()}
    assert not torch.equal(*map(stored_maps, made.values()))


def test_maps_that_float16_cannot_hold_are_refused_by_image(
    prepared: Config, tmp_path: Path
) -> None:
    weights = Path(prepared.teacher.weights)
    tensors = safetensors.torch.load_file(weights)
    with safetensors.safe_open(weights, "pt") as file:
        about = file.metadata()
    last = "head.3.weight"
    tensors[last] = tensors[last] * 1e9
    large = tmp_path / "large.safetensors"
    safetensors.torch.save_file(tensors, large, metadata=about)
    teacher = {"weights": str(large)}
    config = with_cache(prepared, "large", views=VIEWS, teacher=teacher)
    shards = open_shards(config.data.shards)
    with pytest.raises(TrainingError, match=r"of image '\S+' cannot be .* teacher.cache.views=0"):
        build_caches(config, shards, share=SHARE, say=print)
