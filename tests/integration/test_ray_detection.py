"""Real Ray: a detector is fine-tuned, its detections are stored, and all of it is reused."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from detection_folder import SIZE, write_set
from judged import drawn_network

from pcd_ray.config import Config, config_from_values
from pcd_ray.errors import ConfigError, ShardError
from pcd_ray.evaluate.detect import ray_detection
from pcd_ray.evaluate.detect.detect_settings import detection_task, open_detection_set
from pcd_ray.evaluate.detect.detection_figure import SHOWN_SCORE
from pcd_ray.evaluate.detect.detection_masks import run_lengths_of
from pcd_ray.evaluate.detect.ray_detection import found_results, judge_detection
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.scores import Scores
from pcd_ray.ray_shares import WorkerShare

pytestmark = pytest.mark.usefixtures("ray_session")


def config_of(data: str, **more: object) -> Config:
    detect = {
        "data": data,
        "steps": 3,
        "global_batch_size": 2,
        "min_short_side_px": 64,
        "max_short_side_px": 64,
        "max_long_side_px": 128,
        "box_head": "2fc",
        "rois_per_image": 16,
        "log_every_steps": 1,
        **more,
    }
    return config_from_values({"train": {"threads_per_worker": 1}, "eval": {"detect": detect}})


def judged(config: Config, folder: Path) -> Scores:
    with contextlib.redirect_stderr(io.StringIO()):
        return judge_detection(
            drawn_network("resnet10t"),
            open_detection_set(config),
            config,
            place=Place(str(folder), str(folder)),
            seed=0,
            device="cpu",
        )


def test_a_detector_is_judged_and_what_is_stored_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_detection, "_IMAGES_PER_PART", 2)  # of 3: two tasks
    config = config_of(write_set(tmp_path / "set"))
    folder = tmp_path / "out"
    scores = judged(config, folder)
    assert next(iter(scores.values)) == "box_ap"
    assert {"box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"} < scores.values.keys()
    assert all(0 <= value <= 100 for value in scores.values.values())
    assert list(scores.classes) == ["box_ap", "mask_ap"]
    assert set(scores.classes["box_ap"]) == {"red", "blue"}
    assert scores.pictures["detections.png"].startswith(b"\x89PNG")
    about = {key: scores.about[key] for key in ("train_objects", "val_objects")}
    assert about == {"train_objects": 8, "val_objects": 6}
    assert scores.intervals.keys() >= {"box_ap", "box_ap50", "mask_ap", "mask_ap75"}
    assert scores.test_images["box_ap"] == 3
    assert scores.pictures["training.png"].startswith(b"\x89PNG")

    stored = folder / "detections.json"
    assert not (folder / "parts").exists()
    assert {result["category_id"] for result in json.loads(stored.read_text())} <= {3, 7}

    # what was stored is scored as it is: perfect detections in its place give 100
    val = json.loads((tmp_path / "set" / "instances_val.json").read_text())
    perfect = [
        {
            **{key: item[key] for key in ("image_id", "category_id", "bbox")},
            "segmentation": _run_lengths(item["bbox"]),
            "score": SHOWN_SCORE,
        }
        for item in val["annotations"]
    ]
    stored.write_text(json.dumps(perfect))
    again = judged(config, folder)
    assert again.values["box_ap"] == again.values["mask_ap"] == pytest.approx(100)
    shutil.rmtree(folder / "work")  # as once scores are stored: nothing is trained again
    assert judged(config, folder).values == again.values
    assert not (folder / "work").exists()


def _run_lengths(box: list[float]) -> object:
    bitmap = np.zeros(SIZE, np.uint8)
    left, top, width, height = (int(value) for value in box)
    bitmap[top : top + height, left : left + width] = 1
    return run_lengths_of(bitmap)


def test_bad_input_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.detect\.data is empty; give a folder"):
        judged(config_of(""), tmp_path / "out")
    uri = write_set(tmp_path / "set")
    (tmp_path / "set" / "images" / "100.png").unlink()
    with pytest.raises(ShardError, match=r"^eval\.detect\.data: .*1 of 4 images are not in"):
        judged(config_of(uri), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_breaks_while_looking_is_named(tmp_path: Path) -> None:
    config = config_of(write_set(tmp_path / "set"))
    data = open_detection_set(config)
    task = detection_task(
        drawn_network("resnet10t"), data, config.eval.detect, limits=config.data, seed=0
    )
    (tmp_path / "set" / "images" / "104.png").write_bytes(b"no image")  # of the second split
    with pytest.raises(ShardError, match=r"104\.png: not an image; mend or remove the file"):
        found_results(
            task,
            task.build().state_dict(),
            str(tmp_path),
            category_ids=(3, 7),
            share=WorkerShare("cpu", cpus=1, threads=1),
        )
