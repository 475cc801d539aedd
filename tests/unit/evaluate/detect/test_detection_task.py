"""What a detector is trained on, and that it learns."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from detection_folder import SIZE, record, write_set
from judged import drawn_network

from pcd_ray.config import DataConfig, DetectConfig
from pcd_ray.evaluate.detect.detect_settings import detection_task, finetune_settings
from pcd_ray.evaluate.detect.detection import detect
from pcd_ray.evaluate.detect.detection_ap import average_precision, results_of
from pcd_ray.evaluate.detect.detection_data import open_detection
from pcd_ray.evaluate.detect.detection_examples import DetectionViews
from pcd_ray.evaluate.detect.detection_task import DetectionTask, taking_part
from pcd_ray.evaluate.finetune.finetune import finetune_steps, new_state

HEIGHT, WIDTH = SIZE
CPU = torch.device("cpu")


def views(**given: Any) -> DetectionViews:
    return DetectionViews(
        **{
            "min_short_side_px": 64,
            "max_short_side_px": 64,
            "max_long_side_px": 200,
            "flip_prob": 0.0,
            "max_pixels": 10**6,
            "max_decode_s": 10.0,
            "masks": True,
            **given,
        }
    )


@pytest.fixture(name="task_of")
def fixture_task_of(tmp_path: Path) -> Callable[..., DetectionTask]:
    uri = write_set(tmp_path)

    def task_of(**options: Any) -> DetectionTask:
        data = open_detection(uri, masks=True)
        chosen = DetectConfig(
            data=uri,
            **{
                "min_short_side_px": 64,
                "max_short_side_px": 64,
                "max_long_side_px": 200,
                "box_head": "2fc",
                "rois_per_image": 8,
                **options,
            },
        )
        return detection_task(drawn_network(), data, chosen, limits=DataConfig(), seed=0)

    return task_of


def test_boxes_and_masks_follow_the_image(tmp_path: Path) -> None:
    image = open_detection(write_set(tmp_path), masks=True).train.images[0]
    for flip_prob in (0.0, 1.0):
        for side in (64, 100):
            example = views(
                min_short_side_px=side, max_short_side_px=side, flip_prob=flip_prob
            ).drawn(image, seed=1)
            assert example.masks is not None
            assert example.image.shape == (side, round(side * WIDTH / HEIGHT), 3)
            for box, mask, label in zip(example.boxes, example.masks, example.labels, strict=True):
                left, top, right, bottom = box.tolist()
                rows, columns = np.nonzero(mask.numpy())
                assert abs(columns.min() - left) <= 1
                assert abs(columns.max() + 1 - right) <= 1
                assert abs(rows.min() - top) <= 1
                assert abs(rows.max() + 1 - bottom) <= 1
                inside = example.image[mask.bool()].float().mean(0)  # red is label 1, blue 2
                assert int(inside.argmax()) == {1: 0, 2: 2}[int(label)]


def test_short_sides_are_drawn_in_steps_and_long_sides_have_an_end(tmp_path: Path) -> None:
    image = open_detection(write_set(tmp_path), masks=True).train.images[0]
    wide = views(min_short_side_px=64, max_short_side_px=140, max_long_side_px=150, flip_prob=0.5)
    sides = {wide.drawn(image, seed).image.shape[0] for seed in range(40)}
    assert sides == {64, 96, 100}  # 128 and 140 would be wider than 150
    assert wide.judged(image).shape == (100, 150, 3)
    once, again = (wide.drawn(image, 3) for _ in range(2))
    assert once.image.equal(again.image)
    flipped = views(flip_prob=0.5)
    lefts = {float(flipped.drawn(image, seed).boxes[0, 0]) for seed in range(10)}
    assert len(lefts) == 2


def test_crowds_are_no_targets(tmp_path: Path) -> None:
    train = record(1)
    train["annotations"][0]["iscrowd"] = 1
    image = open_detection(write_set(tmp_path, train), masks=True).train.images[0]
    example = views().drawn(image, 0)
    assert example.masks is not None
    assert example.labels.tolist() == [2]
    assert len(example.boxes) == len(example.masks) == 1


def test_first_weights_are_the_students_and_drawn_equally(
    task_of: Callable[..., DetectionTask],
) -> None:
    task = task_of()
    one, other = task.build().state_dict(), task.build().state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name, value in task.network.weights.items():
        assert torch.equal(one[f"body.{name}"], value)


def test_norms_do_not_decay_and_all_else_does(task_of: Callable[..., DetectionTask]) -> None:
    detector = task_of().build()
    decaying, norms = task_of().parameter_groups(detector)
    names = {id(weight): name for name, weight in detector.named_parameters()}
    assert norms["weight_decay"] == 0
    assert {names[id(w)].rpartition(".")[2] for w in norms["params"]} == {"weight", "bias"}
    assert all(w.ndim == 1 for w in norms["params"])
    assert len(decaying["params"]) + len(norms["params"]) == len(names)
    assert "weight_decay" not in decaying


def test_a_dilated_student_is_judged_undilated(tmp_path: Path) -> None:
    data = open_detection(write_set(tmp_path), masks=True)
    dilated = drawn_network("resnet10t", output_stride=8)
    options = DetectConfig(data=str(tmp_path))
    task = detection_task(dilated, data, options, limits=DataConfig(), seed=0)
    assert task.build().taps == [1, 2, 3, 4]


def test_a_fraction_shortens_schedule_and_images(task_of: Callable[..., DetectionTask]) -> None:
    options = DetectConfig(fraction=0.01)
    settings = finetune_settings(options, device="cpu", seed=0)
    assert (settings.steps, settings.milestones, settings.warmup_steps) == (900, (600, 800), 90)
    assert settings.lr == pytest.approx(0.02)
    whole = finetune_settings(DetectConfig(preset="coco_2x"), device="cuda", seed=0)
    assert (whole.steps, whole.milestones) == (180_000, (120_000, 160_000))
    assert whole.sync_batchnorm
    assert taking_part(1000, 0.25, 3).size == len(set(taking_part(1000, 0.25, 3).tolist())) == 250
    task = task_of(fraction=0.5)
    assert task.num_images == len(task.images("train")) == 2
    assert len(task.images("val")) == 2  # of 3


def test_a_preset_sees_as_many_images_whatever_the_batch() -> None:
    usual = finetune_settings(DetectConfig(), device="cpu", seed=0)
    small = finetune_settings(DetectConfig(global_batch_size=4), device="cpu", seed=0)
    assert (small.steps, small.milestones) == (360_000, (240_000, 320_000))
    assert small.steps * 4 == usual.steps * 16
    assert small.lr * 4 == pytest.approx(usual.lr)
    given = finetune_settings(DetectConfig(global_batch_size=4, steps=7), device="cpu", seed=0)
    assert given.steps == 7


def test_other_annotations_are_another_task(tmp_path: Path) -> None:
    before = open_detection(write_set(tmp_path), masks=True).sha256
    train = record(4)
    train["annotations"][0]["area"] = 1.0
    assert open_detection(write_set(tmp_path, train), masks=True).sha256 != before


def test_a_process_opens_the_set_once(
    task_of: Callable[..., DetectionTask], tmp_path: Path
) -> None:
    """What is sent to a worker is without the set; there, threads find one that is open."""
    task = task_of()
    content = pickle.dumps(task)
    images = task.images("train")
    sent = pickle.loads(content)
    assert "opened" not in vars(sent)
    assert sent == task
    assert sent.num_images == len(images)
    (tmp_path / "instances_train.json").unlink()  # it is not read again
    assert torch.equal(sent.example(1, seed=0).image, task.example(1, seed=0).image)


def trained(task_of: Callable[..., DetectionTask], steps: int) -> tuple[DetectionTask, Any, Any]:
    """Train on two images; return the task, the detector and the sum of losses of each step."""
    options: dict[str, Any] = {
        "fraction": 0.5,
        "steps": 2 * steps,
        "global_batch_size": 2,
        "lr_per_16_images": 0.24,
        "clip_grad_norm": 5.0,
        "flip_prob": 0.0,
        "log_every_steps": 1,
    }
    task = task_of(**options)
    settings = finetune_settings(DetectConfig(**options), device="cpu", seed=0)
    state = new_state(task, settings, device=CPU)
    done = finetune_steps(task, settings, state, device=CPU, threads=1)
    losses = [sum(each.losses.values()) for each in done if each.losses is not None]
    assert len(losses) == steps
    return task, state.model, losses


@pytest.mark.slow
def test_losses_fall_and_two_images_are_learned_by_heart(
    task_of: Callable[..., DetectionTask],
) -> None:
    task, detector, losses = trained(task_of, 90)
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])
    detector.eval()
    images = task.images("train")
    results = [
        result
        for image in images
        for result in results_of(
            image, detect(detector, [task.views.judged(image)], [SIZE])[0], (3, 7)
        )
    ]
    kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm")
    for of in kinds:
        scored = average_precision(
            images, results, classes=("red", "blue"), category_ids=(3, 7), of=of
        )
        assert scored.summary["ap50"] is not None
        assert scored.summary["ap50"] > 50, scored
