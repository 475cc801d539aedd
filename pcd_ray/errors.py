"""The errors a user can cause: each message says what, the value and the fix."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class PcdError(Exception):
    """Base of every error that is shown without a traceback and exits with code 2."""


class ConfigError(PcdError):
    """An option is unknown, malformed or contradicts another."""


class ShardError(PcdError):
    """Images or packed shards are missing, damaged or not what the manifest says."""


class WeightsError(PcdError):
    """A weights file is not what the configuration says it is."""


class CheckpointError(PcdError):
    """A run's stored state cannot be used as asked."""


class InUseError(PcdError):
    """Another driver is working in the same place."""


class ClusterError(PcdError):
    """Ray cannot give what was asked for."""


class TrainingError(PcdError):
    """Training stopped because its numbers are no longer finite or its workers failed."""


class EvaluationError(PcdError):
    """Some of an evaluation could not be done, or its numbers are not finite; the rest stays."""


def to_plain(error: PcdError) -> dict[str, str]:
    """Return an error as plain data, for another process: its kind and its message."""
    return {"kind": type(error).__name__, "message": str(error)}


def from_plain(values: Mapping[str, str]) -> PcdError:
    """Return the error that `to_plain` described; of an unknown kind, a bare `PcdError`."""
    kinds: list[type[PcdError]] = [PcdError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    by_name = {kind.__name__: kind for kind in kinds}
    return by_name.get(values["kind"], PcdError)(values["message"])


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Put an option's name before the message of our own errors."""
    try:
        yield
    except PcdError as error:
        raise type(error)(f"{option}: {error}") from error
