from pathlib import Path

import torch
from stored_run import seen_student, store_run, store_student
from tiny import images, tiny_config
from torch import nn

from pcd_ray.checkpoint import find_checkpoint
from pcd_ray.evaluate.necks import stored_student


def test_a_stored_student_has_the_backbone_and_the_neck_of_its_run(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "moved"})
    trained = seen_student(config)
    nn.init.normal_(trained.neck[0].projection.weight)
    averaged = seen_student(config)
    nn.init.normal_(averaged.neck[0].projection.weight)
    pixels = images(0, 2, 64)
    for average in (None, averaged):
        folder = store_student(config, trained, 1, average=average)
        student = stored_student(find_checkpoint(folder.uri))
        expected = average or trained
        with torch.no_grad():
            found = student.neck(student.backbone(pixels))
            assert torch.equal(found, expected.neck(expected.backbone(pixels)))
        assert not student.training


def test_a_run_without_neck_gives_an_empty_one(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 1, student={"mhsa": {"depth": 0}})
    assert len(stored_student(find_checkpoint(folder.uri)).neck) == 0
