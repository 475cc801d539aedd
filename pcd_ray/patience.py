"""Errors of a storage: which may pass and how long to wait for that, and what helps against each.

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
_FIXES = {
    errno.ENOENT: "correct the path",
    errno.EACCES: "change its permissions or owner, or use another path",
    errno.EPERM: "change its permissions or owner, or use another path",
    errno.EROFS: "the file system is read-only: use another path",
    errno.ENOSPC: "free space or inodes on that disk (df -h, df -i), or use another path",
    errno.EDQUOT: "the disk quota is used up: delete files, or use another path",
    errno.ENOTDIR: "a file is where a folder is needed: move it, or use another path",
    errno.EEXIST: "a file is where a folder is needed: move it, or use another path",
    errno.EISDIR: "a folder is where a file is needed: move it, or use another path",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "its symbolic links form a loop: correct them",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
}
_REMOTE_FIXES = (
    (
        "EXPIRED_TOKEN|ExpiredToken|TokenRefreshRequired|InvalidToken|INVALID_CLIENT_TOKEN_ID",
        "the session token has expired: renew it (AWS_SESSION_TOKEN, or aws sso login)",
    ),
    (
        "UNAUTHENTICATED|OAuth2",
        "there are no valid credentials: set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth "
        "application-default login",
    ),
    (
        "INVALID_ACCESS_KEY_ID|SIGNATURE|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION",
        "the credentials are wrong: correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE",
    ),
    (
        "HTTP status 30[178]|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocation",
        "the bucket is in another region: set AWS_REGION, or add ?region=NAME to the URI",
    ),
    ("TIME_TOO_SKEWED", "this machine's clock is wrong: set it"),
    ("NO_SUCH_BUCKET|bucket does not exist", "create the bucket, or correct its name"),
    ("QuotaExceeded|StorageFull|HTTP status 507", "the storage is full: delete objects there"),
    (
        "ACCESS_DENIED|PERMISSION_DENIED|HTTP status 40[13]",
        "access is denied: check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS) and what this bucket allows them",
    ),
    (
        "HTTP status 400",
        "the session token has expired (renew it), or the bucket is in another region (set "
        "AWS_REGION)",
    ),
    ("libjvm", "install Java and Hadoop's libhdfs, or use a path, s3:// or gs://"),
    (
        r"curlCode: 6\b|CURL error \[6\]|resolve host",
        "there is no such host: correct the endpoint, or check the network's name server",
    ),
    (
        r"curlCode: (35|51|58|60|77)\b|CURL error \[(35|51|58|60|77)\]",
        "TLS fails: add ?scheme=http to the URI if the endpoint has none, or "
        "?tls_ca_file_path=FILE for its certificate",
    ),
    (
        "curlCode|CURL error|NETWORK_CONNECTION|UNAVAILABLE",
        "the endpoint does not answer: check its address, that it is up, the network and the "
        "proxy, then rerun the same command",
    ),
)
"""What helps, by what the clients of S3 and Google say; the first that is found counts."""
_NAME = re.compile(r"""(?<!\w)'.*?'(?!\w)|(?<!\w)".*?"(?!\w)|\w+://\S+""")
"""A bucket, a key or a URI in what they say; an apostrophe inside a word quotes nothing."""


def may_pass(error: Exception, *, remote: bool) -> bool:
    """Say whether an operation that failed so may succeed when it is tried again."""
    if not isinstance(error, OSError):
        return False  # a bad URI: pyarrow's ArrowInvalid, a ValueError
    if error.errno is not None:  # absent, a folder, no permission, no space
        return error.errno in _PASSING
    return remote and _HOPELESS.search(_NAME.sub("", str(error))) is None


def fix_for(error: Exception, *, remote: bool = False) -> str:
    """Return what a user can do about an operation that failed so."""
    if not isinstance(error, OSError):
        return "give a path, s3://bucket/folder?region=NAME or gs://bucket/folder"
    if error.errno in _FIXES:
        return _FIXES[error.errno]
    text = _NAME.sub("", str(error))
    if not remote and text.endswith("is a directory"):  # pyarrow says it without a number
        return _FIXES[errno.EISDIR]
    for said, fix in _REMOTE_FIXES if remote else ():
        if re.search(said, text):
            return fix
    if may_pass(error, remote=remote):
        return "check the storage, then rerun the same command"
    return "check the path and its permissions"


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
