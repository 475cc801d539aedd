"""What a worker writes of its scores into a checkpoint."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from stored_run import TEACHER

from pcd_ray import metric_names as names
from pcd_ray.distill.teacher import TeacherIdentity
from pcd_ray.train.loop import StepDone
from pcd_ray.train.ray_worker import _Run


def a_run(of_epoch: Callable[[object, int], dict[str, float]]) -> tuple[_Run, list[Any]]:
    """Return a run with no more than its bookkeeping, and what its checkpoints will say."""
    run, written = object.__new__(_Run), []
    pixel, identity = torch.zeros(3), TeacherIdentity(**TEACHER)
    backbone = SimpleNamespace(name="resnet18", mean=pixel, std=pixel)
    branch = SimpleNamespace(name="teacher", identity=identity, law_error=0.0)
    parts = {
        "config": SimpleNamespace(train=SimpleNamespace(global_batch_size=4)),
        "plan": SimpleNamespace(images_per_epoch=8, reads_once=lambda: True),
        "total_steps": 8,
        "place": SimpleNamespace(rank=0),
        "events": SimpleNamespace(metrics=lambda *_: None, say=lambda _: None),
        "shards": SimpleNamespace(content_hash="d"),
        "scores": SimpleNamespace(of_epoch=of_epoch),
        "method": SimpleNamespace(branches=[branch], student=SimpleNamespace(backbone=backbone)),
        "state": SimpleNamespace(
            step=0, judged=None, audit=SimpleNamespace(verdict=lambda *_: None)
        ),
        "_checkpoint": lambda _: written.append(run._about(dict(run._last_scores))),
        "_last_scores": {},
        "_scored": (-1, []),
    }
    vars(run).update(parts)
    return run, written


def test_a_checkpoint_says_which_of_its_scores_are_its_own() -> None:
    def of_epoch(_: object, ended: int) -> dict[str, float]:
        probe = {names.SEGMENTATION_MIOU: 40.0} if ended % 2 == 0 else {}
        return {} if ended == 4 else {names.KNN_TOP1: float(ended)} | probe

    run, written = a_run(of_epoch)
    for epoch in range(4):
        run.state.step += 2
        run._after_epoch(StepDone(run.state.step, epoch, None), epoch + 1.0)
    run.state.step += 1
    run._checkpoint(None)
    own = [[names.KNN_TOP1], sorted([names.KNN_TOP1, names.SEGMENTATION_MIOU])]
    assert [about["scored"] for about in written] == [*own, [names.KNN_TOP1], [], []]
    assert written[2]["metrics"] == {names.KNN_TOP1: 3.0, names.SEGMENTATION_MIOU: 40.0}
