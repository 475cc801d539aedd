"""Losses of a fine-tuning on storage: one line for each logged step, also after an interruption."""

import io
from pathlib import Path

from PIL import Image

from pcd_ray.evaluate.finetune.finetune_log import FinetuneLog, read_history, training_curve


def values(loss: float) -> dict[str, float]:
    return {"loss": loss, "lr": 0.1}


def test_steps_that_are_done_again_are_logged_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "part" / "metrics.jsonl")
    first = FinetuneLog(uri, steps=6)
    first.resumed(0)
    for step in (2, 4, 6):
        first.metrics(step, values(1 / step))
    first.flush()
    again = FinetuneLog(uri, steps=6)
    again.resumed(3)  # its last checkpoint
    for step in (4, 6):
        again.metrics(step, values(2 / step))
    again.flush()
    assert [line["step"] for line in read_history(uri)] == [2, 4, 6]
    assert [line["loss"] for line in read_history(uri)] == [1 / 2, 2 / 4, 2 / 6]
    Path(uri).write_text('{"step": 1')
    assert read_history(uri) == []


def test_the_curve_is_a_picture_of_all_losses() -> None:
    one = [{"step": 1, "box": 1.0, "mask": 0.5, "lr": 0.1}]
    for history in (one, [{**one[0], "step": step} for step in range(200)]):
        assert Image.open(io.BytesIO(training_curve(history))).width > 500
