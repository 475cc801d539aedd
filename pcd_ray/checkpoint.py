"""A run on storage: its folder, and checkpoints that are whole or not there.

A checkpoint is a folder ``step_00001234`` with ``state.pt`` (student, its moving average where one
is kept, optimiser, queues, step, audit: plain tensors and numbers), ``config.yaml`` (all options)
and, written last, ``checkpoint.json`` (format, step, teachers, hash of the state): a folder without
one does not count, and one that cannot be read is damaged, for it is written whole.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config, config_from_values, parse_yaml, to_yaml
from pcd_ray.errors import CheckpointError, ConfigError
from pcd_ray.metric_names import SCORES

FORMAT = 2
"""1 had one head and one queue: written before a student could have two teachers."""
BEST = "best"
"""``RUN/best`` is the checkpoint of a run that scored best."""
_MARK = "checkpoint.json"
_MARKED = re.compile(rf"/step_(\d+)/{re.escape(_MARK)}$")


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or not what was written: an older one may do."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names inside a run's output folder."""

    uri: str

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """Return the folder of a run, ``run.root/run.name``."""
        return cls(storage.join(storage.absolute(config.run.root), config.run.name))

    def file(self, *parts: str) -> str:
        """Return the URI of a file in the folder."""
        return storage.join(self.uri, *parts)

    @property
    def checkpoints(self) -> str:
        """URI of the folder that holds the checkpoints."""
        return self.file("checkpoints")

    def fitted_head(self, teacher: str) -> str:
        """Return the URI of a teacher's fitted head, by the name of the teacher's section.

        It is part of the run, which must not fit another later.
        """
        return self.file(f"{teacher}_head.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint, checked against its hash."""

    uri: str
    state: dict[str, Any]
    about: dict[str, Any]
    """What ``checkpoint.json`` says: step, epoch, teacher, metrics, versions."""
    config: Config
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """URI of each newer checkpoint of the run that was found damaged -> what is wrong with it."""

    @property
    def has_average(self) -> bool:
        """Whether it holds a moving average of the student."""
        return "average" in self.state

    def student_weights(self, kind: str = "auto") -> dict[str, Tensor]:
        """Return the student's weights.

        Args:
            kind: ``ema``, the moving average; ``raw``, the student itself; ``auto``, what is
                judged: the moving average where there is one.

        Raises:
            CheckpointError: there is no moving average.
        """
        if kind == "ema" and not self.has_average:
            raise CheckpointError(
                f"export.weights=ema, but {self.uri} holds no moving average; take "
                "export.weights=auto, or train with student.ema"
            )
        weights: dict[str, Tensor] = self.state[
            "average" if self.has_average and kind != "raw" else "student"
        ]
        return weights


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step; names sort as steps do."""
    return f"step_{step:08d}"


def to_host(value: Any) -> Any:
    """Return a deep copy of nested state with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value


def save_checkpoint(
    uri: str, state: dict[str, Any], about: Mapping[str, Any], config: Config
) -> None:
    """Write a checkpoint folder; it counts once its last file is there.

    Raises:
        StorageError: no space or no permission; older checkpoints are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    storage.write_bytes(storage.join(uri, "state.pt"), data)
    storage.write_text(storage.join(uri, "config.yaml"), to_yaml(config))
    content = {**about, "format": FORMAT, "state_sha256": hashlib.sha256(data).hexdigest()}
    storage.write_text(storage.join(uri, _MARK), json.dumps(content, indent=2))


def load_checkpoint(uri: str) -> Checkpoint:
    """Read a checkpoint folder and check its hash.

    Raises:
        CheckpointError: it is no checkpoint, incomplete, damaged, or of another format.
    """
    if not storage.exists(storage.join(uri, _MARK)):
        raise CheckpointError(
            f"{uri} is no complete checkpoint (no checkpoint.json); give a step_* folder of a run"
        )
    about = _about(uri)
    if about is None:
        raise DamagedCheckpointError(f"{uri}: checkpoint.json is damaged; use an older step")
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{uri} has checkpoint format {about.get('format')}, this version reads {FORMAT} "
            "(since 2 with a head and a queue for each teacher); use the version of pcd_ray that "
            "wrote it"
        )
    data = _read(uri, "state.pt")
    if hashlib.sha256(data).hexdigest() != about.get("state_sha256"):
        raise DamagedCheckpointError(
            f"{uri}: state.pt is damaged (its hash differs); use an older step"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no torch file fail in any way
        raise DamagedCheckpointError(f"{uri}: state.pt cannot be read ({error})") from error
    return Checkpoint(uri, state, about, _config(uri))


def checkpoint_steps(folder: RunFolder) -> list[int]:
    """Return the steps of all checkpoints of a run that were completed, ascending.

    Some of them may be damaged since.
    """
    paths = [storage.split_query(file.uri)[0] for file in storage.list_files(folder.checkpoints)]
    found = (_MARKED.search(path) for path in paths)
    return sorted(int(match[1]) for match in found if match)


def latest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run; damaged ones are passed over.

    Raises:
        CheckpointError: it is of another format, or none is whole: passing over what is there
            would start the run anew.
    """
    damaged: dict[str, str] = {}
    for step in reversed(checkpoint_steps(folder)):
        uri = storage.join(folder.checkpoints, checkpoint_name(step))
        try:
            return replace(load_checkpoint(uri), passed_over=damaged)
        except DamagedCheckpointError as error:
            damaged[uri] = str(error)
    if damaged:
        story = next(iter(damaged.values()))
        raise CheckpointError(
            f"{folder.uri}: none of its checkpoints is whole ({story}); delete its "
            "checkpoints folder to start anew, or choose another place"
        )
    return None


def best_steps(folder: RunFolder, score: str) -> list[int]:
    """Return the steps of checkpoints at which this score was measured, the best first.

    Of equals the older comes first: it took fewer steps. What a checkpoint was not scored with
    itself, its metrics hold as it was measured last.

    Args:
        folder: the run's.
        score: name of the metric, of which more is better.
    """
    scores = {}
    for step in checkpoint_steps(folder):
        about = _about(storage.join(folder.checkpoints, checkpoint_name(step))) or {}
        metrics, scored = about.get("metrics"), about.get("scored")
        own = scored is True or (isinstance(scored, list) and score in scored)  # True: of old
        value = metrics.get(score) if isinstance(metrics, dict) and own else None
        if isinstance(value, int | float):
            scores[step] = value
    return sorted(scores, key=lambda step: (-scores[step], step))


def prune_checkpoints(
    folder: RunFolder,
    *,
    written: int,
    keep_last: int,
    keep_best: tuple[int, str] = (0, ""),
    damaged: Iterable[str] = (),
) -> None:
    """Delete what a checkpoint that has just been written makes superfluous.

    Args:
        folder: the run's.
        written: step of the new checkpoint. What lies beyond it may be damaged, and counts for
            nothing: it would take the place of a good one.
        keep_last: how many checkpoints stay, the new one among them; one whose mark is damaged
            takes nobody's place.
        keep_best: how many of the best stay besides, and by which score.
        damaged: URIs that were passed over when the run resumed; one that has been written anew
            stays.
    """
    for uri in damaged:
        if storage.name_of(uri) != checkpoint_name(written):
            storage.delete_folder(uri)
    steps = [
        step
        for step in checkpoint_steps(folder)
        if step <= written and _about(storage.join(folder.checkpoints, checkpoint_name(step)))
    ]
    count, score = keep_best
    best = [step for step in best_steps(folder, score) if step <= written] if count else []
    for step in steps[:-keep_last]:
        if step not in best[:count]:
            storage.delete_folder(storage.join(folder.checkpoints, checkpoint_name(step)))


def find_checkpoint(uri: str) -> Checkpoint:
    """Return a checkpoint by its own folder, the newest one of a run's folder, or ``RUN/best``.

    Raises:
        CheckpointError: none of these.
    """
    if storage.exists(storage.join(uri, _MARK)):
        return load_checkpoint(uri)
    if storage.name_of(uri) == BEST and not storage.exists(uri):
        return _best_checkpoint(RunFolder(storage.parent(storage.absolute(uri))))
    found = latest_checkpoint(RunFolder(storage.absolute(uri)))
    if found is None:
        raise CheckpointError(
            f"{uri} holds no complete checkpoint; give a run's folder or one of its step_* folders"
        )
    return found


def _best_checkpoint(folder: RunFolder) -> Checkpoint:
    """Return the checkpoint that scored best, by the run's own ``train.keep_best_by``."""
    newest = find_checkpoint(folder.uri)
    by = newest.config.train.keep_best_by
    for step in best_steps(folder, SCORES[by]):
        with contextlib.suppress(DamagedCheckpointError):
            return load_checkpoint(storage.join(folder.checkpoints, checkpoint_name(step)))
    raise CheckpointError(
        f"{folder.uri} holds no checkpoint with a score of its own (train.keep_best_by={by}); "
        "leave out /best for the newest, or train with train.keep_best"
    )


def _config(uri: str) -> Config:
    try:
        values = dict(parse_yaml(_read(uri, "config.yaml").decode()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{uri}: config.yaml is damaged ({error})") from error
    try:
        return config_from_values(values)
    except ConfigError as error:  # not damaged: passing it over would lose the run
        raise CheckpointError(
            f"{uri}: config.yaml does not suit this version of pcd_ray ({error}); "
            "use the version that wrote it"
        ) from error


def _read(uri: str, name: str) -> bytes:
    file = storage.join(uri, name)
    if not storage.exists(file):  # a storage that fails is another matter, and is not passed over
        raise DamagedCheckpointError(f"{uri}: {name} is missing; use an older step")
    return storage.read_bytes(file)


def _about(uri: str) -> dict[str, Any] | None:
    """Return what a checkpoint's mark says; None: there is none, or it is damaged."""
    mark = storage.join(uri, _MARK)
    try:
        content = storage.parse_json(storage.read_text(mark)) if storage.exists(mark) else None
    except (ValueError, storage.NotTextError):
        return None
    return content if isinstance(content, dict) and "format" in content else None
