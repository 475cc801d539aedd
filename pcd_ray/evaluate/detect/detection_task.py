"""Fine-tuning a detector on a student's backbone: what the harness trains.

Shapes: B images, N objects of an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pcd_ray.evaluate.detect.detection import BoxHead, DetectionBatch, Detector
from pcd_ray.evaluate.detect.detection_data import DetectionData, DetectionImage, open_detection
from pcd_ray.evaluate.detect.detection_examples import DetectionExample, DetectionViews
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.seeds import derive_seed

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class DetectionTask:
    """A detector, its first weights and its images, as plain data that any process can use."""

    network: JudgedNetwork = field(compare=False, repr=False)
    """The student."""
    identity: str
    """The student's."""
    data: str
    """URI of the set, opened anew by each process."""
    content: str
    """Hash of its json files."""
    classes: tuple[str, ...]
    """Names, by label."""
    fraction: float
    """Share of the images that take part, in (0, 1]."""
    views: DetectionViews
    """How images are resized and mirrored."""
    box_head: BoxHead
    rois_per_image: int
    seed: int
    """Of the new layers' first weights and of the images that take part."""

    @property
    def num_images(self) -> int:
        """Training images that take part.

        Whoever trains asks for it before threads ask for examples: the set is opened here, once.
        """
        return len(self._train_images)

    def build(self) -> Detector:
        """Return the detector on the CPU: the student's weights, drawn ones in the new layers.

        Raises:
            ConfigError: the student has no maps of stride 4, 8, 16 and 32.
        """
        # a dilated student is the same network undilated
        kwargs = {k: v for k, v in self.network.kwargs.items() if k != "output_stride"}
        backbone = replace(self.network, kwargs=kwargs).backbone(output_stride=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "detection_heads"))
            return Detector(
                backbone,
                num_classes=len(self.classes),
                masks=self.views.masks,
                box_head=self.box_head,
                rois_per_image=self.rois_per_image,
            )

    def example(self, index: int, seed: int) -> DetectionExample:
        """Return a training image, resized and mirrored as ``seed`` says, with its targets.

        Raises:
            ShardError: the image cannot be decoded or is not as its record says.
        """
        return self.views.drawn(self._train_images[index], seed)

    def collate(self, examples: list[DetectionExample], device: torch.device) -> DetectionBatch:
        """Return a batch on the device; images keep their sizes."""
        targets = []
        for example in examples:
            target = {"boxes": example.boxes, "labels": example.labels}
            if example.masks is not None:
                target["masks"] = example.masks
            targets.append({name: value.to(device) for name, value in target.items()})
        return DetectionBatch(images=[each.image.to(device) for each in examples], targets=targets)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the weights that decay, and those of norms, which do not."""
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        of_norms = {id(weight) for weight in _weights_of_norms(model)}
        return [
            {"params": [weight for weight in trained if id(weight) not in of_norms]},
            {
                "params": [weight for weight in trained if id(weight) in of_norms],
                "weight_decay": 0.0,
            },
        ]

    def images(self, split: str) -> tuple[DetectionImage, ...]:
        """Return the images of a split that take part, in the order of its file."""
        images: tuple[DetectionImage, ...] = getattr(self.opened, split).images
        rows = taking_part(len(images), self.fraction, self.seed)
        return images if len(rows) == len(images) else tuple(images[row] for row in rows)

    @cached_property
    def opened(self) -> DetectionData:
        """The set, opened once in each process: large json files take a minute to read."""
        return open_detection(self.data, masks=self.views.masks)

    @cached_property
    def _train_images(self) -> tuple[DetectionImage, ...]:
        return self.images("train")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the opened set behind: another process opens it anew."""
        kept = {each.name for each in fields(self)}
        return {name: value for name, value in self.__dict__.items() if name in kept}


def taking_part(count: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """Return the rows of a share of ``count`` images, at least one, drawn at random, rising."""
    share = max(1, round(count * fraction))
    drawn = np.random.default_rng(derive_seed(seed, "detection_images")).permutation(count)
    return np.sort(drawn[:share])


def _weights_of_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, _NORMS):
            yield from module.parameters(recurse=False)
