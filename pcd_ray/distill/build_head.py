"""Heads that a run fits on its own images, and their files."""

import json
from collections.abc import Iterable

import safetensors.torch
import torch
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.config import Config, HeadFitConfig, config_to_values
from pcd_ray.distill.build_teacher import LoadedTeacher
from pcd_ray.distill.fitted_head import ContrastiveHead, contrastive_head, pca_head
from pcd_ray.distill.heads import head_from_state
from pcd_ray.distill.weights import read_weights, tensors_sha256
from pcd_ray.seeds import derive_seed

FITTED_HEADS = ("pca", "contrastive")
"""Kinds of heads that a run fits when it begins."""


def fit_pca_head(
    loaded: LoadedTeacher, batches: Iterable[Tensor], fit: HeadFitConfig
) -> nn.Sequential:
    """Fit the ``pca`` head on the teacher's own pixels of (B, S, S, 3) uint8 images."""
    with torch.inference_mode():
        pixels = [
            loaded.backbone(images).float().cpu().movedim(1, 3).flatten(0, 2) for images in batches
        ]
    return pca_head(torch.cat(pixels), dim=fit.dim, whiten=fit.whiten)


def fit_contrastive_head(
    loaded: LoadedTeacher,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    fit: HeadFitConfig,
    *,
    num_images: int,
    seed: int,
) -> ContrastiveHead:
    """Fit the ``contrastive`` head on the teacher's pooled features of views.

    Args:
        loaded: the teacher.
        batches: (B, S, S, 3) uint8 views, (B,) number of the view, (B,) number of the image; views
            from ``fit.views`` on are left out.
        fit: widths, steps and so on.
        num_images: images N, of each of which all views come.
        seed: root seed of the run.
    """
    features: Tensor | None = None  # (V, N, C)
    with torch.no_grad():
        for images, view, number in batches:
            pooled = loaded.backbone(images).float().mean((2, 3))  # (B, C)
            if features is None:
                features = pooled.new_zeros(fit.views, num_images, pooled.shape[1])
            kept = (view < fit.views).to(pooled.device)
            features[view.to(pooled.device)[kept], number.to(pooled.device)[kept]] = pooled[kept]
    assert features is not None
    return contrastive_head(
        features,
        hidden=fit.hidden,
        dim=fit.dim,
        temperature=fit.temperature,
        steps=fit.steps,
        seed=derive_seed(seed, "contrastive_head"),
    )


def stand_in_head(loaded: LoadedTeacher, fit: HeadFitConfig) -> nn.Sequential | None:
    """Return an untrained head of the fitted one's shape; None: nothing is to be fitted."""
    channels = int(loaded.backbone.body.num_features)  # type: ignore[arg-type]
    if loaded.identity.head == "pca":
        return nn.Sequential(nn.Linear(channels, fit.dim)).eval()
    if loaded.identity.head == "contrastive":
        layers = (nn.Linear(channels, fit.hidden), nn.BatchNorm1d(fit.hidden), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(fit.hidden, fit.dim)).eval()
    return None


def save_fitted_head(uri: str, head: nn.Sequential, config: Config, loaded: LoadedTeacher) -> None:
    """Store a fitted head with what it was fitted by."""
    metadata = {"fitted_by": fitted_by(config, loaded)}
    storage.write_bytes(uri, safetensors.torch.save(head.state_dict(), metadata=metadata))


def stored_head(uri: str, config: Config, loaded: LoadedTeacher) -> nn.Sequential | None:
    """Return the head that a run has fitted; None: there is none, or of other settings."""
    if not storage.exists(uri):
        return None
    file = read_weights(uri)
    if file.metadata.get("fitted_by") != fitted_by(config, loaded):
        return None
    return head_from_state(file.tensors)


def fitted_by(config: Config, loaded: LoadedTeacher) -> str:
    """Return all that a fitted head follows from besides the images."""
    return json.dumps(
        {
            "network": loaded.backbone.name,
            "kwargs": loaded.backbone.kwargs,
            "backbone_sha256": tensors_sha256(loaded.backbone),
            "recentred": loaded.backbone.recentred,
            "mean": (loaded.backbone.mean.flatten() / 255).tolist(),
            "std": (loaded.backbone.std.flatten() / 255).tolist(),
            "head": loaded.identity.head,
            "fit": config_to_values(loaded.options.fit),
            "augment": config_to_values(config.augment),
            "seed": config.run.seed,
        }
    )
