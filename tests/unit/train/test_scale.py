"""The formulas of scale.py, by hand, against a real checkpoint, and in the README."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_shards import write_shards
from tiny import tiny_config

from pcd_ray.data.augment import views_of_bytes
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import build_method
from pcd_ray.distill.build_teacher import load_teachers
from pcd_ray.distill.weights import save_teacher
from pcd_ray.train.optim import build_optimizer
from pcd_ray.train.run_plan import plan_run
from pcd_ray.train.run_scale import measured_cpu_ms, workload_of
from pcd_ray.train.scale import (
    Machines,
    Scale,
    Workload,
    allreduce_bytes,
    checkpoint_bytes,
    gather_bytes,
    scale_of,
    sent_bytes_per_image,
    store_bytes_per_worker,
)
from pcd_ray.train.state import TrainState, moving_average

README = (Path(__file__).parents[3] / "README.md").read_text()

IMAGENET = Workload(
    images=1_281_167,
    images_per_epoch=1_281_167,
    epochs=100,
    image_bytes=110_000,
    index_bytes=111,
    image_size_px=224,
    views=2,
    map_bytes=0,
    images_per_task=128,
    blocks_ahead=2,
    global_batch_size=1024,
    num_workers=8,
    trained_weights=15_382_592,
    student_bytes=61_603_760,
    optimizer_copies=1,
    average=False,
    key_width=256,
    queue_bytes=65_536 * 256 * 4,
)
BILLION = replace(
    IMAGENET,
    images=10**9,
    images_per_epoch=10**9,
    epochs=1,
    global_batch_size=8192,
    blocks_ahead=1,
    num_workers=256,
)
MACHINES = Machines(
    cpu_ms_per_image=15.0,
    images_per_s_per_worker=500.0,
    network_gbit_per_s=40.0,
    workers_per_node=4,
    data_node_cores=32,
)


def test_what_travels_per_image_is_what_a_batch_holds() -> None:
    assert sent_bytes_per_image(IMAGENET) == 2 * 224 * 224 * 3 + 2 * 5 * 4 + 2 * 8
    stored = replace(IMAGENET, views=1, map_bytes=2 * 256 * 7 * 7)
    assert sent_bytes_per_image(stored) == 224 * 224 * 3 + 25_088 + 56


def test_collectives_cost_nothing_alone_and_at_most_the_whole() -> None:
    alone = replace(IMAGENET, num_workers=1)
    assert gather_bytes(alone) == allreduce_bytes(alone) == 0
    assert gather_bytes(IMAGENET) == 1024 * 256 * 4 * 7 / 8
    assert allreduce_bytes(IMAGENET) == 2 * 7 / 8 * 4 * IMAGENET.trained_weights


def test_a_checkpoint_is_the_sum_of_its_parts() -> None:
    adamw = replace(IMAGENET, optimizer_copies=2, average=True)
    more = IMAGENET.student_bytes + 4 * IMAGENET.trained_weights
    assert checkpoint_bytes(adamw) - checkpoint_bytes(IMAGENET) == more


def test_a_node_holds_the_blocks_of_its_workers_and_the_index() -> None:
    found = scale_of(IMAGENET, MACHINES)
    blocks = 3 * 128 * sent_bytes_per_image(IMAGENET)
    assert store_bytes_per_worker(IMAGENET) == blocks + 111 * 1_281_167
    assert found.object_store_gib_per_node == 4 * store_bytes_per_worker(IMAGENET) / 2**30


def test_rates_follow_from_the_workers() -> None:
    found = scale_of(IMAGENET, MACHINES)
    assert found.images_per_s == found.storage_reads_per_s == 4000
    assert found.epoch_hours == pytest.approx(1_281_167 / 4000 / 3600)
    assert found.run_hours == pytest.approx(100 * found.epoch_hours)
    assert found.data_cores_per_worker == pytest.approx(7.5)
    assert (found.data_cores, found.data_nodes) == (pytest.approx(60), 2)
    assert found.step_ms == pytest.approx(256)
    assert found.views_gbit_per_s_per_node == pytest.approx(8 * 301_112 * 4 * 500 / 1e9)
    fewer = scale_of(replace(IMAGENET, num_workers=2), MACHINES)
    assert fewer.views_gbit_per_s_per_node == pytest.approx(found.views_gbit_per_s_per_node / 2)


def test_a_ring_inside_one_node_needs_no_network() -> None:
    found = scale_of(IMAGENET, MACHINES)
    assert found.allreduce_ms_per_step == pytest.approx(1000 * allreduce_bytes(IMAGENET) / 5e9)
    inside = scale_of(replace(IMAGENET, num_workers=4), MACHINES)
    assert inside.allreduce_ms_per_step == inside.gather_ms_per_step == 0


def test_numbers_are_told_with_four_digits() -> None:
    summary = scale_of(IMAGENET, MACHINES).summary()
    assert summary["epoch_hours"] == 0.08897
    assert summary["sent_bytes_per_image"] == 301_112
    assert set(summary) == set(Scale.__dataclass_fields__)


def columns(heading: str) -> list[list[str]]:
    """Return the cells of the README's table whose first line holds a heading."""
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_readmes_table_says_what_the_formulas_do() -> None:
    runs = [scale_of(work, MACHINES).summary() for work in (IMAGENET, BILLION)]
    rows = columns("a billion images, 256 GPUs")
    assert len(rows) >= 12
    for name, *cells in rows:
        option = re.findall(r"`(\w+)`", name)[0]
        told = [float(cell.replace(",", "")) for cell in cells]
        assert told == [pytest.approx(run[option], rel=0.006) for run in runs], option


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    write_shards(folder)
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet")
    head = torch.nn.Sequential(torch.nn.Linear(backbone.body.num_features, 16))
    save_teacher(
        str(folder / "teacher.safetensors"), backbone, head, activation="relu", licence="MIT"
    )
    return folder


@pytest.mark.parametrize(("name", "ema"), [("adamw", 0.9), ("lars", 0.0)])
def test_a_checkpoint_is_as_large_as_foretold(root: Path, name: str, ema: float) -> None:
    config = tiny_config(
        teacher={"weights": str(root / "teacher.safetensors")},
        student={"backbone": "resnet10t", "ema": ema},
        loss={"queue_size": 4096},
        optim={"name": name},
        train={"global_batch_size": 2},
    )
    method = build_method(
        config, [(each, None) for each in load_teachers(config)], device=torch.device("cpu")
    )
    student = method.student
    optimizer = build_optimizer(name, student, weight_decay=0.1)
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    average = moving_average(student, decay=ema)
    state = TrainState(student, optimizer, method.branches, average=average).state_dict()
    written = io.BytesIO()
    torch.save(state, written)
    foretold = checkpoint_bytes(workload_of(config, open_shards(str(root / "packed")), method))
    assert len(written.getvalue()) == pytest.approx(foretold, rel=0.02)


def test_the_plan_says_it_for_the_users_own_images_and_machines(root: Path) -> None:
    config = tiny_config(
        run={"root": str(root)},
        data={"shards": str(root / "packed")},
        teacher={"weights": str(root / "teacher.safetensors")},
        train={"global_batch_size": 2, "num_workers": 2},
        scale={"images_per_s_per_worker": 50, "workers_per_node": 1, "cpu_ms_per_image": 4},
    )
    shards = open_shards(str(root / "packed"))
    scale = plan_run(config, shards, device="cpu").summary()["scale"]
    assert scale["assumed"]["cpu_ms_per_image"] == 4
    assert scale["images_per_s"] == 100
    assert scale["data_cores"] == pytest.approx(0.4)
    sizes = [path.stat().st_size for path in (root / "images").rglob("*.*")]
    assert scale["read_bytes_per_image"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-3)
    recipe = recipe_from(config.augment, config.pairing.kind)
    content = next((root / "images").rglob("*.png")).read_bytes()
    views = views_of_bytes(content, recipe, 0, max_pixels=10**6)
    sent = views.student.nbytes + views.student_box.nbytes + views.teacher_box.nbytes
    if recipe.two_colours:
        sent += views.teacher.nbytes
    assert scale["sent_bytes_per_image"] == sent + 2 * np.dtype(np.int64).itemsize
    assert measured_cpu_ms(config, [content] * 3) > 0
