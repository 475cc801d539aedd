"""Thirty steps of the loop give the curve that is written down.

A change that should not alter numbers leaves it alone; one that should records it anew:
    PCD_RAY_RECORD_CURVE=1 pytest tests/golden
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import images, tiny_config
from torch import nn

from pcd_ray import metric_names as names
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import build_method
from pcd_ray.distill.build_teacher import LoadedTeacher
from pcd_ray.distill.teacher import TeacherIdentity
from pcd_ray.train.loop import LoopSettings, train_steps
from pcd_ray.train.optim import Schedule, build_optimizer
from pcd_ray.train.state import TrainState

CURVE = Path(__file__).parent / "curves" / "debug_cpu.txt"
STEPS, BATCH = 30, 8
COLUMNS = (
    names.LOSS,
    names.LOSS_ABOVE_TEACHER,
    names.GRAD_NORM,
    names.PIXEL_TOP1,
    names.EFFECTIVE_RANK,
    names.LEARNING_RATE,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute small things on one thread: on a busy machine threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_thirty_steps_give_the_recorded_curve() -> None:
    curve = _curve()
    if "PCD_RAY_RECORD_CURVE" in os.environ:
        np.savetxt(CURVE, curve, fmt="%.8g", header=" ".join(COLUMNS))
    recorded = np.loadtxt(CURVE)
    assert recorded.shape == (STEPS, len(COLUMNS))
    assert recorded[-3:, 0].mean() < recorded[:3, 0].mean() - 2  # it learns
    # in float64, other kernels (threads, width of vectors) move no number of the curve by more than
    # 1e-6 of itself, which is the metrics' float32
    np.testing.assert_allclose(curve, recorded, rtol=1e-5, atol=1e-6)


def _curve() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    config = tiny_config(teacher={"head": "published"}, train={"channels_last": True})
    method = build_method(config, [(_teacher(), None)], device=torch.device("cpu"))
    _draw_weights(method.student.double(), seed=1)
    queue = method.branches[0].queue
    queue.negatives = queue.negatives.double()
    optimizer = build_optimizer("adamw", method.student, weight_decay=0.05)
    settings = LoopSettings(
        schedule=Schedule(2e-3, 3.0, STEPS, 0.1),
        images_per_epoch=100,
        global_batch_size=BATCH,
        accumulation_steps=2,
        clip_grad_norm=5.0,
        log_every_steps=1,
        seed=0,
    )
    box = np.tile(np.array([0, 0, 64, 64, 0], np.float32), (BATCH, 1))
    batches = [
        {
            "student_view": images(step % 4, BATCH, 64).numpy(),
            "student_box": box,
            "teacher_box": box,
            "row": np.arange(BATCH),
            "epoch": np.zeros(BATCH, np.int64),
        }
        for step in range(STEPS)
    ]
    state = TrainState(method.student.train(), optimizer, method.branches)
    steps = train_steps(state, batches, settings)
    return np.array([[(done.metrics or {})[name] for name in COLUMNS] for done in steps])


def _teacher() -> LoadedTeacher:
    """A teacher with an MLP head whose BatchNorm has seen data, all from one seed."""
    backbone = build_backbone("test_resnet").double()
    channels = int(backbone.body.num_features)
    head = nn.Sequential(
        nn.Linear(channels, 32, bias=False),
        nn.BatchNorm1d(32, momentum=None),
        nn.ReLU(),
        nn.Linear(32, 16),
        nn.BatchNorm1d(16, affine=False, momentum=None),  # noise looks alike to it but for this
    ).double()
    _draw_weights(nn.Sequential(backbone, head), seed=0)
    with torch.no_grad():
        pixels = backbone(images(9, 16, 64)).movedim(1, 3).flatten(0, 2)
        head.train()(pixels)
    identity = TeacherIdentity(arch="test_resnet", source="seed 0", licence="", head="published")
    return LoadedTeacher(backbone, head.eval(), None, identity)


@torch.no_grad()
def _draw_weights(network: nn.Module, *, seed: int) -> None:
    """Draw weights by NumPy, in float64: torch's float32 draws differ with the width of vectors."""
    random = np.random.default_rng(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            deviation = parameter[0].numel() ** -0.5
            parameter.copy_(torch.from_numpy(random.normal(0, deviation, parameter.shape)))
        elif parameter.requires_grad and not parameter.eq(1).all():  # a bias
            parameter.zero_()
