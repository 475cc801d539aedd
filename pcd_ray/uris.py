"""URIs of files (paths, ``file://``, ``s3://``, ``gs://``): taken apart, joined, kept in bounds.

Nothing here looks at a file system.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from pcd_ray.errors import PcdError

_SECRETS = ("key", "secret", "token", "password", "credential", "signature", "sig")
"""Words that name a secret when they end a query parameter's name, e.g. ``access_key``."""
_WITHOUT_ACCOUNT = "anonymous"  # gs://anonymous@bucket, for buckets that anybody may read


class SecretInUriError(PcdError):
    """A URI carries a credential: it would end up in configurations, logs and checkpoints."""


class OutsideError(PcdError):
    """A name that stands in a file leads out of the folder that it belongs to."""


def is_remote(uri: str) -> bool:
    """Say whether a URI names an object store rather than a path of this machine."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return a URI that means the same from any working directory."""
    if is_remote(uri):
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def split_query(uri: str) -> tuple[str, str]:
    """Return a URI without its query, and the query with its ``?``; local files have none."""
    if not is_remote(uri):  # a ? is part of a name
        return uri, ""
    base, mark, query = uri.partition("?")
    return base, mark + query


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI; query parameters (``?endpoint_override=``) stay at the end."""
    base, query = split_query(uri)
    return "/".join([base.rstrip("/"), *parts]) + query


def name_of(uri: str) -> str:
    """Return the last path part of a URI."""
    return split_query(uri)[0].rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """Return the folder that a file or folder lies in; query parameters stay at the end."""
    base, query = split_query(uri)
    return base.rstrip("/").rpartition("/")[0] + query


def inside(folder: str, name: object) -> str:
    """Return the URI of a file by a name that stands in another file, relative to a folder.

    A symbolic link inside the folder may lead anywhere: whoever owns the disk has made it.

    Raises:
        OutsideError: the name is no text, empty, absolute, a URI, or climbs out by ``..``.
    """
    plain = posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) and name else ".."
    climbs = plain in (".", "..") or plain.startswith(("/", "../", "~")) or ":/" in plain
    if climbs or "\0" in plain or (is_remote(folder) and "?" in plain):
        raise OutsideError(f"{name!r} is no place inside {folder}; do not trust the file with it")
    return join(folder, posixpath.normpath(str(name)))


def refuse_secrets(uri: str) -> None:
    """Refuse a URI that carries credentials; the message does not repeat them.

    Raises:
        SecretInUriError: it has a user, a password, or a query parameter that names a secret.
    """
    if not is_remote(uri) or not _carries_secret(uri):
        return
    base = re.sub(r"//[^/]*@", "//", split_query(uri)[0])
    raise SecretInUriError(
        f"a URI of {base} carries a key, a password or a token, which would be written to "
        "configurations, logs and checkpoints; take it out of the URI and give it by the "
        "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS) or by the machine's role"
    )


def _carries_secret(uri: str) -> bool:
    base, query = split_query(uri)
    account = base.partition("://")[2].partition("/")[0].rpartition("@")[0]
    if account not in ("", _WITHOUT_ACCOUNT):
        return True
    names = (name.lower() for name, _ in parse_qsl(query[1:], keep_blank_values=True))
    return any(re.split(r"[_.-]", name)[-1] in _SECRETS for name in names) or bool(
        urlsplit(f"//{dict(parse_qsl(query[1:])).get('endpoint_override', '')}").username
    )
