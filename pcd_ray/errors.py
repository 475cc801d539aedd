"""The errors a user can cause: each message says what, the value and the fix."""

from collections.abc import Iterator
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


class ClusterError(PcdError):
    """Ray cannot give what was asked for."""


class TrainingError(PcdError):
    """Training stopped because its numbers are no longer finite or its workers failed."""


class EvaluationError(PcdError):
    """Some of an evaluation could not be done, or its numbers are not finite; the rest stays."""


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Put an option's name before the message of our own errors."""
    try:
        yield
    except PcdError as error:
        raise type(error)(f"{option}: {error}") from error
