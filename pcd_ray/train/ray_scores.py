"""What networks score while a run trains: its student after epochs, others for comparison."""

from collections.abc import Sequence

from torch import nn

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.build import build_student
from pcd_ray.distill.step import Branch
from pcd_ray.distill.student import Student
from pcd_ray.evaluate.classify.classify_settings import contents_of
from pcd_ray.evaluate.classify.ray_knn import knn_scores
from pcd_ray.evaluate.eval_sets import KnnImages, open_knn_images, open_probe
from pcd_ray.evaluate.references import store_references, stored_references
from pcd_ray.evaluate.segment.segmentation import linear_probe_miou
from pcd_ray.evaluate.shared_scores import store_knn, stored_knn
from pcd_ray.progress import progress
from pcd_ray.ray_events import EventSender
from pcd_ray.train.ranks import Worker, from_rank_zero
from pcd_ray.train.state import average_batchnorm


class RunScores:
    """One worker's part of judging, on the sets of ``eval``."""

    def __init__(self, config: Config, worker: Worker, events: EventSender) -> None:
        self.config = config
        self.folder = RunFolder.of(config)
        self.worker = worker
        self.events = events
        with progress("opening the evaluation images"):
            self.knn_images = open_knn_images(config)
        for line in self.knn_images.left_out if self.knn_images else ():
            events.say(f"note: kNN: {line}")

    def of_epochs(self, student: Student, ended: Sequence[int]) -> dict[str, float]:
        """Return what the student scores where asked for after one of these epochs (from 1).

        Several epochs that end with one step have the same student; a collective.
        """
        config, scores = self.config, dict[str, float]()
        knn_every, probe_every = config.eval.every_epochs, config.eval.probe_every_epochs
        if knn_every and self.knn_images is not None and any(n % knn_every == 0 for n in ended):
            average_batchnorm(student)
            found = self._knn(student.backbone, "the student")
            scores |= {names.KNN_TOP1: found[max(found)], names.KNN1_TOP1: found[1]}
        if probe_every and any(n % probe_every == 0 for n in ended):
            average_batchnorm(student)
            scores[names.SEGMENTATION_MIOU] = self._probe(student.backbone)
        return scores

    def measure_references(self, branches: Sequence[Branch]) -> None:
        """Measure kNN of the teachers and of the untrained student, anew where ``eval`` changed."""
        if self.knn_images is None or not self.config.eval.every_epochs:
            return
        sets = contents_of(self.knn_images) if self.worker.rank == 0 else []
        known = stored_references(self.folder, self.config, sets) if sets else None
        if from_rank_zero(known) is not None:
            return
        found = {}
        for branch in branches:
            backbone = branch.teacher.backbone.to(self.worker.device)
            found[branch.name] = self._shared_knn(backbone, sets, f"the {branch.name}")
            if self.config.teachers[branch.name].cache.views:  # else it is needed there
                backbone.cpu()
        untrained = build_student(self.config, []).backbone.to(self.worker.device)
        found["untrained"] = self._shared_knn(untrained, sets, "the untrained student")
        if self.worker.rank == 0:
            store_references(self.folder, self.config, found, sets)
            listed = ", ".join(f"{branch.name} {found[branch.name]:.1f}%" for branch in branches)
            self.events.say(f"kNN top-1: {listed}, untrained student {found['untrained']:.1f}%")

    def _shared_knn(self, network: Backbone, sets: Sequence[str], name: str) -> float:
        """Return the kNN of a network that training does not change, maybe of another run."""
        zero = self.worker.rank == 0
        stored = stored_knn(self.config, network, sets) if zero else None
        found: dict[int, float] = from_rank_zero(stored) or self._knn(network, name)
        if zero and stored is None:
            store_knn(self.config, network, sets, found)
        return found[max(found)]

    def _probe(self, network: nn.Module) -> float:
        """Return the validation mIoU of a linear probe; rank 0 trains it, the others wait."""
        miou = None
        if self.worker.rank == 0:
            data = open_probe(self.config)
            assert data is not None  # the configuration demands it
            was_training = network.training
            with progress("linear probe of the student"):
                result = linear_probe_miou(network.eval(), data, seed=self.config.run.seed)
            network.train(was_training)
            miou = result.scores["val"].miou_pct
        return float(from_rank_zero(miou))

    def _knn(self, network: nn.Module, name: str) -> dict[int, float]:
        """Return top-1 in percent by number of neighbours; a collective."""
        assert isinstance(self.knn_images, KnnImages)
        was_training = network.training
        scores = knn_scores(
            network.eval(),
            self.knn_images,
            self.config,
            device=self.worker.device,
            rank=self.worker.rank,
            num_ranks=self.worker.num_ranks,
            name=name,
        )
        network.train(was_training)
        return scores
