"""What a cache of maps follows from, what it costs, and what training on it comes to."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_parts import host_batches, loop_settings, new_state, plan_of
from stored_shards import write_shards
from tiny import tiny_config
from torch import nn

from pcd_ray.config import Config
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import build_method
from pcd_ray.distill.build_head import save_fitted_head, stand_in_head
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.teacher import TeacherIdentity
from pcd_ray.distill.weights import save_teacher
from pcd_ray.errors import ShardError, TrainingError, WeightsError
from pcd_ray.train.loop import HostBatch, train_steps
from pcd_ray.train.run_plan import plan_run
from pcd_ray.train.state import TrainState
from pcd_ray.train.teacher_cache import TeacherCache, cache_of, in_float16

VIEWS = 4


def write_teacher(path: Path, *, seed: int, head_seed: int = 0, activation: str = "relu") -> str:
    torch.manual_seed(seed)
    backbone = build_backbone("test_resnet")
    torch.manual_seed(head_seed)
    kind = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
    head = nn.Sequential(nn.Linear(96, 20), nn.BatchNorm1d(20), kind(), nn.Linear(20, 12))
    save_teacher(str(path), backbone, head.eval(), activation=activation, licence="MIT")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packed images, and two teachers with an MLP head of 12."""
    root = tmp_path_factory.mktemp("cached")
    write_shards(root)
    for seed in (0, 1):
        write_teacher(root / f"teacher_{seed}.safetensors", seed=seed)
    return root


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    teacher = {"head": "auto", "weights": str(folder / "teacher_0.safetensors"), "arch": ""}
    teacher |= {"cache": {"views": VIEWS}} | sections.pop("teacher", {})
    run = {"root": str(folder / "runs")} | sections.pop("run", {})
    return tiny_config(run=run, teacher=teacher, **sections)


def cache_for(folder: Path, **sections: dict[str, Any]) -> TeacherCache:
    config = config_of(folder, **sections)
    shards = open_shards(str(folder / "packed"))
    cache = cache_of(config, load_teacher(config.teacher), shards)
    assert cache is not None
    return cache


FITTED = {"head": "pca", "fit": {"dim": 5, "images": 3}}
OTHER_MAPS: list[dict[str, dict[str, Any]]] = [
    {"teacher": {"head": "none"}},
    {"teacher": FITTED},
    {"teacher": {"adaptor": {"rule": "tangent"}}},
    {"teacher": {"adaptor": {"layers": 1}}},
    {"teacher": {"projection_dim": 4}},
    {"teacher": {"mean": (0.1, 0.2, 0.3)}},
    {"teacher": {"kwargs": {"output_stride": 16}}},
    {"teacher": {"cache": {"views": VIEWS + 1}}},
    {"train": {"precision": "bf16"}},
    {"augment": {"min_scale": 0.3}},
    {"augment": {"teacher_blur_prob": 0.9}},
    {"augment": {"photometric": "independent"}},
    {"augment": {"swap_colors": False}},
    {"augment": {"image_size_px": 96}},
    {"pairing": {"kind": "cross_view_index"}},
    {"run": {"seed": 1}},
]
SAME_MAPS: list[dict[str, dict[str, Any]]] = [
    {"run": {"name": "other"}},
    {"data": {"images_per_task": 3, "prefetch_batches": 1}},
    {"student": {"backbone": "resnet10t", "mhsa": {"depth": 0}}},
    {"pairing": {"radius": 0.3}},
    {"loss": {"temperature": 0.7, "queue_size": 7, "kind": "mse"}},
    {"optim": {"base_lr": 1.0, "name": "adamw"}},
    {"train": {"epochs": 9, "global_batch_size": 16, "num_workers": 2, "accumulation_steps": 2}},
    {"eval": {"images_per_forward": 3}},
    {"teacher": {"weight": 3.0, "licence": "MIT", "fit": {"dim": 7}}},  # the head is published
    {"teacher": {"cache": {"views": VIEWS, "path": "elsewhere"}}},
]


@pytest.mark.parametrize("sections", OTHER_MAPS, ids=str)
def test_all_that_maps_follow_from_is_part_of_the_key(
    sections: dict[str, dict[str, Any]], folder: Path
) -> None:
    assert cache_for(folder, **sections).maps.key != cache_for(folder).maps.key


@pytest.mark.parametrize("sections", SAME_MAPS, ids=str)
def test_nothing_else_is_part_of_the_key(sections: dict[str, dict[str, Any]], folder: Path) -> None:
    assert cache_for(folder, **sections).maps.key == cache_for(folder).maps.key


def test_other_weights_heads_fits_or_images_have_other_maps(folder: Path, tmp_path: Path) -> None:
    key = cache_for(folder).maps.key
    other = str(folder / "teacher_1.safetensors")
    assert cache_for(folder, teacher={"weights": other}).maps.key != key
    head = write_teacher(tmp_path / "head.safetensors", seed=0, head_seed=1)
    assert cache_for(folder, teacher={"weights": head}).maps.key != key
    activation = write_teacher(tmp_path / "gelu.safetensors", seed=0, activation="gelu")
    assert cache_for(folder, teacher={"weights": activation}).maps.key != key
    moved = write_teacher(tmp_path / "moved.safetensors", seed=0)
    assert cache_for(folder, teacher={"weights": moved}).maps.key == key
    fitted = cache_for(folder, teacher=FITTED)
    wider = cache_for(folder, teacher={"head": "pca", "fit": {"dim": 6, "images": 3}})
    assert fitted.maps.key != wider.maps.key
    assert (fitted.maps.shape[0], wider.maps.shape[0]) == (5, 6)
    config = config_of(folder)
    shards = replace(open_shards(str(folder / "packed")), content_hash="others")
    cache = cache_of(config, load_teacher(config.teacher), shards)
    assert cache is not None
    assert cache.maps.key != key


def test_runs_share_a_folder_in_the_root_of_runs_or_where_the_path_says(folder: Path) -> None:
    maps = cache_for(folder).maps
    assert maps.uri == f"{folder}/runs/teacher_cache/maps-{maps.key[:16]}"
    given = {"cache": {"views": VIEWS, "path": f"{folder}/shared"}}
    assert cache_for(folder, teacher=given).maps.uri == f"{folder}/shared/maps-{maps.key[:16]}"
    config = config_of(folder, teacher={"cache": {}})
    shards = open_shards(str(folder / "packed"))
    assert cache_of(config, load_teacher(config.teacher), shards) is None


def test_the_plan_says_maps_bytes_place_and_state(folder: Path, tmp_path: Path) -> None:
    """3 images x 4 views of 12 x 2 x 2 numbers of 2 bytes, and 128 bytes of numpy's header."""
    config = config_of(folder, run={"root": str(tmp_path)}, train={"global_batch_size": 1})
    shards = open_shards(str(folder / "packed"))
    maps = cache_for(folder, run={"root": str(tmp_path)}).maps
    about = {"maps": 12, "bytes": 128 + 12 * 96, "uri": maps.uri}
    plan = plan_run(config, shards, device="cpu")
    assert plan.summary()["teacher_cache"] == {**about, "state": "missing"}
    maps.write_part(0, np.zeros((12, *maps.shape), np.float16))
    assert plan_run(config, shards, device="cpu").teacher_cache == {**about, "state": "partial"}
    maps.write_manifest(made_of={}, teacher={"sha256": ""})
    assert plan_run(config, shards, device="cpu").teacher_cache == {**about, "state": "whole"}
    without = replace(config, teacher=replace(config.teacher, cache=type(config.teacher.cache)()))
    assert "teacher_cache" not in plan_run(without, shards, device="cpu").summary()


@pytest.mark.parametrize(("size_px", "count"), [(64, 256), (296, 255), (1024, 21)])
def test_the_views_of_a_part_are_a_block_that_is_not_cut_up(
    size_px: int, count: int, folder: Path
) -> None:
    per_part = cache_for(folder, augment={"image_size_px": size_px}).maps.records_per_part
    assert (per_part, per_part * 3 * size_px**2 <= 2**26) == (count, True)


@pytest.mark.parametrize(
    ("shape", "megabytes"),
    [((256, 4, 4), "149 MB"), ((16, 2, 2), "2.3 MB"), ((2048, 14, 14), "15 GB")],
)
def test_the_cost_is_said_in_words(shape: tuple[int, int, int], megabytes: str) -> None:
    maps = StoredMaps(uri="s3://b/maps-1", key="1", shape=shape, num_images=3041, views=6)
    size = " x ".join(map(str, shape))
    assert TeacherCache("teacher", maps, {}).line() == (
        f"teacher cache: 18,246 maps of {size} in float16, {megabytes}, in s3://b/maps-1"
    )


def test_maps_of_another_teacher_or_unfinished_ones_are_not_trained_on(
    folder: Path, tmp_path: Path
) -> None:
    cache = cache_for(folder, run={"root": str(tmp_path)})
    own = TeacherIdentity(arch="a", source="s", licence="l", head="published", sha256="own")
    with pytest.raises(ShardError, match="not whole; give the same command again"):
        cache.check_teacher(own)
    cache.maps.write_part(0, np.zeros((12, *cache.maps.shape), np.float16))
    cache.maps.write_manifest(made_of=cache.made_of, teacher={"sha256": "own"})
    cache.check_teacher(own)
    with pytest.raises(WeightsError, match="of another fitted head than this run's; give another"):
        cache.check_teacher(replace(own, sha256="other"))


def test_maps_whose_fitted_head_is_gone_are_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, run={"root": str(tmp_path)}, teacher=FITTED)
    loaded = load_teacher(config.teacher)
    cache = cache_of(config, loaded, open_shards(str(folder / "packed")))
    assert cache is not None
    assert cache.fitted_head(config, loaded) is None  # still to be fitted
    head = stand_in_head(loaded, config.teacher.fit)
    assert head is not None
    save_fitted_head(cache.head_uri, head, config, loaded)
    cache.maps.write_part(0, np.zeros((12, *cache.maps.shape), np.float16))
    assert cache.fitted_head(config, loaded) is not None
    Path(cache.head_uri).unlink()
    with pytest.raises(ShardError, match=r"head\.safetensors is missing .*; delete the folder and"):
        cache.fitted_head(config, loaded)


def test_a_teacher_whose_maps_are_stored_stays_off_the_device(folder: Path) -> None:
    """The device is ``meta``, where nothing can be computed."""
    config = config_of(folder, loss={"kind": "mse"})
    loaded = load_teacher(config.teacher)
    method = build_method(config, [(loaded, None)], device=torch.device("meta"))
    assert {p.device.type for p in method.branches[0].teacher.parameters()} == {"cpu"}
    assert {p.device.type for p in method.student.parameters()} == {"meta"}


def test_float16_keeps_maps_to_its_rounding_and_refuses_what_it_cannot_hold() -> None:
    maps = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    keys = [f"image {number}" for number in range(5)]
    stored = torch.from_numpy(in_float16(maps, keys)).float()
    torch.testing.assert_close(stored, maps, rtol=2**-11, atol=2**-25)  # half of the last bit
    maps[4] = 0
    assert not in_float16(maps, keys)[4].any()  # a map of zeros is what it is
    for value in (7e4, -7e4, float("inf"), float("nan")):
        wrong = maps.clone()
        wrong[2, 3, 1, 1] = value
        with pytest.raises(
            TrainingError, match=r"map of image 'image 2' .*teacher\.cache\.views=0"
        ):
            in_float16(wrong, keys)
    with pytest.raises(TrainingError, match=r"image 'image 1' cannot be stored in float16"):
        in_float16(torch.cat([maps[:1], maps[1:2] * 1e-7]), keys)  # below what it resolves


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_teachers() -> TrainState:
    return new_state(widths=(6, 5), weights=(0.5, 2.0))


STEPS = 5  # of 8 images in epochs of 20: two epochs


def stored_maps_of(state: TrainState, folder: Path) -> list[StoredMaps]:
    """Store the maps of both teachers for all that two epochs show."""
    settings = loop_settings(steps=STEPS)
    stored = []
    for branch, width in zip(state.branches, (6, 5), strict=True):
        maps = StoredMaps(
            uri=str(folder / str(width)),
            key="",
            shape=(width, 2, 2),
            num_images=20,
            views=2,
            records_per_part=40,
        )
        whole = np.zeros((40, *maps.shape), np.float16)
        for host in host_batches(settings, 0, STEPS):
            found = branch.teacher(torch.from_numpy(host["student_view"]))
            whole[host["epoch"] * 20 + host["row"]] = found.half().numpy()
        maps.write_part(0, whole)
        stored.append(maps)
    return stored


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_on_stored_maps_is_training_with_the_teacher_to_rounding(
    accumulation: int, tmp_path: Path
) -> None:
    """Float16 rounds by 2^-12 relative at most; five steps of rate 0.5 or less keep it near that.

    The teachers are not run: their forward raises.
    """
    settings = loop_settings(steps=STEPS, accumulation_steps=accumulation)
    with_teacher, on_maps = two_teachers(), two_teachers()
    maps = stored_maps_of(with_teacher, tmp_path)

    def batches() -> Iterator[HostBatch]:
        for host in host_batches(settings, 0, STEPS):
            read = [each.read(host["epoch"], host["row"]).copy() for each in maps]
            yield {**host, "teacher_map": read[0], "teacher_2_map": read[1]}

    def never(*_: object) -> None:
        raise AssertionError("a teacher was run")

    for branch in on_maps.branches:
        branch.teacher.register_forward_pre_hook(never)
    expected = list(train_steps(with_teacher, host_batches(settings, 0, STEPS), settings))
    found = list(train_steps(on_maps, batches(), settings))
    assert plan_of(settings).images_per_epoch == 20
    for one, other in zip(expected, found, strict=True):
        assert one.metrics is not None
        assert other.metrics is not None
        assert other.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-3)
    start = two_teachers().state_dict()["student"]
    end, also = with_teacher.state_dict()["student"], on_maps.state_dict()["student"]
    moved = sum(float((end[k] - start[k]).double().norm() ** 2) for k in end) ** 0.5
    apart = sum(float((end[k] - also[k]).double().norm() ** 2) for k in end) ** 0.5
    assert 0 < apart < 0.01 * moved
