"""Small networks in float64 whose every number the reference can follow."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.feature_queue import FeatureQueue
from pcd_ray.distill.heads import MlpShape, mirrored_head
from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.distill.step import Branch, DistillSettings, StepResult, ViewBatch, distill_step
from pcd_ray.distill.student import Student
from pcd_ray.distill.teacher import FrozenTeacher, TeacherIdentity


class SmallBody(nn.Module):
    """Two convolutions; without BatchNorm, images of a batch do not see one another."""

    def __init__(self, channels: int, *, stride: int, batchnorm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.second = nn.Conv2d(8, channels, stride // 2, stride=stride // 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def small_backbone(
    seed: int, channels: int, *, stride: int = 8, batchnorm: bool = False
) -> Backbone:
    torch.manual_seed(seed)
    body = SmallBody(channels, stride=stride, batchnorm=batchnorm)
    return Backbone(body, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), name="small")


def small_head(seed: int, channels: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(16)
    norm.running_mean, norm.running_var = torch.randn(16) / 4, torch.rand(16) + 0.1
    return nn.Sequential(nn.Linear(channels, 16), norm, nn.ReLU(), nn.Linear(16, width))


def small_teacher(seed: int = 0, *, stride: int = 8, width: int = 6) -> FrozenTeacher:
    backbone = small_backbone(seed, 10, stride=stride, batchnorm=True)
    return FrozenTeacher(backbone, small_head(seed, 10, width), rule="gate").double()


def small_student(
    seed: int = 1, *, stride: int = 8, width: int = 6, widths: Sequence[int] = ()
) -> Student:
    """Backbone, a neck that has left zero, and a head of one layer, or one for each width."""
    backbone = small_backbone(seed, 8, stride=stride)
    neck = MhsaNeck(8, depth=1, heads=2)
    nn.init.normal_(neck[0].projection.weight, std=0.3)
    heads = [mirrored_head(8, [MlpShape((each,))]) for each in widths or (width,)]
    return Student(backbone, neck, heads).double()


def branch_of(
    teacher: FrozenTeacher,
    queue: FeatureQueue | None,
    settings: DistillSettings,
    *,
    weight: float = 1.0,
) -> Branch:
    """A branch of parts that nothing was said about."""
    identity = TeacherIdentity(arch="small", source="drawn", licence="", head="published")
    return Branch(
        teacher=teacher,
        queue=queue,
        settings=settings,
        weight=weight,
        identity=identity,
        law_error=0.0,
        teacher_map=(0, 0, 0),
    )


def queue_of(negatives: Tensor) -> FeatureQueue:
    """A queue that holds these (K, D) unit vectors."""
    queue = FeatureQueue(*negatives.shape, seed=0, device=negatives.device)
    queue.negatives = negatives
    return queue


def one_step(
    student: nn.Module,
    teacher: FrozenTeacher,
    negatives: Tensor | None,
    batch: ViewBatch,
    settings: DistillSettings,
    *,
    num_pairs: Tensor | None = None,
) -> StepResult:
    """Return the result of a single branch."""
    queue = None if negatives is None else queue_of(negatives)
    branches = [branch_of(teacher, queue, settings)]
    return distill_step(student, branches, batch, num_pairs=[num_pairs])[0]
