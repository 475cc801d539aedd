"""Networks to judge, by what a user calls them.

untrained                 the student as it was before training
untrained@SEED            another one, as ``run.seed=SEED`` would begin
teacher, teacher_2        a run's teachers
runs/pcd                  a run (its newest checkpoint) or one of its checkpoints
student.safetensors       an exported student, or any weights file that `train` takes as teacher
FILE@TIMM_NAME            the same, of a network that the file's keys do not tell
resnet18.a1_in1k          a timm name: its own pretrained weights
LABEL:A,B,C               several of them in one row, such as the seeds of one recipe
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pcd_ray import storage
from pcd_ray.checkpoint import Checkpoint, RunFolder, find_checkpoint
from pcd_ray.config import Config, StudentConfig, TeacherConfig, config_from_values
from pcd_ray.distill.backbones import Backbone, is_known
from pcd_ray.distill.build import build_student
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.teacher_parts import all_licences, take_apart
from pcd_ray.distill.weights import load_backbone, read_weights, tensors_sha256
from pcd_ray.errors import ConfigError, PcdError, WeightsError, naming
from pcd_ray.evaluate.judged_network import JudgedNetwork

UNTRAINED = "untrained"
_UNTRAINED = re.compile(rf"{UNTRAINED}(?:@(\d+))?")
_TEACHERS = ("teacher", "teacher_2")
_LABELLED = re.compile(r"([\w .+()-]+):(?!//)(.+)")
_BODY = "backbone.body."


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a comparison: networks that differ in their seed alone."""

    label: str
    networks: tuple[JudgedNetwork, ...]
    runs: tuple[str, ...]
    """Each one's run or checkpoint, where its neck is; empty: it is of none."""


def stored_config(specs: Sequence[str]) -> Config | None:
    """Return the options of the first run among what is to be judged; None: there is none.

    Raises:
        CheckpointError: that run has no whole checkpoint.
    """
    for spec in specs:
        for part in _parts(spec)[1]:
            if _is_run(part):
                return find_checkpoint(storage.absolute(part), with_state=False).config
    return None


def open_rows(specs: Sequence[str], config: Config) -> list[Row]:
    """Open everything that is to be judged.

    Args:
        specs: what users call it, as at the top of this module.
        config: whose ``student``, ``teacher`` and ``run.seed`` ``untrained`` and ``teacher`` mean.

    Raises:
        PcdError: one of them cannot be had; it is named.
    """
    rows: list[Row] = []
    for spec in specs:
        label, parts = _parts(spec)
        networks = []
        for part in parts:
            with naming(f"student {part!r}"):
                networks.append(_opened(part, config))
        _check_different(spec, parts, networks)
        label = label or (networks[0].label if len(networks) == 1 else _common_label(networks))
        taken = {row.label for row in rows}
        label = next(name for name in _numbered(label) if name not in taken)
        runs = tuple(part if _is_run(part) else "" for part in parts)
        rows.append(Row(label, tuple(replace(network, label=label) for network in networks), runs))
    return rows


def _check_different(spec: str, parts: Sequence[str], networks: Sequence[JudgedNetwork]) -> None:
    """Refuse a row that counts one network twice."""
    first: dict[str, str] = {}
    for part, network in zip(parts, networks, strict=True):
        if network.identity in first:
            raise ConfigError(
                f"student {spec!r}: {first[network.identity]} and {part} are the same network, "
                "which would count as two trainings; name different seeds of a recipe, such as "
                "untrained@1,untrained@2"
            )
        first[network.identity] = part


def _parts(spec: str) -> tuple[str, list[str]]:
    """Return the label that a user gave, and the networks of the row."""
    match = None if storage.exists(storage.absolute(spec)) else _LABELLED.fullmatch(spec)
    label, rest = (match[1].strip(), match[2]) if match else ("", spec)
    parts = [part for part in rest.split(",") if part]
    if not parts:
        raise ConfigError(f"student {spec!r} names no network; give a run, a file or a timm name")
    return label, parts


def _common_label(networks: Sequence[JudgedNetwork]) -> str:
    labels = [network.label for network in networks]
    shared = labels[0]
    while not all(label.startswith(shared) for label in labels):
        shared = shared[:-1]
    return shared.rstrip("0123456789").rstrip("_-.@ ") or labels[0]


def _numbered(label: str) -> Sequence[str]:
    return [label, *(f"{label} ({number})" for number in range(2, 1000))]


def _opened(spec: str, config: Config) -> JudgedNetwork:
    if untrained := _UNTRAINED.fullmatch(spec):
        return _untrained(spec, int(untrained[1] or config.run.seed), config)
    if spec in _TEACHERS:
        return _of_teacher(spec, config)
    if _is_run(spec):
        return _of_checkpoint(find_checkpoint(storage.absolute(spec)))
    file, _, arch = spec.rpartition("@")
    if not (file and is_known(arch)):
        file, arch = spec, ""
    if storage.exists(storage.absolute(file)):
        return _of_file(storage.absolute(file), arch)
    if is_known(spec):
        return _published(spec, TeacherConfig(arch=spec, head="none"))
    raise PcdError("is no run, no file and no timm name; give one of these, untrained, or teacher")


def _is_run(spec: str) -> bool:
    reserved = spec in _TEACHERS or _UNTRAINED.fullmatch(spec)
    return not reserved and storage.is_folder(storage.absolute(spec))


def _untrained(label: str, seed: int, config: Config) -> JudgedNetwork:
    begun = replace(config, run=replace(config.run, seed=seed))
    return _of_student(label, config.student, begun, source=f"seed {seed}")


def _of_student(
    label: str,
    student: StudentConfig,
    config: Config,
    *,
    source: str,
    weights: dict[str, Tensor] | None = None,
) -> JudgedNetwork:
    """Return a student's backbone: untrained, or with the weights given."""
    backbone = build_student(replace(config, student=student), []).backbone
    if weights is not None:
        load_backbone(backbone, weights, uri=source)
    return JudgedNetwork(
        label=label,
        timm_name=student.backbone,
        kwargs=student.kwargs,
        output_stride=student.output_stride,
        source=source,
        **_facts(backbone),
    )


def _of_checkpoint(stored: Checkpoint) -> JudgedNetwork:
    weights = {
        key.removeprefix(_BODY): value
        for key, value in stored.student_weights().items()
        if key.startswith(_BODY)
    }
    above = storage.parent(stored.uri)
    run = RunFolder(storage.parent(above)).uri if storage.name_of(above) == "checkpoints" else above
    return replace(
        _of_student(
            storage.name_of(run),
            stored.config.student,
            stored.config,
            source=f"{stored.uri}, step {stored.about['step']}",
            weights=weights,
        ),
        licence=all_licences(str(stored.about[name]["licence"]) for name in stored.config.teachers),
    )


def _of_file(uri: str, arch: str) -> JudgedNetwork:
    file = read_weights(uri)
    label = storage.name_of(uri).rpartition(".")[0] or storage.name_of(uri)
    said = file.metadata
    if not str(said.get("made_by", "")).startswith("pcd_ray") or "config" not in said:
        parts = take_apart(file)
        network = parts.network
        if not arch and parts.foreign:
            raise WeightsError(f"{uri} {parts.foreign}")
        if not arch and isinstance(network, str):
            raise WeightsError(
                f"{uri} does not say its network: {network}; write {uri}@TIMM_NAME, such as "
                f"{storage.name_of(uri)}@resnet18"
            )
        published = _published(label, TeacherConfig(arch=arch, weights=uri, head="none"))
        return replace(published, source=uri)  # files of one name lie in several folders
    config = _exported_config(uri, said["config"])
    student = _of_student(label, config.student, config, source=uri, weights=file.tensors)
    licences = (str(said.get(f"{name}_licence", "")) for name in config.teachers)
    return replace(student, licence=all_licences(licences))


def _exported_config(uri: str, text: str) -> Config:
    """Return the options of an exported student.

    Raises:
        WeightsError: they are damaged, or of another version.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise WeightsError(
            f"{uri}: 'config' in its metadata is no JSON object ({text[:40]!r} ...); export the "
            "student again"
        )
    try:
        return config_from_values(values)
    except ConfigError as error:
        raise WeightsError(
            f"{uri}: the configuration in its metadata does not suit this version of pcd_ray "
            f"({' '.join(str(error).splitlines())}); use the version that exported it, or export "
            "the student again"
        ) from error


def _of_teacher(name: str, config: Config) -> JudgedNetwork:
    if name not in config.teachers:
        raise ConfigError(f"there is no {name}; give its options, or leave it out")
    return _published(name, config.teachers[name])


def _published(label: str, teacher: TeacherConfig) -> JudgedNetwork:
    loaded = load_teacher(teacher)
    return JudgedNetwork(
        label=label,
        timm_name=loaded.backbone.name,
        kwargs=loaded.backbone.kwargs,
        published=True,
        recentred=loaded.backbone.recentred,
        source=loaded.identity.source,
        licence=loaded.identity.licence,
        **_facts(loaded.backbone),
    )


def _facts(backbone: Backbone) -> dict[str, Any]:
    return {
        "mean": tuple((backbone.mean.flatten() / 255).tolist()),
        "std": tuple((backbone.std.flatten() / 255).tolist()),
        "weights": {k: v.detach() for k, v in backbone.body.state_dict().items()},
        "sha256": tensors_sha256(backbone),
    }
