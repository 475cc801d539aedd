"""A run on storage: its folder, and checkpoints that are whole or not there.

A checkpoint is a folder ``step_00001234`` with ``state-<hash>.pt`` (student, its moving average
where one is kept, optimizer, queues, step, audit: plain tensors and numbers), named by its content,
and, written last, ``checkpoint.json`` (format, step, teachers, hash of the state, all options): a
folder without one does not count, and one that cannot be read is damaged, for it is written whole.
"""

import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config, changed_options, config_from_values, config_to_values
from pcd_ray.errors import CheckpointError, ConfigError
from pcd_ray.metric_names import SCORES

FORMAT = 3
"""2 had ``state.pt`` and ``config.yaml``; 1 had one head and one queue."""
BEST = "best"
"""``RUN/best`` is the checkpoint of a run that scored best."""
_MARK = "checkpoint.json"
_MARKED = re.compile(rf"/step_(\d+)/{re.escape(_MARK)}$")
_STATE = re.compile(r"/step_(\d+)/state-[0-9a-f]{8}\.pt$")
_BROADCAST_BYTES = 2**26  # at a time: on a GPU they take memory from the training


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


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; its state is read when it is asked for."""

    uri: str
    about: dict[str, Any]
    """What ``checkpoint.json`` says: step, epoch, teacher, metrics, versions."""
    config: Config
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """URI of each newer checkpoint of the run that was found damaged -> what is wrong with it."""

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """The state, checked against its hash.

        Raises:
            DamagedCheckpointError: its file is missing or damaged.
        """
        sha256 = self.about["state_sha256"]
        name = _state_file(sha256)
        file = storage.join(self.uri, name)
        if not storage.exists(file):  # storage that fails is another matter, and not passed over
            raise DamagedCheckpointError(f"{self.uri}: {name} is missing; use an older step")
        data = storage.read_bytes(file)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedCheckpointError(
                f"{self.uri}: {name} is damaged (its hash differs); use an older step"
            )
        try:
            return _parse_state(io.BytesIO(data))
        except Exception as error:  # bytes that are no torch file fail in any way
            raise DamagedCheckpointError(f"{self.uri}: {name} cannot be read ({error})") from error

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
    sha256 = hashlib.sha256(data).hexdigest()
    storage.write_bytes(storage.join(uri, _state_file(sha256)), data)
    content = {
        **about,
        "format": FORMAT,
        "state_sha256": sha256,
        "config": config_to_values(config),
    }
    storage.write_text(storage.join(uri, _MARK), json.dumps(content, indent=2))


def load_checkpoint(uri: str) -> Checkpoint:
    """Read what a checkpoint says of itself; its state is read when it is asked for.

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
            "(since 3 the state's file is named by its content); use the version of pcd_ray that "
            "wrote it"
        )
    try:
        config = config_from_values(about.pop("config"))
    except ConfigError as error:  # not damaged: passing it over would lose the run
        raise CheckpointError(
            f"{uri}: its options do not suit this version of pcd_ray ({error}); "
            "use the version that wrote it"
        ) from error
    return Checkpoint(uri, about, config)


def checkpoint_from_rank_zero(found: Checkpoint | None, device: torch.device) -> Checkpoint | None:
    """Return rank 0's checkpoint on all ranks, of which the others read no file; a collective.

    Args:
        found: of rank 0, with its state; None: there is none. Of no account on other ranks.
        device: what the ranks communicate from.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    data, is_zero = io.BytesIO(), dist.get_rank() == 0
    box: list[Any] = [None]
    if is_zero and found is not None:
        torch.save(found.state, data)
        values = config_to_values(found.config)
        box = [(found.uri, found.about, values, dict(found.passed_over), data.tell())]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return None
    uri, about, values, passed_over, size = box[0]
    state = torch.empty(size, dtype=torch.uint8)
    if is_zero:
        state = torch.frombuffer(data.getbuffer(), dtype=torch.uint8)
    for piece in state.split(_BROADCAST_BYTES):
        sent = piece.to(device)
        dist.broadcast(sent, src=0)
        piece.copy_(sent)
    if is_zero:
        return found
    received = Checkpoint(uri, about, config_from_values(values), passed_over)
    vars(received)["state"] = _parse_state(io.BytesIO(state.numpy().tobytes()))
    return received


def check_same_run(config: Config, stored: Checkpoint, *, data_sha256: str) -> None:
    """Refuse to continue a run whose settings or data have changed.

    Args:
        config: of the run now; with ``run.allow_changes`` nothing is refused.
        stored: its checkpoint.
        data_sha256: content hash of the packed images now.

    Raises:
        CheckpointError: names what has changed.
    """
    changes = changed_options(stored.config, config)
    if stored.about["data_sha256"] != data_sha256:
        changes.append(f"data.shards: the packed images at {config.data.shards} are others")
    if changes and not config.run.allow_changes:
        raise changed_run(stored, changes)


def changed_run(stored: Checkpoint, changes: Iterable[str]) -> CheckpointError:
    """Return the error of a run that cannot be continued with these changes."""
    listed = "\n  ".join(changes)
    folder = storage.parent(storage.parent(stored.uri))
    return CheckpointError(
        f"{folder} holds a run at step {stored.about['step']} with other settings:\n"
        f"  {listed}\nchoose another run.name, set these back, or set run.allow_changes=true"
    )


def checkpoint_steps(folder: RunFolder) -> list[int]:
    """Return the steps of all checkpoints of a run that were completed, ascending.

    Some of them may be damaged since.
    """
    paths = [storage.split_query(file.uri)[0] for file in storage.list_files(folder.checkpoints)]
    found = (_MARKED.search(path) for path in paths)
    return sorted(int(match[1]) for match in found if match)


def latest_checkpoint(folder: RunFolder, *, with_state: bool = True) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run; damaged ones are passed over.

    Args:
        folder: the run's.
        with_state: read the state as well, and pass over checkpoints of which it is damaged.

    Raises:
        CheckpointError: it is of another format, or none is whole: passing over what is there
            would start the run anew.
    """
    damaged: dict[str, str] = {}
    for step in reversed(checkpoint_steps(folder)):
        uri = storage.join(folder.checkpoints, checkpoint_name(step))
        try:
            found = replace(load_checkpoint(uri), passed_over=damaged)
            if with_state:
                _ = found.state
            return found
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
    marks = {
        step: _about(storage.join(folder.checkpoints, checkpoint_name(step)))
        for step in checkpoint_steps(folder)
        if step <= written
    }
    steps = [step for step, about in marks.items() if about]
    count, score = keep_best
    best = [step for step in best_steps(folder, score) if step <= written] if count else []
    for step in steps[:-keep_last]:
        if step not in best[:count]:
            storage.delete_folder(storage.join(folder.checkpoints, checkpoint_name(step)))
    _delete_leftovers(folder, marks, written)


def _delete_leftovers(
    folder: RunFolder, marks: Mapping[int, Mapping[str, Any] | None], written: int
) -> None:
    """Delete states of earlier steps that no mark names: their writer died, or wrote them anew."""
    for file in storage.list_files(folder.checkpoints):
        path = storage.split_query(file.uri)[0]
        match = _STATE.search(path)
        if match is None or int(match[1]) >= written:
            continue
        about = marks.get(int(match[1]), {})  # None: damaged, and so left alone
        if about is not None and path.rpartition("/")[2] != _state_file(
            about.get("state_sha256", "")
        ):
            storage.delete_file(file.uri)


def find_checkpoint(uri: str, *, with_state: bool = True) -> Checkpoint:
    """Return a checkpoint by its own folder, the newest one of a run's folder, or ``RUN/best``.

    Args:
        uri: one of these.
        with_state: as `latest_checkpoint`.

    Raises:
        CheckpointError: none of these.
    """
    if storage.exists(storage.join(uri, _MARK)):
        found: Checkpoint | None = load_checkpoint(uri)
    elif storage.name_of(uri) == BEST and not storage.exists(uri):
        found = _best_checkpoint(RunFolder(storage.parent(storage.absolute(uri))))
    else:
        found = latest_checkpoint(RunFolder(storage.absolute(uri)), with_state=with_state)
    if found is None:
        raise CheckpointError(
            f"{uri} holds no complete checkpoint; give a run's folder or one of its step_* folders"
        )
    if with_state:
        _ = found.state
    return found


def _best_checkpoint(folder: RunFolder) -> Checkpoint:
    """Return the checkpoint that scored best, by the run's own ``train.keep_best_by``."""
    newest = find_checkpoint(folder.uri, with_state=False)
    by = newest.config.train.keep_best_by
    for step in best_steps(folder, SCORES[by]):
        with contextlib.suppress(DamagedCheckpointError):
            found = load_checkpoint(storage.join(folder.checkpoints, checkpoint_name(step)))
            _ = found.state
            return found
    raise CheckpointError(
        f"{folder.uri} holds no checkpoint with a score of its own (train.keep_best_by={by}); "
        "leave out /best for the newest, or train with train.keep_best"
    )


def _state_file(sha256: str) -> str:
    return f"state-{sha256[:8]}.pt"


def _parse_state(stream: io.BytesIO) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
    return state


def _about(uri: str) -> dict[str, Any] | None:
    """Return what a checkpoint's mark says; None: there is none, or it is damaged."""
    mark = storage.join(uri, _MARK)
    try:
        content = storage.parse_json(storage.read_text(mark)) if storage.exists(mark) else None
    except (ValueError, storage.NotTextError):
        return None
    if not isinstance(content, dict) or "format" not in content:
        return None
    own = isinstance(content.get("config"), dict) and isinstance(content.get("state_sha256"), str)
    return content if own or content["format"] != FORMAT else None
