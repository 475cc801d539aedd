import io
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import RunFolder
from pcd_ray.storage import StorageError
from pcd_ray.train.run_log import RunLog


def values(**changes: float) -> dict[str, float]:
    usual = {
        names.LOSS: 4.5,
        names.LOSS_AT_TEACHER: 4.0,  # of the last step, as what stands above it
        names.LOSS_ABOVE_TEACHER: -0.25,
        names.PIXEL_TOP1: 12.5,
        names.QUEUE_FILL: 100.0,
        names.STUDENT_SPREAD: 0.9,
        names.TEACHER_SPREAD: 0.9,
        names.STEP_S: 2.0,
        names.DATA_WAIT: 7.0,
        names.IMAGES_PER_S: 64.0,
    }
    return usual | {getattr(names, name): value for name, value in changes.items()}


def new_log(root: Path, console: io.StringIO | None = None, total_steps: int = 2000) -> RunLog:
    folder = RunFolder(str(root / "run"))
    return RunLog(folder, total_steps=total_steps, console=console or io.StringIO())


def lines_of(root: Path) -> list[dict[str, Any]]:
    text = (root / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_lines_and_events_hold_what_was_measured(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.metrics(10, 0.123456, values())
    log.metrics(20, 0.25, values(LOSS=4.0))
    log.metrics(20, 0.25, {names.KNN_TOP1: 40.0})
    log.close()
    found = lines_of(tmp_path)
    assert found == log.history
    assert found[0] == {"step": 10, "epoch": 0.1235, **values()}
    assert found[2] == {"step": 20, "epoch": 0.25, names.KNN_TOP1: 40.0}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars(names.LOSS)] == [(10, 4.5), (20, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars(names.KNN_TOP1)] == [(20, 40.0)]


def test_the_progress_line_says_how_far_how_long_and_how_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr("pcd_ray.train.run_log.time.monotonic", lambda: now[0])
    console = io.StringIO()
    log = new_log(tmp_path, console)
    log.metrics(1100, 2.5, values())
    now[0] += (1985 - 1100) * 2  # as long as the steps themselves take
    log.metrics(1150, 2.625, {names.KNN_TOP1: 41.25})
    log.metrics(1985, 3.0, values())
    assert console.getvalue().splitlines() == [
        "step 1100/2000 epoch 2.50 | ETA 30m00s | 64.0 images/s | data wait 7% | "
        "loss 3.750 (4.000 at student = teacher) | pixel top-1 12.5%",
        "step 1985/2000 epoch 3.00 | ETA 0m30s | 64.0 images/s | data wait 7% | "
        "loss 3.750 (4.000 at student = teacher) | kNN 41.2%",
    ]


@pytest.mark.parametrize(("left", "text"), [(1800, "1h00m"), (6, "0m12s"), (2170, "1h12m")])
def test_a_duration_is_read_at_a_glance(left: int, text: str) -> None:
    console = io.StringIO()
    new_log(Path("unused"), console, total_steps=10 + left).metrics(10, 1.0, values())
    assert f"ETA {text} |" in console.getvalue()


def test_a_terminal_keeps_one_line_and_texts_stand_above_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    console = Terminal()
    log = new_log(Path("unused"), console)
    log.metrics(1, 0.1, values())
    log.say("epoch 1 read")
    log.metrics(2, 0.2, values())
    assert console.getvalue().count("\n") == 1
    assert "\r\x1b[Kepoch 1 read\n\r\x1b[Kstep 2/2000" in console.getvalue()


def test_each_warning_is_given_once() -> None:
    console = io.StringIO()
    log = new_log(Path("unused"), console)
    for fill in (10.0, 55.0, 100.0):
        log.metrics(1, 0.1, values(QUEUE_FILL=fill, TEACHER_SPREAD=0.01))
    notes = [line for line in console.getvalue().splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "the queue is 10% full" in notes[0]
    assert "teacher's features are nearly constant (spread 0.010)" in notes[1]


def test_a_new_log_goes_on_after_the_step_that_training_goes_on_from(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    for step in (10, 20, 30):
        log.metrics(step, step / 10, values())
    log.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "ep')  # a writer that was killed
    again = new_log(tmp_path)
    assert [line["step"] for line in again.history] == [10, 20, 30]
    again.resume_at(20)
    again.metrics(25, 2.5, values(LOSS=1.0))
    again.close()
    assert [(x["step"], x[names.LOSS]) for x in lines_of(tmp_path)] == [
        (10, 4.5),
        (20, 4.5),
        (25, 1.0),
    ]


def test_a_loss_is_told_once_and_so_is_its_end(tmp_path: Path) -> None:
    console = io.StringIO()
    log = new_log(tmp_path, console)
    log.resume_at(0)  # how every run begins
    log.lost("lost: worker 1 died")
    log.lost("lost: worker 0, 1 died")  # Ray asks again while it cleans up
    log.resume_at(4)
    log.close()
    first, second = console.getvalue().splitlines()
    assert first == "warning: lost: worker 1 died"
    assert second == "training again 0 s after the loss"


def test_it_is_written_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pcd_ray.train.run_log.time.monotonic", lambda: now[0])
    log = new_log(tmp_path)
    log.metrics(1, 0.1, values())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    now[0] = 31.0
    log.metrics(2, 0.2, values())
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    now[0] = 45.0
    log.metrics(3, 0.3, values())
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_storage_that_fails_for_a_while_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pcd_ray.train.run_log.time.monotonic", lambda: now[0])
    console = io.StringIO()
    log = new_log(tmp_path, console)
    (tmp_path / "run").write_text("in the way")
    now[0] = 31.0
    log.metrics(1, 0.1, values())
    assert "warning: " in console.getvalue()
    assert "cannot be written" in console.getvalue()
    log.save()
    assert console.getvalue().count("cannot be written") == 2
    (tmp_path / "run").unlink()
    log.metrics(2, 0.2, values())
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_storage_that_fails_at_the_end_is_an_error(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        log.close()


def test_saving_beside_a_checkpoint_leaves_all_lines_so_far(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.metrics(1, 0.1, values())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    log.save()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
