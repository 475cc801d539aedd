"""Trying again what a storage refused: which errors may pass, how long to wait, a line for each.

All waiting for storage happens here. Object stores' own clients are told not to try again
(`storage.filesystem`): they do so without a word, without jitter, and for a few seconds only.
"""

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Waits before an operation is tried again, about two minutes in all; each is drawn from half to
one and a half times as long, so that many workers do not come back at the same moment."""

_Result = TypeVar("_Result")
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY)
"""What a network file system that will be back says."""
_HOPELESS = re.compile(
    r"ACCESS_DENIED|NO_SUCH_|RESOURCE_NOT_FOUND|INVALID_|MISSING_AUTHENTICATION|UNRECOGNIZED_CLIENT"
    r"|EXPIRED_TOKEN|SIGNATURE|INCOMPLETE_SIGNATURE|VALIDATION|OPT_IN_REQUIRED|METHOD_NOT_ALLOWED"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|FAILED_PRECONDITION|NOT_FOUND|UNIMPLEMENTED|libjvm"
    r"|HTTP status (?:3\d\d|4(?!08|25|29)\d\d)"
)
"""What S3's and Google's clients say of requests that will never be granted."""
_NAME = re.compile(r"""(?<!\w)'.*?'(?!\w)|(?<!\w)".*?"(?!\w)|\w+://\S+""")
"""A bucket, a key or a URI in what they say; an apostrophe inside a word quotes nothing."""


def may_pass(error: Exception, *, remote: bool) -> bool:
    """Say whether an operation that failed so may succeed when it is tried again."""
    if not isinstance(error, OSError):
        return False  # a bad URI: pyarrow's ArrowInvalid, a ValueError
    if error.errno is not None:  # absent, a folder, no permission, no space
        return error.errno in _PASSING
    return remote and _HOPELESS.search(_NAME.sub("", str(error))) is None


def patiently(what: str, operation: Callable[[], _Result], *, remote: bool) -> _Result:
    """Return what an operation does, tried again while its error may pass.

    Args:
        what: for the log, e.g. ``s3://bucket/key cannot be read``.
        operation: has the same effect when it is done twice.
        remote: whether it asks an object store.

    Raises:
        Exception: its own last error.
    """
    for attempt, pause_s in enumerate(PAUSES_S, 1):
        try:
            return operation()
        except Exception as error:
            if not may_pass(error, remote=remote):
                raise
            wait_s = pause_s * random.SystemRandom().uniform(0.5, 1.5)
            logging.getLogger(__name__).warning(
                "%s: %s; attempt %d of %d, trying again in %.1f s",
                what,
                " ".join(str(error).split()),
                attempt,
                len(PAUSES_S) + 1,
                wait_s,
            )
            time.sleep(wait_s)
    return operation()
