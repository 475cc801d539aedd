"""The student file that others load: a backbone as safetensors under timm's own names.

model = timm.create_model("resnet18", num_classes=0)
model.load_state_dict(safetensors.torch.load_file("resnet18.safetensors"), strict=True)

Further arguments of ``create_model`` that a network needs stand in the file's ``timm_kwargs``.
Where ``timm_tap`` holds a number, the student is the network up to that stage, what lies behind it
has not been trained, and its map is

model.forward_intermediates(images, indices=[tap], stop_early=True, intermediates_only=True)[0]
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.checkpoint import Checkpoint, RunFolder, find_checkpoint
from pcd_ray.config import ExportConfig, config_to_values
from pcd_ray.distill.backbones import kwargs_for_stride

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
    weights: str
    """``ema`` or ``raw``: whether they are the student's moving average."""
    parameters: int
    step: int
    metadata: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)

    def overview(self) -> dict[str, Any]:
        """Return where the files are and how to load the backbone, without the metadata."""
        return {k: v for k, v in self.summary().items() if k != "metadata"} | {
            "load": self.snippet()
        }

    def snippet(self) -> str:
        """Return the Python that loads the backbone; a file in a bucket is to be copied first."""
        kwargs = json.loads(self.metadata["timm_kwargs"])
        arguments = "".join(f", {name}={value!r}" for name, value in kwargs.items())
        file = storage.name_of(self.path) if storage.is_remote(self.path) else self.path
        lines = [
            "import safetensors.torch, timm",
            f"model = timm.create_model({self.backbone!r}, num_classes=0{arguments})",
            f"model.load_state_dict(safetensors.torch.load_file({file!r}))",
        ]
        if tap := self.metadata["timm_tap"]:
            lines.append(
                f"# trained up to stage {tap}: model.forward_intermediates(images, "
                f"indices=[{tap}], stop_early=True, intermediates_only=True)[0]"
            )
        return "\n".join(lines)


def export(run: str, export_config: ExportConfig | None = None) -> ExportResult:
    """Write the student's backbone of a run or checkpoint, with where it comes from.

    Args:
        run: a run's folder (its newest checkpoint is taken) or a checkpoint's.
        export_config: where to write and what; None: as the run's own configuration says.

    Raises:
        CheckpointError: there is no whole checkpoint.
        StorageError: the file cannot be written.
    """
    stored = find_checkpoint(storage.absolute(run))
    return export_checkpoint(stored, export_config or stored.config.export)


def export_checkpoint(stored: Checkpoint, options: ExportConfig) -> ExportResult:
    """Write the student's backbone of a checkpoint that has been read.

    Raises:
        StorageError: the file cannot be written.
    """
    name = stored.about["student"]["backbone"]
    path = storage.absolute(options.path or _default_path(stored, name))
    folder = storage.parent(path)
    kind = "ema" if stored.has_average and options.weights != "raw" else "raw"
    student = stored.student_weights(options.weights)
    metadata = _metadata(stored, kind)
    weights = _contiguous(_part(student, _BACKBONE))
    storage.write_bytes(path, safetensors.torch.save(weights, metadata=metadata))
    neck_path = ""
    if options.keep_neck:
        file = storage.name_of(path).removesuffix(".safetensors")
        neck_path = storage.join(folder, f"{file}_mhsa.safetensors")
        neck = _contiguous(_part(student, _NECK))
        storage.write_bytes(neck_path, safetensors.torch.save(neck, metadata=metadata))
    result = ExportResult(
        path=path,
        neck_path=neck_path,
        backbone=name,
        weights=kind,
        parameters=sum(p.numel() for p in student_of(stored).parameters()),
        step=int(stored.about["step"]),
        metadata=metadata,
    )
    storage.write_text(_summary_path(path), json.dumps(result.summary(), indent=2))
    return result


def student_of(stored: Checkpoint) -> nn.Module:
    """Return a checkpoint's backbone as a timm model without classifier, in eval mode.

    It is what is judged: the moving average where there is one. A student that is tapped at an
    earlier stage comes without what lies behind it, and gives a list of its one map, as timm's
    ``features_only`` does.
    """
    kwargs, tap = _timm_kwargs(stored)
    model: nn.Module = timm.create_model(stored.config.student.backbone, num_classes=0, **kwargs)
    model.load_state_dict(_part(stored.student_weights(), _BACKBONE), strict=True)
    if tap is not None:
        model = FeatureGetterNet(model, out_indices=(tap,))
    return model.eval()


def _timm_kwargs(stored: Checkpoint) -> tuple[dict[str, Any], int | None]:
    """Return what timm needs to take the weights strictly, and the stage that is tapped.

    Besides the name and ``num_classes=0``. Some networks (BEiT, EVA-02) keep a norm elsewhere when
    they pool: without their classifier their weights fit the unpooled form alone.
    """
    options = stored.config.student
    kwargs, tap = kwargs_for_stride(options.backbone, options.kwargs, options.output_stride)
    with torch.device("meta"):  # names are wanted, no memory
        pooled = timm.create_model(options.backbone, num_classes=0, **kwargs)
    if pooled.state_dict().keys() == _part(stored.student_weights(), _BACKBONE).keys():
        return dict(kwargs), tap
    return {**kwargs, "global_pool": ""}, tap


def _summary_path(path: str) -> str:
    """Return ``summary.json`` beside the file; with its name in front where that is another's."""
    usual = storage.join(storage.parent(path), "summary.json")
    if not storage.exists(usual):
        return usual
    try:
        theirs = json.loads(storage.read_text(usual)).get("path")
    except (json.JSONDecodeError, AttributeError, storage.NotTextError):
        theirs = None
    stem = storage.name_of(path).removesuffix(".safetensors")
    return usual if theirs == path else storage.join(storage.parent(path), f"{stem}.summary.json")


def _default_path(stored: Checkpoint, name: str) -> str:
    """Return a file in the run's folder; in the checkpoint's own when it was taken out of a run."""
    run = _run_of(stored)
    folder = storage.join(run.uri if run else stored.uri, "exported")
    return storage.inside(folder, f"{name}.safetensors")


def _run_of(stored: Checkpoint) -> RunFolder | None:
    above = storage.parent(stored.uri)
    return RunFolder(storage.parent(above)) if storage.name_of(above) == "checkpoints" else None


def _scores(stored: Checkpoint) -> dict[str, Any]:
    """Return the student's scores by which its run was judged at this very step, if it was."""
    run = _run_of(stored)
    summary = run.file("summary.json") if run else ""
    if not run or not storage.exists(summary):
        return {}
    try:
        judged = json.loads(storage.read_text(summary))
        if judged["step"] != stored.about["step"]:
            return {}
        return {
            k: v["student"] for k, v in judged.items() if isinstance(v, dict) and "student" in v
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, storage.NotTextError):
        return {}  # another program's file


def _part(student: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): value for k, value in student.items() if k.startswith(prefix)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay weights out row by row, as safetensors stores them: channels-last ones are not."""
    return {key: value.contiguous() for key, value in tensors.items()}


def _metadata(stored: Checkpoint, kind: str) -> dict[str, str]:
    about, student = stored.about, stored.about["student"]
    kwargs, tap = _timm_kwargs(stored)
    metrics = about["metrics"] | _scores(stored)
    if stored.has_average and kind == "raw":  # what was judged is the moving average
        metrics = {k: v for k, v in about["metrics"].items() if not k.startswith("eval/")}
    teachers: dict[str, str] = {}
    for name in stored.config.teachers:
        identity = about[name]
        teachers |= {
            name: identity["source"],
            f"{name}_arch": identity["arch"],
            f"{name}_licence": identity["licence"],
            f"{name}_sha256": identity["sha256"],
        }
    return teachers | {
        "format": "pt",
        "made_by": f"pcd_ray {about['version']}",
        "timm_name": student["backbone"],
        "timm_kwargs": json.dumps(kwargs),
        "timm_tap": "" if tap is None else str(tap),
        "weights": kind,
        "mean": json.dumps(student["mean"]),
        "std": json.dumps(student["std"]),
        "data_sha256": about["data_sha256"],
        "checkpoint_sha256": about["state_sha256"],
        "step": str(about["step"]),
        "metrics": json.dumps(metrics),
        "config": json.dumps(config_to_values(stored.config)),
    }
