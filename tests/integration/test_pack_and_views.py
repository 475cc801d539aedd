"""Real Ray: packing is repeatable and resumable, views follow the plan for any number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from pcd_ray.config import AugmentConfig, DataConfig, SourceConfig
from pcd_ray.data import ray_stream
from pcd_ray.data.augment import ViewRecipe, eval_view, make_views
from pcd_ray.data.plan import EpochPlan, RankPlan, SeenAudit
from pcd_ray.data.ray_pack import PackResult, pack
from pcd_ray.data.ray_stream import Batch
from pcd_ray.data.ray_views import chunks_ahead, eval_batches, view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import Shards, open_shards, verify_shards
from pcd_ray.driver_lock import DriverLock, FolderMarks, Process
from pcd_ray.errors import InUseError, ShardError
from pcd_ray.ray_cluster import free_reservation
from pcd_ray.seeds import derive_seed
from pcd_ray.storage import StorageError

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_IMAGES = 50
EVENT_S = 60.0
MAX_PIXELS = 10**6


def _images(folder: Path, *, bad: int = 0) -> str:
    """Write noisy pictures in two classes, about 1.2 MB in all, the first ``bad`` unreadable."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / ("left", "right")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < bad:
            path.write_bytes(b"no picture")
        else:
            pixels = rng.integers(0, 256, (90 + number, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return str(folder)


def _pack(source: str, folder: Path, *, seed: int = 0, **settings: float) -> PackResult:
    data = DataConfig(
        sources=(SourceConfig(uri=source),), shards=str(folder), shard_mib=1, **settings
    )
    return pack(data, seed=seed)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shards(source: str, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Shards:
    del ray_session
    folder = tmp_path_factory.mktemp("shards")
    _pack(source, folder)
    return verify_shards(str(folder))


def test_packing_keeps_every_image(shards: Shards) -> None:
    assert shards.num_images == NUM_IMAGES
    assert len(shards.files) > 1
    assert shards.classes == ("left", "right")
    summary = json.loads((Path(shards.uri) / "summary.json").read_text())
    assert summary["num_images"] == NUM_IMAGES
    assert summary["num_shards"] == len(shards.files)


def test_packing_is_bit_identical_whatever_the_parallelism(
    source: str, shards: Shards, tmp_path: Path
) -> None:
    _pack(source, tmp_path, cpus_per_task=2.0)  # one task at a time instead of two
    assert _files(tmp_path) == _files(Path(shards.uri))
    assert open_shards(str(tmp_path)).content_hash == shards.content_hash


def test_packing_again_makes_what_is_missing_and_nothing_else(source: str, tmp_path: Path) -> None:
    first = _pack(source, tmp_path)
    before = _files(tmp_path)
    (tmp_path / "shard-00001.parquet").unlink()
    (tmp_path / "manifest.json").unlink()
    kept = (tmp_path / "shard-00000.parquet").stat().st_mtime_ns
    again = _pack(source, tmp_path)
    assert again.reused_shards == first.num_shards - 1
    assert _files(tmp_path) == before
    assert (tmp_path / "shard-00000.parquet").stat().st_mtime_ns == kept
    verify_shards(str(tmp_path))


def test_other_images_or_another_seed_never_overwrite(source: str, tmp_path: Path) -> None:
    _pack(source, tmp_path)
    before = _files(tmp_path)
    with pytest.raises(ShardError, match="choose another folder, or delete this one"):
        _pack(source, tmp_path, seed=1)
    assert _files(tmp_path) == before


def test_unreadable_images_are_counted_and_listed(tmp_path: Path) -> None:
    source = _images(tmp_path / "images", bad=3)
    right = tmp_path / "images" / "right"
    os.rename(os.fsencode(right / "003.png"), os.fsencode(right) + b"/caf\xe9.png")
    (right / "003.heic").write_bytes(b"not read")
    result = _pack(source, tmp_path / "shards", max_bad_fraction=0.06)
    assert (result.num_images, result.num_bad) == (NUM_IMAGES - 3, 3)
    assert result.notes == f"{source}: not read: 1 .heic file"
    lines = (tmp_path / "shards" / "bad_images.csv").read_text().splitlines()
    assert lines[0] == "key,uri,reason"
    assert sorted(line.split(",")[0] for line in lines[1:]) == [
        "left/000.png",
        "left/002.png",
        "right/001.png",
    ]
    assert all(line.endswith(",not an image") for line in lines[1:])
    packed = open_shards(str(tmp_path / "shards"))
    assert packed.num_bad == 3
    keys = packed.index.column("key").to_pylist()
    assert "left/000.png" not in keys
    assert "right/caf\\xe9.png" in keys


def test_too_many_unreadable_images_stop_it_and_finished_parts_stay(tmp_path: Path) -> None:
    source = _images(tmp_path / "images", bad=3)
    with pytest.raises(ShardError, match=r"of 50 images are unreadable.*not an image.*csv"):
        _pack(source, tmp_path / "shards", max_bad_fraction=0.0)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    assert (tmp_path / "shards" / "bad_images.csv").exists()
    assert _pack(source, tmp_path / "shards", max_bad_fraction=0.1).reused_shards > 0


def _recipe(**settings: object) -> ViewRecipe:
    kind = str(settings.pop("pairing", "cross_view_index"))
    return recipe_from(AugmentConfig(image_size_px=24, **settings), kind)


def _steps(
    shards: Shards,
    *,
    steps: tuple[int, int],
    rank: int = 0,
    num_ranks: int = 1,
    images_per_task: int = 7,
    prefetch_batches: int = 2,
    recipe: ViewRecipe | None = None,
) -> list[Batch]:
    """Return a rank's batches of 12 images per step."""
    batches = view_batches(
        shards.index,
        RankPlan(
            plan=EpochPlan(shards.plan_sources, seed=3),
            global_batch_size=12,
            start_step=steps[0],
            stop_step=steps[1],
            rank=rank,
            num_ranks=num_ranks,
        ),
        recipe or _recipe(),
        seed=3,
        data=DataConfig(images_per_task=images_per_task, prefetch_batches=prefetch_batches),
    )
    return list(batches)


def _equal(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def nine_steps(shards: Shards) -> list[Batch]:
    """Return 108 images: two epochs of 50 and the start of a third."""
    return _steps(shards, steps=(0, 9))


def test_batches_are_full_and_follow_the_plan(shards: Shards, nine_steps: list[Batch]) -> None:
    plan = EpochPlan(shards.plan_sources, seed=3)
    epochs, rows = plan.rows(0, 108)
    assert np.array_equal(np.concatenate([batch["row"] for batch in nine_steps]), rows)
    assert np.array_equal(np.concatenate([batch["epoch"] for batch in nine_steps]), epochs)
    shapes = {key: (values.shape, str(values.dtype)) for key, values in nine_steps[0].items()}
    assert shapes == {
        "student_view": ((12, 24, 24, 3), "uint8"),
        "teacher_view": ((12, 24, 24, 3), "uint8"),
        "student_box": ((12, 5), "float32"),
        "teacher_box": ((12, 5), "float32"),
        "row": ((12,), "int64"),
        "epoch": ((12,), "int64"),
    }


def test_the_audit_of_what_arrived_finds_two_whole_epochs(
    shards: Shards, nine_steps: list[Batch]
) -> None:
    plan, audit = EpochPlan(shards.plan_sources, seed=3), SeenAudit()
    for batch in nine_steps:
        audit.add(batch["epoch"], batch["row"])
    assert audit.verdict(plan, 0) is None
    assert audit.verdict(plan, 1) is None
    assert audit.verdict(plan, 2) == "epoch 2: 8 images were read, the plan has 50"


def test_a_view_is_made_of_its_image_epoch_and_seed_alone(
    shards: Shards, source: str, nine_steps: list[Batch]
) -> None:
    for batch in (nine_steps[0], nine_steps[8]):
        key = shards.index.column("key")[int(batch["row"][5])].as_py()
        own_seed = derive_seed(3, "augment", int(batch["epoch"][5]), key)
        with Image.open(Path(source) / key) as image:
            views = make_views(image.convert("RGB"), _recipe(), own_seed)
        assert np.array_equal(batch["student_view"][5], views.student)
        assert np.array_equal(batch["teacher_view"][5], views.teacher)
        assert np.array_equal(batch["student_box"][5], views.student_box)
        assert np.array_equal(batch["teacher_box"][5], views.teacher_box)


def test_two_ranks_together_read_what_one_reads(shards: Shards, nine_steps: list[Batch]) -> None:
    ranks = [_steps(shards, steps=(0, 9), rank=rank, num_ranks=2) for rank in range(2)]
    joined = [
        {key: np.concatenate([one[key], two[key]]) for key in one}
        for one, two in zip(*ranks, strict=True)
    ]
    assert _equal(joined, nine_steps)


def test_starting_at_a_step_is_going_on_from_it(shards: Shards, nine_steps: list[Batch]) -> None:
    assert _equal(_steps(shards, steps=(5, 9)), nine_steps[5:])


@pytest.mark.parametrize("images_per_task", [1, 12, 200])
def test_the_size_of_tasks_does_not_matter(
    shards: Shards, nine_steps: list[Batch], images_per_task: int
) -> None:
    batches = _steps(shards, steps=(0, 2), images_per_task=images_per_task)
    assert _equal(batches, nine_steps[:2])


@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_what_is_kept_ready_does_not_matter(
    shards: Shards, nine_steps: list[Batch], prefetch_batches: int
) -> None:
    batches = _steps(shards, steps=(0, 2), prefetch_batches=prefetch_batches)
    assert _equal(batches, nine_steps[:2])


@pytest.mark.parametrize(
    ("batches", "batch_size", "images_per_task", "blocks"),
    [(2, 512, 128, 8), (2, 32, 128, 1), (3, 50, 128, 2), (1, 128, 128, 1), (0, 512, 128, 0)],
)
def test_blocks_kept_ready_hold_the_batches_asked_for_and_no_more(
    batches: int, batch_size: int, images_per_task: int, blocks: int
) -> None:
    data = DataConfig(prefetch_batches=batches, images_per_task=images_per_task)
    assert chunks_ahead(data, batch_size) == blocks


def test_a_long_run_of_several_executions_is_one_stream(
    shards: Shards, nine_steps: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_stream, "SEGMENT_CHUNKS", 5)  # 16 chunks of 7 images: 5, 5, 5, 1
    monkeypatch.setattr(ray_stream, "OVERLAP_CHUNKS", 2)
    assert _equal(_steps(shards, steps=(0, 9)), nine_steps)


def test_another_epoch_has_other_views_of_the_same_images(nine_steps: list[Batch]) -> None:
    rows = np.concatenate([batch["row"] for batch in nine_steps])
    views = np.concatenate([batch["student_view"] for batch in nine_steps])
    first, second = (
        {int(r): v for r, v in zip(rows[s], views[s], strict=True)}
        for s in (slice(0, 50), slice(50, 100))
    )
    assert first.keys() == second.keys()
    assert not any(np.array_equal(first[row], second[row]) for row in first)


def test_one_view_for_both_networks_travels_once(shards: Shards) -> None:
    batch = _steps(shards, steps=(0, 1), recipe=_recipe(pairing="same_view"))[0]
    assert "teacher_view" not in batch
    assert np.array_equal(batch["student_box"], batch["teacher_box"])


def test_stopping_early_frees_the_cluster(shards: Shards, nine_steps: list[Batch]) -> None:
    plan = EpochPlan(shards.plan_sources, seed=3)
    batches = view_batches(
        shards.index,
        RankPlan(plan=plan, global_batch_size=12, stop_step=1_000_000),
        _recipe(),
        seed=3,
        data=DataConfig(images_per_task=8),
    )
    first = next(batches)
    batches.close()
    assert _equal([first], nine_steps[:1])
    assert len(_steps(shards, steps=(0, 2))) == 2  # would hang if the CPUs were still taken


def _elsewhere(index: pa.Table, uri: str) -> pa.Table:
    """Return the index with all its images said to lie in one other file."""
    position = index.schema.get_field_index("uri")
    return index.set_column(position, index.schema.field(position), [[uri] * index.num_rows])


def test_an_image_damaged_after_packing_is_named(shards: Shards, tmp_path: Path) -> None:
    entry = shards.index.slice(0, 1).to_pylist()[0]
    copy = tmp_path / Path(entry["uri"]).name
    content = bytearray(Path(entry["uri"]).read_bytes())
    content[entry["offset"] : entry["offset"] + 40] = bytes(40)
    copy.write_bytes(bytes(content))
    index = _elsewhere(shards.index, str(copy))
    with pytest.raises(ShardError, match=f"image '{entry['key']}' in .*{copy.name}: not an image"):
        list(eval_batches(index, [0], size_px=8, batch_size=1, data=DataConfig()))


def test_storage_that_fails_is_told_from_images_that_are_damaged(
    shards: Shards, tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # the file is there, and reading it fails
    with pytest.raises(StorageError, match=r"loop cannot be read: .*symbolic links"):
        list(
            eval_batches(
                _elsewhere(shards.index, str(loop)), [0], size_px=8, batch_size=1, data=DataConfig()
            )
        )


def test_evaluation_reads_the_rows_asked_for_in_order(shards: Shards, source: str) -> None:
    rows = [7, 3, 3, 49, 0]
    batches = list(
        eval_batches(
            shards.index, rows, size_px=16, batch_size=2, data=DataConfig(images_per_task=3)
        )
    )
    assert [len(got) for _, got in batches] == [2, 2, 1]
    assert np.concatenate([got for _, got in batches]).tolist() == rows
    views = np.concatenate([view for view, _ in batches])
    keys = shards.index.column("key").to_pylist()
    for view, row in zip(views, rows, strict=True):
        with Image.open(Path(source) / keys[row]) as image:
            assert np.array_equal(view, eval_view(image.convert("RGB"), 16))


def test_what_an_ended_run_reserved_is_given_back_by_its_id() -> None:
    class Owner:
        """An actor by whose name its reservation is known."""

        def here(self) -> bool:
            return True

    owner = ray.remote(num_cpus=0)(Owner).options(name="owner").remote()
    assert ray.get(owner.here.remote())
    reserved = ray.util.placement_group([{"CPU": 1}])
    assert reserved.wait(EVENT_S)
    assert not free_reservation(f"{reserved.id.hex()} owner"), "its owner would reserve anew"
    assert free_reservation(f"{reserved.id.hex()} nobody")
    all_cpus = ray.util.placement_group([{"CPU": 2}])
    assert all_cpus.wait(EVENT_S), "the CPU is still reserved"
    ray.util.remove_placement_group(all_cpus)
    ray.kill(owner)


def test_a_second_driver_does_not_pack_into_the_folder_of_the_first(
    source: str, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        marks = FolderMarks(str(tmp_path / "shards"), "data.shards")
        DriverLock(marks, Process.of(other.pid)).take(print)
        with pytest.raises(InUseError, match=f"process {other.pid} on .* another data.shards"):
            _pack(source, tmp_path / "shards")
        other.kill()
    _pack(source, tmp_path / "shards")
    assert not [*(tmp_path / "shards").glob("driver-*")]
