"""What every section of the configuration is checked with."""

from pydantic import ConfigDict

FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)
"""No unknown options, no infinities, no NaN."""


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    """Refuse an option's value unless it is ``ok``, e.g. ``0 <= p <= 1`` for ``"in [0, 1]"``.

    Raises:
        ValueError: it is not; the message says the dotted name, what is wanted and the value.
    """
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
