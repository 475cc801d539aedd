"""Heads that are fitted when a run begins: a sample of its images through Ray Data, then the fit.

Shapes: B images, S pixels per side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pcd_ray.config import Config
from pcd_ray.data.plan import EpochPlan, RankPlan
from pcd_ray.data.ray_views import eval_batches, view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import Shards
from pcd_ray.distill.build_head import fit_contrastive_head, fit_pca_head
from pcd_ray.distill.build_teacher import LoadedTeacher
from pcd_ray.progress import counted
from pcd_ray.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head, and what there is to say of how well it fits; empty: nothing."""

    head: nn.Sequential
    remark: str = ""


def fitting_line(loaded: LoadedTeacher) -> str:
    """Return what is said before a head is fitted."""
    kind, dim = loaded.identity.head, loaded.options.fit.dim
    return f"fitting the {loaded.name}'s {dim}-wide {kind} head"


def fit_head(
    loaded: LoadedTeacher, shards: Shards, config: Config, *, device: torch.device
) -> FittedHead:
    """Fit the head that a teacher's identity names, on a sample of the run's images.

    Args:
        loaded: the teacher.
        shards: the run's images.
        config: the run.
        device: where the backbone computes.
    """
    fit = loaded.options.fit
    random = np.random.default_rng(derive_seed(config.run.seed, "head_fit"))
    rows = random.permutation(shards.num_images)[: fit.images]
    what = f"views for the {loaded.name}'s head"
    loaded.backbone.to(device)
    if loaded.identity.head == "pca":
        images = counted(_whole_images(shards, rows, config), what, "views", len(rows), size=len)
        found = FittedHead(fit_pca_head(loaded, (views.to(device) for views in images), fit))
    else:
        several = counted(
            _several_views(shards, rows, config, views=fit.views),
            what,
            "views",
            len(rows) * fit.views,
            size=lambda batch: len(batch[0]),
        )
        fitted = fit_contrastive_head(
            loaded,
            ((views.to(device), view, row) for views, view, row in several),
            fit,
            num_images=len(rows),
            seed=config.run.seed,
        )
        remark = f"the head finds {fitted.top1_pct:.0f}% of images by another view of them"
        found = FittedHead(fitted.head, remark)
    loaded.backbone.cpu()
    return found


def _whole_images(shards: Shards, rows: np.ndarray[Any, Any], config: Config) -> Iterator[Tensor]:
    """Yield centre crops (B, S, S, 3) of some images."""
    for views, _ in eval_batches(
        shards.index,
        rows,
        size_px=config.augment.image_size_px,
        batch_size=config.eval.images_per_forward,
        data=config.data,
    ):
        yield torch.from_numpy(views)


def _several_views(
    shards: Shards, rows: np.ndarray[Any, Any], config: Config, *, views: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield several training views (B, S, S, 3) of some images, each with its two numbers."""
    plan = EpochPlan(((len(rows), 1.0),), config.run.seed)  # its epochs are the views
    batch = config.eval.images_per_forward
    for host in view_batches(
        shards.index.take(pa.array(rows)),
        RankPlan(plan=plan, global_batch_size=batch, stop_step=plan.total_steps(views, batch)),
        recipe_from(config.augment, "same_view"),
        seed=derive_seed(config.run.seed, "head_fit"),
        data=config.data,
    ):
        yield (
            torch.from_numpy(host["student_view"]),
            torch.from_numpy(host["epoch"]),
            torch.from_numpy(host["row"]),
        )
