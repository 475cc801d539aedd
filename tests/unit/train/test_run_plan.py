"""A plan that is printed is a run that can begin."""

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from stored_shards import write_shards
from tiny import images, tiny_config

from pcd_ray.config import Config, TrainConfig
from pcd_ray.data.plan import rank_sizes
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build_head import fit_pca_head
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.errors import WeightsError
from pcd_ray.train.elastic import elastic_line, images_per_pass, passes_of
from pcd_ray.train.run_plan import RunPlan, plan_run, precision_note

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


def planned(
    folder: Path, train: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> RunPlan:
    """The plan of 12 steps of one image each."""
    config = tiny_config(
        run={"root": str(folder), "name": "new"},
        teacher={"weights": str(folder / "teacher.safetensors"), "licence": "MIT"},
        train={"global_batch_size": 1, "epochs": 4} | (train or {}),
        **sections,
    )
    return plan_run(config, open_shards(str(folder / "packed")), device="cpu")


@pytest.mark.parametrize(
    ("kind", "chance", "fill_steps", "implementation"),
    [
        ("pixel", math.log1p(12), 12, "chunked"),
        ("image", math.log1p(12), 12, "chunked"),
        ("mse", 2.0, 0, "plain"),
    ],
)
def test_a_plan_says_what_is_true_of_its_kind_of_loss(
    kind: str, chance: float, fill_steps: int, implementation: str, folder: Path
) -> None:
    loss = {"kind": kind, "queue_size": 12, "implementation": "chunked"}
    plan = planned(folder, loss=loss)
    assert plan.loss_kind == kind
    assert plan.chance_loss == pytest.approx(chance, abs=5e-4)  # three decimals
    assert (plan.queue_fill_steps, plan.loss_implementation) == (fill_steps, implementation)
    assert plan.embedding_width == CHANNELS
    assert plan.notes.keys() == (set() if kind == "mse" else {"loss.queue_size"})
    second = {"arch": "test_resnet", "head": "none", "weight": 0.5}
    second["weights"] = str(folder / "teacher.safetensors")
    second["licence"] = "MIT"
    two = planned(folder, loss=loss, teacher_2=second)
    assert two.chance_loss == pytest.approx(1.5 * chance, abs=5e-4)


def test_memory_is_planned_for_the_queue_where_there_is_one(folder: Path) -> None:
    pixel, image, mse = (
        planned(folder, loss={"kind": kind, "queue_size": 400_000}).memory_gib_per_worker
        for kind in ("pixel", "image", "mse")
    )
    assert pixel == image
    queue_gib = 400_000 * CHANNELS * 4 / 2**30
    assert pixel - mse == pytest.approx(queue_gib, abs=0.011)  # two decimals each


def test_memory_is_planned_for_the_pixels_that_the_loss_compares(folder: Path) -> None:
    teacher = {"kwargs": {"output_stride": 8}, "weights": str(folder / "teacher.safetensors")}
    batch, positions = 4_000, 64  # of the teacher at stride 8
    plans = [
        plan_run(
            tiny_config(
                run={"root": str(folder), "name": "new"},
                teacher=teacher,
                student={"grid": rule},
                optim={"warmup_epochs": 0},
                train={"global_batch_size": batch, "epochs": batch},
            ),
            open_shards(str(folder / "packed")),
            device="cpu",
        )
        for rule in ("pool", "upsample")
    ]
    pooled, enlarged = (plan.memory_gib_per_worker for plan in plans)
    more = 2 * 4 * batch * CHANNELS * (positions - POSITIONS) / 2**30  # both networks' pixels
    assert enlarged - pooled == pytest.approx(more, abs=0.011)  # two decimals each


def test_an_elastic_plan_says_both_ends_and_keeps_its_passes(folder: Path) -> None:
    batch = {"global_batch_size": 12, "epochs": 40, "accumulation_steps": 2}
    most, elastic = (planned(folder, batch | {"num_workers": n}) for n in (3, (1, 3)))
    assert (most.num_workers, most.batch_size_per_worker, most.images_per_pass) == (3, 4, 2)
    assert (elastic.num_workers, elastic.batch_size_per_worker) == ((1, 3), 12)
    assert elastic.images_per_pass == most.images_per_pass
    assert elastic.peak_learning_rate == most.peak_learning_rate
    assert elastic.summary()["num_workers"] == (1, 3)


@pytest.mark.parametrize(
    ("workers", "kept"),
    [
        (2, "2 of 2 to 4 workers: the global batch of 64 is kept as 32 images each in 2 passes; "),
        (3, "3 of 2 to 4 workers: the global batch of 64 is kept as 21 or 22 images each in 2 "),
        (4, "4 of 2 to 4 workers: the global batch of 64 is kept as 16 images each in 1 pass; "),
    ],
)
def test_an_elastic_run_says_how_its_batch_is_kept(workers: int, kept: str) -> None:
    train = TrainConfig(global_batch_size=64, num_workers=(2, 4))
    assert elastic_line(train, workers).startswith(kept)


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_a_pass_never_holds_more_images_than_with_the_most_workers(
    most: int, accumulation_steps: int
) -> None:
    batch = 24 * accumulation_steps
    train = TrainConfig(
        global_batch_size=batch, num_workers=(1, most), accumulation_steps=accumulation_steps
    )
    assert images_per_pass(train) * most * accumulation_steps == batch
    assert passes_of(train, most) == accumulation_steps
    for workers in range(1, most + 1):
        for size in rank_sizes(workers, batch):
            assert size >= passes_of(train, workers)  # no pass is empty
            assert -(-size // passes_of(train, workers)) <= images_per_pass(train)


def test_passes_of_one_image_stay_filled_where_the_batch_does_not_split() -> None:
    train = TrainConfig(global_batch_size=4, num_workers=(1, 4))
    assert [passes_of(train, workers) for workers in (1, 2, 3, 4)] == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("size", "epochs", "why"),
    [
        (1, 4, None),
        (2, 4, "of 2 is more than half of the 3 images and holds their own earlier vectors"),
        (12, 4, "of 12 is more than half of the 3 images"),
        (13, 4, "of 13 needs 13 steps to fill, the run has 12; the rest stays random"),
        (3, 1, None),  # no image is seen twice
        (4, 1, "of 4 needs 4 steps to fill, the run has 3"),
    ],
)
def test_a_queue_that_is_too_large_for_the_run_or_its_images_is_noted(
    size: int, epochs: int, why: str | None, folder: Path
) -> None:
    train = {"epochs": epochs}
    fitting = {"warmup_epochs": 0.5}
    plan = planned(folder, train, loss={"queue_size": size}, optim=fitting)
    image = planned(folder, train, loss={"queue_size": size, "kind": "image"}, optim=fitting)
    assert image.notes == plan.notes
    mse = planned(folder, train, loss={"queue_size": size, "kind": "mse"}, optim=fitting)
    assert mse.notes == {}
    if why is None:
        assert plan.notes == {}
        return
    note = plan.summary()["notes"]["loss.queue_size"]
    assert why in note
    assert note.endswith(": use at most 1")
    assert len(note) < 140  # a line of the printed plan holds 160, with larger numbers


def test_a_license_that_is_unknown_is_noted_for_each_teacher(folder: Path) -> None:
    weights = str(folder / "teacher.safetensors")
    second = {"arch": "test_resnet", "weights": weights, "head": "none"}
    plan = planned(folder, loss={"queue_size": 1}, teacher_2=second)
    (note,) = plan.notes.items()
    assert note[0] == "teacher_2.licence"
    assert note[1].startswith("the weights of teacher.safetensors do not state their license")
    assert note[1].endswith("give teacher_2.licence=...")


def test_bf16_is_noted_where_a_cpu_computes_it_in_software() -> None:
    (note,) = precision_note("bf16", "cpu", "AVX2").items()
    assert note[0] == "train.precision"
    assert note[1].endswith("use train.precision=fp32")
    for others in (("fp32", "cpu", "AVX2"), ("bf16", "cuda", "AVX2"), ("bf16", "cpu", "AVX512")):
        assert precision_note(*others) == {}
