import hashlib
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn

from pcd_ray import storage
from pcd_ray.checkpoint import (
    RunFolder,
    best_steps,
    check_same_run,
    checkpoint_from_rank_zero,
    checkpoint_name,
    checkpoint_steps,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    to_host,
)
from pcd_ray.config import Config, config_from_values
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.errors import CheckpointError
from pcd_ray.metric_names import KNN_TOP1, SEGMENTATION_MIOU

CONFIG = config_from_values({"run": {"name": "kept", "seed": 7}, "loss": {"temperature": 0.1}})


def state(step: int = 3) -> dict[str, Any]:
    """A student, an optimiser that has stepped, a queue: what a run stores."""
    torch.manual_seed(step)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    student(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    queue = FeatureQueue(6, 4, seed=step, device=torch.device("cpu"))
    return {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "queues": [queue.state_dict()],
        "step": step,
        "audit": [],
    }


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def assert_same(left: Any, right: Any) -> None:
    one, other = flat(left), flat(right)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def save(folder: RunFolder, step: int, **about: Any) -> Path:
    uri = folder.file("checkpoints", checkpoint_name(step))
    content = {"step": step, "teacher": {"licence": "MIT"}, **about}
    save_checkpoint(uri, state(step), content, CONFIG)
    return Path(uri)


def state_file(uri: Path) -> Path:
    (found,) = uri.glob("state-*.pt")
    return found


def file_of(uri: Path, name: str) -> Path:
    return state_file(uri) if name == "state" else uri / name


def step_of(folder: RunFolder) -> int | None:
    found = latest_checkpoint(folder)
    return None if found is None else int(found.about["step"])


def test_a_checkpoint_comes_back_bit_for_bit(folder: RunFolder) -> None:
    uri = save(folder, 3)
    loaded = load_checkpoint(str(uri))
    assert_same(loaded.state, state(3))
    assert loaded.config == CONFIG
    assert loaded.about["teacher"] == {"licence": "MIT"}
    assert loaded.about["state_sha256"] == hashlib.sha256(state_file(uri).read_bytes()).hexdigest()
    names = ["checkpoint.json", f"state-{loaded.about['state_sha256'][:8]}.pt"]
    assert sorted(path.name for path in uri.iterdir()) == names


def test_steps_are_listed_as_numbers_and_the_newest_is_found(folder: RunFolder) -> None:
    assert checkpoint_steps(folder) == []
    assert latest_checkpoint(folder) is None
    for step in (20, 100_000_000, 3):  # one more digit than names are filled to
        save(folder, step)
    for other in ("notes", "step_final", "step_00000020_copy"):
        (Path(folder.checkpoints) / other).mkdir()
        (Path(folder.checkpoints) / other / "checkpoint.json").write_text("{}")
    assert checkpoint_steps(folder) == [3, 20, 100_000_000]
    assert step_of(folder) == 100_000_000


def test_a_runs_folder_may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "better?"))
    save(folder, 4)
    assert checkpoint_steps(folder) == [4]


def test_the_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        save(folder, step)
    prune_checkpoints(folder, written=4, keep_last=2)
    assert checkpoint_steps(folder) == [3, 4]


def save_scored(folder: RunFolder, step: int, score: float | None, *, scored: bool = True) -> None:
    """Write a checkpoint that carries a kNN score, of its own or of an earlier epoch."""
    save(folder, step, metrics={} if score is None else {KNN_TOP1: score}, scored=scored)


def test_the_best_stay_besides_the_newest_by_what_lies_in_the_folder(folder: RunFolder) -> None:
    """Each prune sees the folder alone, as after a resume."""
    measured = {1: 30.0, 2: 50.0, 3: 40.0, 4: None, 5: 50.0, 6: 20.0, 7: 10.0}
    for step, score in measured.items():
        save_scored(folder, step, score)
        prune_checkpoints(folder, written=step, keep_last=2, keep_best=(2, KNN_TOP1))
        assert latest_checkpoint(folder) is not None
    assert checkpoint_steps(folder) == [2, 5, 6, 7]
    assert best_steps(folder, KNN_TOP1) == [2, 5, 6, 7]
    assert find_checkpoint(storage.join(folder.uri, "best")).about["step"] == 2
    prune_checkpoints(folder, written=7, keep_last=2, keep_best=(1, KNN_TOP1))
    assert checkpoint_steps(folder) == [2, 6, 7]


def test_a_score_that_was_measured_earlier_makes_no_checkpoint_the_best(
    folder: RunFolder,
) -> None:
    save_scored(folder, 10, 50.0)
    for step in (12, 14, 16):
        save_scored(folder, step, 50.0, scored=False)
        prune_checkpoints(folder, written=step, keep_last=1, keep_best=(2, KNN_TOP1))
    assert checkpoint_steps(folder) == [10, 16]


def test_a_score_that_was_measured_earlier_counts_for_nothing_beside_one_that_is_new(
    folder: RunFolder,
) -> None:
    """kNN after each epoch, the probe after every tenth: its newest value stands in all."""
    for epoch in range(10, 23):
        new = [KNN_TOP1, SEGMENTATION_MIOU] if epoch % 10 == 0 else [KNN_TOP1]
        metrics = {KNN_TOP1: 1.0 * epoch, SEGMENTATION_MIOU: 40.0 if epoch < 20 else 41.0}
        save(folder, epoch, metrics=metrics, scored=new)
        prune_checkpoints(folder, written=epoch, keep_last=1, keep_best=(2, SEGMENTATION_MIOU))
    assert checkpoint_steps(folder) == [10, 20, 22]
    assert best_steps(folder, SEGMENTATION_MIOU) == [20, 10]
    assert best_steps(folder, KNN_TOP1) == [22, 20, 10]


def test_the_best_is_asked_for_by_name_and_refused_where_nothing_was_scored(
    folder: RunFolder,
) -> None:
    save(folder, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint with a score.*leave out /best"):
        find_checkpoint(storage.join(folder.uri, "best"))
    save_scored(folder, 4, 10.0)
    save_scored(folder, 5, 20.0)
    newest = Path(folder.checkpoints) / checkpoint_name(5)
    state_file(newest).write_bytes(b"cut off")
    assert find_checkpoint(storage.join(folder.uri, "best")).about["step"] == 4


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_never_take_the_place_of_good_ones(
    folder: RunFolder, keep: int
) -> None:
    for step in (50, 100, 200, 300):
        save(folder, step)
    for step in (200, 300):
        state_file(Path(folder.checkpoints) / checkpoint_name(step)).write_bytes(b"cut off")
    resumed = latest_checkpoint(folder)
    assert resumed is not None
    assert resumed.about["step"] == 100
    save(folder, 150)
    prune_checkpoints(folder, written=150, keep_last=keep, damaged=resumed.passed_over)
    assert checkpoint_steps(folder) == [100, 150][-keep:]
    assert step_of(folder) == 150


def test_a_damaged_checkpoint_that_is_written_anew_is_kept(folder: RunFolder) -> None:
    save(folder, 100)
    newest = save(folder, 200)
    state_file(newest).write_bytes(b"cut off")
    resumed = latest_checkpoint(folder)
    assert resumed is not None
    save(folder, 200)
    prune_checkpoints(folder, written=200, keep_last=1, damaged=resumed.passed_over)
    assert checkpoint_steps(folder) == [200]
    assert step_of(folder) == 200


def test_what_lies_beyond_the_written_step_costs_no_older_one(folder: RunFolder) -> None:
    for step in (100, 150, 200):
        save(folder, step)
    prune_checkpoints(folder, written=150, keep_last=1)
    assert checkpoint_steps(folder) == [150, 200]


@pytest.mark.parametrize("name", ["state", "checkpoint.json"])
def test_a_checkpoint_with_a_missing_file_is_refused_and_passed_over(
    folder: RunFolder, name: str
) -> None:
    save(folder, 1)
    newest = save(folder, 2)
    file_of(newest, name).unlink()
    with pytest.raises(CheckpointError, match=r"missing|no complete checkpoint"):
        find_checkpoint(str(newest))
    assert step_of(folder) == 1


@pytest.mark.parametrize("name", ["state", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "changed"])
def test_a_damaged_checkpoint_is_refused_and_passed_over(
    folder: RunFolder, name: str, damage: str
) -> None:
    save(folder, 1)
    newest = save(folder, 2)
    file = file_of(newest, name)
    data = file.read_bytes()
    middle = len(data) // 2
    damaged = {
        "truncated": data[: middle // 8],
        "empty": b"",
        "changed": data[:middle] + b"\xff\x00{" + data[middle + 3 :],
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError):
        find_checkpoint(str(newest))
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.state["step"] == 1
    assert list(found.passed_over) == [str(newest)]
    assert f"{newest}: {file.name} " in found.passed_over[str(newest)]


@pytest.mark.parametrize("name", ["state", "checkpoint.json"])
@pytest.mark.parametrize("damaged", ["", "[1]", "{}"])
def test_a_damaged_checkpoint_that_is_alone_is_never_taken_for_a_new_run(
    folder: RunFolder, name: str, damaged: str
) -> None:
    alone = save(folder, 1)
    file = file_of(alone, name)
    file.write_text(damaged)
    assert checkpoint_steps(folder) == [1]
    for read in (lambda: latest_checkpoint(folder), lambda: find_checkpoint(folder.uri)):
        with pytest.raises(CheckpointError, match=rf"none of its .* is whole \(.*{file.name} "):
            read()


def test_a_damaged_mark_takes_no_good_checkpoints_place(folder: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        save(folder, step)
    (Path(folder.checkpoints) / checkpoint_name(3) / "checkpoint.json").write_text("{cut")
    prune_checkpoints(folder, written=4, keep_last=2)
    assert checkpoint_steps(folder) == [2, 3, 4]
    prune_checkpoints(
        folder,
        written=4,
        keep_last=2,
        damaged=[storage.join(folder.checkpoints, checkpoint_name(3))],
    )
    assert checkpoint_steps(folder) == [2, 4]


def test_a_state_that_was_tampered_with_is_refused(folder: RunFolder) -> None:
    uri = save(folder, 1)
    changed = state(1)
    changed["student"]["0.bias"][0] += 1e-6
    torch.save(changed, state_file(uri))
    with pytest.raises(CheckpointError, match=r"state-.*.pt is damaged \(its hash differs\)"):
        find_checkpoint(str(uri))


@pytest.mark.parametrize("change", ["format", "option"])
def test_a_checkpoint_of_another_version_stops_the_run_instead_of_starting_it_anew(
    folder: RunFolder, change: str
) -> None:
    save(folder, 1)
    newest = save(folder, 2)
    about = json.loads((newest / "checkpoint.json").read_text())
    if change == "format":
        about["format"] = 99
    else:
        about["config"]["loss"]["margin"] = 0.1
    (newest / "checkpoint.json").write_text(json.dumps(about))
    for read in (lambda: load_checkpoint(str(newest)), lambda: latest_checkpoint(folder)):
        with pytest.raises(CheckpointError, match="version"):
            read()


def test_an_interrupted_write_over_an_old_step_leaves_that_as_it_was(folder: RunFolder) -> None:
    save(folder, 1)
    uri = save(folder, 2)
    old = (uri / "checkpoint.json").read_bytes()
    save_checkpoint(str(uri), state(5), {"step": 2}, CONFIG)
    (uri / "checkpoint.json").write_bytes(old)  # the new state is there, its mark is still the old
    found = latest_checkpoint(folder)
    assert found is not None
    assert_same(found.state, state(2))


def test_writes_of_one_step_that_cross_leave_the_checkpoint_of_the_last_mark(
    folder: RunFolder,
) -> None:
    """Of two writers, each between the other's state and mark: either mark has its own state."""
    uri = save(folder, 7)
    first = (uri / "checkpoint.json").read_bytes()
    other = config_from_values({})
    save_checkpoint(str(uri), state(5), {"step": 7}, other)
    found = load_checkpoint(str(uri))
    assert_same(found.state, state(5))
    assert found.config == other
    (uri / "checkpoint.json").write_bytes(first)
    found = load_checkpoint(str(uri))
    assert_same(found.state, state(7))
    assert found.config == CONFIG


def test_states_that_no_mark_names_are_deleted_once_a_later_step_is_there(
    folder: RunFolder,
) -> None:
    for step in (1, 2):
        save(folder, step)
    again = Path(folder.checkpoints) / checkpoint_name(2)
    save_checkpoint(str(again), state(5), {"step": 2}, CONFIG)
    unfinished = save(folder, 3)
    (unfinished / "checkpoint.json").unlink()
    prune_checkpoints(folder, written=2, keep_last=9)
    assert len([*again.glob("state-*")]) == 2  # another may be about to write their mark
    save(folder, 4)
    prune_checkpoints(folder, written=4, keep_last=9)
    assert checkpoint_steps(folder) == [1, 2, 4]
    assert_same(load_checkpoint(str(again)).state, state(5))
    assert [path.name for path in again.iterdir() if path != state_file(again)] == [
        "checkpoint.json"
    ]
    assert not [*unfinished.glob("state-*")]


def test_what_a_checkpoint_says_is_had_without_its_state(folder: RunFolder) -> None:
    save_scored(folder, 4, 10.0)
    state_file(save(folder, 5)).unlink()
    for found in (
        latest_checkpoint(folder, with_state=False),
        find_checkpoint(folder.uri, with_state=False),
        load_checkpoint(folder.file("checkpoints", checkpoint_name(5))),
    ):
        assert found is not None
        assert (found.about["step"], found.config) == (5, CONFIG)
        with pytest.raises(CheckpointError, match="is missing"):
            _ = found.state
    assert step_of(folder) == 4


def received(folder: RunFolder) -> dict[str, Any] | None:
    """On two ranks: rank 0 reads the newest checkpoint and deletes it, before the other can."""
    found = latest_checkpoint(folder) if dist.get_rank() == 0 else None
    if found is not None:
        shutil.rmtree(folder.uri)
    dist.barrier()
    stored = checkpoint_from_rank_zero(found, torch.device("cpu"))
    if stored is None:
        return None
    about = {"uri": stored.uri, "kept": stored.config == CONFIG, "over": dict(stored.passed_over)}
    return {**about, "about": stored.about, "state": stored.state}


def test_rank_zero_alone_reads_a_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcd_ray.checkpoint._BROADCAST_BYTES", 100)  # in many pieces
    assert run_on_ranks(2, received, folder) == [None, None]
    uri = save(folder, 3)
    damaged = save(folder, 4)
    state_file(damaged).unlink()
    ranks = run_on_ranks(2, received, folder)
    assert_same(*ranks)
    assert_same(ranks[1]["state"], state(3))
    assert (ranks[1]["uri"], ranks[1]["kept"]) == (str(uri), True)
    assert list(ranks[1]["over"]) == [str(damaged)]


@pytest.mark.parametrize(("seed", "allowed"), [(7, False), (8, True)])
def test_a_run_is_continued_with_its_own_options(
    folder: RunFolder, seed: int, allowed: bool
) -> None:
    stored = load_checkpoint(str(save(folder, 3, data_sha256="a")))
    run = {"name": "kept", "seed": seed, "allow_changes": allowed}
    config = config_from_values({"run": run, "loss": {"temperature": 0.1}})
    check_same_run(config, stored, data_sha256="a")


@pytest.mark.parametrize(
    ("seed", "images", "said"),
    [(8, "a", r"run\.seed: 7 -> 8"), (7, "b", r"data\.shards: the packed images at .* are others")],
)
def test_a_run_is_not_continued_with_other_options_or_images(
    folder: RunFolder, seed: int, images: str, said: str
) -> None:
    stored = load_checkpoint(str(save(folder, 3, data_sha256="a")))
    config = config_from_values({"run": {"seed": seed}, "loss": {"temperature": 0.1}})
    with pytest.raises(CheckpointError, match=rf"holds a run at step 3 .*\n  {said}"):
        check_same_run(config, stored, data_sha256=images)


def test_a_checkpoint_is_found_by_its_own_folder_or_its_runs(folder: RunFolder) -> None:
    first, _ = save(folder, 1), save(folder, 2)
    assert find_checkpoint(str(first)).about["step"] == 1
    assert find_checkpoint(folder.uri).about["step"] == 2
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; give a run's folder"):
        find_checkpoint(str(Path(folder.uri).parent))


def test_a_run_lives_under_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config: Config = config_from_values({"run": {"root": "runs", "name": "a"}})
    assert RunFolder.of(config).uri == str(tmp_path / "runs" / "a")
    remote = config_from_values({"run": {"root": "s3://bucket/runs", "name": "a"}})
    assert RunFolder.of(remote).checkpoints == "s3://bucket/runs/a/checkpoints"


def test_to_host_copies_every_tensor_and_keeps_all_else() -> None:
    one, two = torch.zeros(2), torch.zeros(1, requires_grad=True)
    copied = to_host(OrderedDict(a=one, b=[3, ("x", two)], c=None))
    with torch.no_grad():
        one += 1
        two += 1
    assert_same(copied, {"a": torch.zeros(2), "b": [3, ("x", torch.zeros(1))], "c": None})
    assert not copied["b"][1][1].requires_grad
