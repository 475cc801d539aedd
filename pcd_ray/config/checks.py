"""What every section of the configuration is checked with."""

import re
from collections.abc import Mapping

from pydantic import ConfigDict

FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)
"""No unknown options, no infinities, no NaN."""


_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?")


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    """Refuse an option's value unless it is ``ok``, e.g. ``0 <= p <= 1`` for ``"in [0, 1]"``.

    Raises:
        ValueError: it is not; the message says the dotted name, what is wanted and the value.
    """
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def require_labels(labels: Mapping[str, str], name: str) -> None:
    """Refuse node labels that are not plain names and values, such as ``!in(a, b)``.

    Raises:
        ValueError: they are not.
    """
    for words in labels.items():
        require(
            all(_LABEL.fullmatch(word) for word in words),
            name,
            dict(labels),
            "plain names and values, e.g. {pool: data}",
        )
