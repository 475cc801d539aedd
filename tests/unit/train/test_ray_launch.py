"""What the driver takes away before a run, and what it leaves."""

from pathlib import Path

from stored_run import store_run

from pcd_ray.checkpoint import RunFolder, checkpoint_name, latest_checkpoint
from pcd_ray.evaluate.references import REFERENCES
from pcd_ray.train.ray_launch import _prepare_folder


def leave_an_earlier_try(folder: RunFolder) -> list[Path]:
    files = [folder.fitted_head("teacher"), folder.file(REFERENCES), folder.file("metrics.jsonl")]
    files.append(folder.file("tensorboard", "events.out.tfevents.1"))
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("kept")
    return list(map(Path, files))


def test_what_belongs_to_a_checkpoint_stays_also_where_that_is_damaged(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    found = latest_checkpoint(folder)
    assert found is not None
    files = leave_an_earlier_try(folder)
    (Path(folder.checkpoints) / checkpoint_name(10) / "checkpoint.json").write_text("{cut")
    _prepare_folder(found.config, folder)
    assert [file.read_text() for file in files] == ["kept"] * len(files)


def test_without_a_checkpoint_nothing_of_an_earlier_try_counts(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 10)
    found = latest_checkpoint(folder)
    assert found is not None
    files = leave_an_earlier_try(folder)
    (Path(folder.checkpoints) / checkpoint_name(10) / "checkpoint.json").unlink()
    _prepare_folder(found.config, folder)
    assert not any(file.exists() for file in files)
