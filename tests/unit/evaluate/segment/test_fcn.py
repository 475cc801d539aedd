from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetune_parts import CPU, finetune_settings
from PIL import Image
from segmentation_folder import painted_set

from pcd_ray.distill.backbones import build_backbone
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.finetune.finetune import finetune_steps, fingerprint, new_state
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.segment.confusion import confusion_matrix, score_of
from pcd_ray.evaluate.segment.fcn import Fcn, FcnSettings, FcnTask, mean_over_labelled, random_crop
from pcd_ray.evaluate.segment.segmentation_data import open_segmentation
from pcd_ray.evaluate.segment.sliding_window import predicted_mask

PLAIN = FcnSettings(
    output_stride=8,
    head_channels=0,
    dropout=0.0,
    crop_px=16,
    min_scale=1.0,
    max_scale=1.0,
    flip_prob=0.0,
    head_lr_scale=10.0,
    seed=0,
)
FILL = (9, 8, 7)


def network_of(name: str = "test_resnet", **changes: Any) -> JudgedNetwork:
    torch.manual_seed(0)
    weights = build_backbone(name).body.state_dict()
    facts = {"sha256": "0" * 64, "source": "drawn", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return JudgedNetwork(label="small", timm_name=name, weights=weights, **{**facts, **changes})


def task_of(folder: Path, *, size_px: int = 0, **changes: Any) -> FcnTask:
    network = network_of()
    data = open_segmentation(painted_set(folder), size_px=size_px)
    settings = replace(PLAIN, **changes)
    return FcnTask(network=network, identity=network.identity, data=data, settings=settings)


def numbered(height: int = 12, width: int = 20) -> tuple[Image.Image, Any]:
    """An image and a mask of which every pixel says where it is."""
    places = np.arange(height * width).reshape(height, width)
    pixels = np.stack([places, places, places], axis=2).astype(np.uint8)
    return Image.fromarray(pixels), places.astype(np.uint8)


def cropped(seed: int, **changes: Any) -> tuple[Any, Any]:
    image, mask = numbered()
    settings = replace(PLAIN, **{"crop_px": 8} | changes)
    pixels, labels = random_crop(image, mask, settings, relative_size=1.0, fill=FILL, seed=seed)
    return pixels, labels


def test_a_crop_is_a_part_of_the_image_with_its_own_labels() -> None:
    _, mask = numbered()
    corners = set()
    for seed in range(40):
        pixels, labels = cropped(seed)
        np.testing.assert_array_equal(pixels[..., 0], labels)
        top, left = divmod(int(labels[0, 0]), 20)
        np.testing.assert_array_equal(labels, mask[top : top + 8, left : left + 8])
        corners.add((top, left))
    assert {top for top, _ in corners} == set(range(5))
    assert min(left for _, left in corners) == 0
    assert max(left for _, left in corners) == 12


def test_a_flip_turns_image_and_labels_alike() -> None:
    flipped = 0
    for seed in range(30):
        pixels, labels = cropped(seed, flip_prob=0.5)
        np.testing.assert_array_equal(pixels[..., 0], labels)
        flipped += int(labels[0, 0] > labels[0, 1])
    assert 5 < flipped < 25


def test_small_images_are_filled_up_with_void() -> None:
    pixels, labels = cropped(0, crop_px=16)
    _, mask = numbered()
    assert (labels[12:] == 255).all()
    assert (pixels[12:] == FILL).all()
    left = int(labels[0, 0])
    np.testing.assert_array_equal(labels[:12], mask[:, left : left + 16])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaling_keeps_labels_where_their_pixels_are(factor: float) -> None:
    mask = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8)
    image = Image.fromarray(np.stack([mask] * 3, axis=2))
    settings = replace(PLAIN, min_scale=factor, max_scale=factor, crop_px=32)
    pixels, labels = random_crop(image, mask, settings, relative_size=1.0, fill=FILL, seed=3)
    labelled = labels != 255
    assert labelled.sum() == {0.5: 8 * 12, 2.0: 32 * 32}[factor]
    off = np.abs(pixels[..., 0][labelled].astype(int) - labels[labelled])
    assert np.mean(off > 20) < 0.1  # nearer to another class: where edges are blurred
    if factor == 0.5:
        np.testing.assert_array_equal(labels[:8, :12], mask[1::2, 1::2])


def test_an_example_follows_from_index_and_seed_and_size(tmp_path: Path) -> None:
    task = task_of(tmp_path, min_scale=0.5, max_scale=2.0, flip_prob=0.5)
    first, again, other, third = (
        task.example(index, seed) for index, seed in ((1, 5), (1, 5), (1, 6), (2, 5))
    )
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], third[1])
    assert (first[0].shape, first[1].shape) == ((16, 16, 3), (16, 16))
    half = task_of(tmp_path / "half", size_px=8)
    assert (half.example(0, 0)[1][8:] == 255).all()  # 16 rows judged at 8 are trained on at 8


def test_the_loss_is_the_mean_over_labelled_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=random, dtype=torch.float64)
    masks = torch.randint(0, 4, (3, 5, 6), generator=random)
    masks[torch.rand(3, 5, 6, generator=random) < 0.4] = 255
    found = mean_over_labelled(logits, masks)
    torch.testing.assert_close(found, F.cross_entropy(logits, masks, ignore_index=255))
    empty = mean_over_labelled(logits.requires_grad_(), torch.full_like(masks, 255))
    empty.backward()
    assert float(empty.detach()) == 0.0
    assert float(logits.grad.abs().sum()) == 0.0


def test_the_network_is_built_with_its_weights_and_an_equal_head(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one, other = task.build(), task.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, value in task.network.weights.items():
        assert torch.equal(one.backbone.body.state_dict()[name], value)
    images = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert one.eval().backbone(images).shape[2:] == (8, 8)
    reseeded = replace(task, settings=replace(task.settings, seed=1)).build()
    assert not torch.equal(reseeded.head[0].weight, one.head[0].weight)


def test_groups_hold_every_trained_parameter_once(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    model = task.build()
    groups = task.parameter_groups(model)
    listed = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert groups[1]["lr_scale"] == 10.0
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.head.parameters()}


def test_the_place_of_a_network_is_no_part_of_a_tasks_identity(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    renamed = replace(task, network=replace(task.network, label="another", source="elsewhere"))
    assert fingerprint(task) == fingerprint(renamed)
    other = replace(task.settings, crop_px=24)
    assert fingerprint(task) != fingerprint(replace(task, settings=other))
    assert fingerprint(task) != fingerprint(replace(task, identity="of other weights"))


def test_every_parameter_that_wants_a_gradient_gets_one(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    model = task.build().train()
    sum(model(task.collate([task.example(0, 0), task.example(1, 0)], CPU)).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_fine_tuning_finds_colours(tmp_path: Path) -> None:
    network = network_of()
    data = open_segmentation(painted_set(tmp_path, block=8))
    settings = replace(PLAIN, crop_px=32, min_scale=2.0, max_scale=4.0, flip_prob=0.5)
    task = FcnTask(network=network, identity=network.identity, data=data, settings=settings)
    how = finetune_settings(steps=60, global_batch_size=8, lr=0.02, warmup_steps=0)
    state = new_state(task, how, device=CPU)
    losses = [step.losses for step in finetune_steps(task, how, state, device=CPU)]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    model = state.model.eval()
    assert isinstance(model, Fcn)
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for name in data.names("val"):
        image, truth = data.example(name)
        large = np.asarray(Image.fromarray(image).resize((72, 48), Image.Resampling.NEAREST))
        mask = predicted_mask(model.logits, torch.from_numpy(large.copy()), size_px=truth.shape)
        confusion += confusion_matrix(torch.from_numpy(truth.copy()), mask, num_classes=3, void=255)
    score = score_of(confusion, data.classes)
    assert score.miou_pct > 45  # blind guesses of the commonest class score 17


def test_a_crop_that_the_network_cannot_take_names_the_option(tmp_path: Path) -> None:
    network = network_of("test_vit")
    data = open_segmentation(painted_set(tmp_path))
    settings = replace(PLAIN, output_stride=0, crop_px=50)
    task = FcnTask(network=network, identity="", data=data, settings=settings)
    with pytest.raises(
        ConfigError, match=r"eval\.segment\.crop_px=50 does not split into the 16 px"
    ):
        task.build()
