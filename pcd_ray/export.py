"""The student file that others load: a backbone as safetensors under timm's own names.

model = timm.create_model("resnet18", num_classes=0)
model.load_state_dict(safetensors.torch.load_file("resnet18.safetensors"), strict=True)
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import timm
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.checkpoint import Checkpoint, find_checkpoint
from pcd_ray.config import ExportConfig, config_to_values

_BACKBONE = "backbone.body."
_NECK = "neck."


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written."""

    path: str
    """The backbone's file."""
    neck_path: str
    """The neck's file; empty: not asked for."""
    backbone: str
    """timm model name."""
    parameters: int
    step: int
    metadata: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)


def export(run: str, export_config: ExportConfig | None = None) -> ExportResult:
    """Write the student's backbone of a run or checkpoint, with where it comes from.

    Args:
        run: a run's folder (its newest checkpoint is taken) or a checkpoint's.
        export_config: where to write and what; default: into the run's ``exported`` folder.

    Raises:
        CheckpointError: there is no whole checkpoint.
        StorageError: the file cannot be written.
    """
    options: ExportConfig = export_config or ExportConfig()
    stored = find_checkpoint(storage.absolute(run))
    name = stored.about["student"]["backbone"]
    path = storage.absolute(options.path or _default_path(stored, name))
    folder = storage.parent(path)
    metadata = _metadata(stored)
    weights = _contiguous(_part(stored, _BACKBONE))
    storage.write_bytes(path, safetensors.torch.save(weights, metadata=metadata))
    neck_path = ""
    if options.keep_neck:
        file = storage.name_of(path).removesuffix(".safetensors")
        neck_path = storage.join(folder, f"{file}_mhsa.safetensors")
        neck = _contiguous(_part(stored, _NECK))
        storage.write_bytes(neck_path, safetensors.torch.save(neck, metadata=metadata))
    result = ExportResult(
        path=path,
        neck_path=neck_path,
        backbone=name,
        parameters=sum(p.numel() for p in student_of(stored).parameters()),
        step=int(stored.about["step"]),
        metadata=metadata,
    )
    storage.write_text(storage.join(folder, "summary.json"), json.dumps(result.summary(), indent=2))
    return result


def student_of(stored: Checkpoint) -> nn.Module:
    """Return a checkpoint's backbone as a timm model without classifier, in eval mode."""
    options = stored.config.student
    model: nn.Module = timm.create_model(options.backbone, num_classes=0, **options.kwargs)
    model.load_state_dict(_part(stored, _BACKBONE), strict=True)
    return model.eval()


def _default_path(stored: Checkpoint, name: str) -> str:
    """Return a file in the run's folder; in the checkpoint's own when it was taken out of a run."""
    above = storage.parent(stored.uri)
    in_run = storage.name_of(above) == "checkpoints"
    folder = storage.parent(above) if in_run else stored.uri
    return storage.join(folder, "exported", f"{name}.safetensors")


def _part(stored: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in stored.state["student"].items()
        if key.startswith(prefix)
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay weights out row by row, as safetensors stores them: channels-last ones are not."""
    return {key: value.contiguous() for key, value in tensors.items()}


def _metadata(stored: Checkpoint) -> dict[str, str]:
    about, student = stored.about, stored.about["student"]
    return {
        "format": "pt",
        "made_by": f"pcd_ray {about['version']}",
        "timm_name": student["backbone"],
        "timm_kwargs": json.dumps(stored.config.student.kwargs),
        "mean": json.dumps(student["mean"]),
        "std": json.dumps(student["std"]),
        "teacher": about["teacher"]["source"],
        "teacher_arch": about["teacher"]["arch"],
        "teacher_licence": about["teacher"]["licence"],
        "teacher_sha256": about["teacher"]["sha256"],
        "data_sha256": about["data_sha256"],
        "checkpoint_sha256": about["state_sha256"],
        "step": str(about["step"]),
        "metrics": json.dumps(about["metrics"]),
        "config": json.dumps(config_to_values(stored.config)),
    }
