"""URIs of files (paths, ``file://``, ``s3://``, ``gs://``): taken apart, joined, kept in bounds.

Nothing here looks at a file system.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import parse_qsl

from pcd_ray.errors import PcdError

BUCKETS = ("s3", "gs", "gcs")
"""Schemes of object stores, whose URIs begin with a bucket."""
_SECRETS = ("key", "secret", "token", "password", "credential", "credentials", "signature", "sig")
"""Words that name a secret when they end a query parameter's name, e.g. ``access_key``; a key's
``id`` is one too.
"""
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
    shown = without_secrets(uri)
    if shown == uri:
        return
    raise SecretInUriError(
        f"a URI of {shown} carries a key, a password or a token, which would be written to "
        "configurations, logs and checkpoints; take it out of the URI and give it by the "
        "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS) or by the machine's role"
    )


def without_secrets(uri: str) -> str:
    """Return a URI as it may be shown: without an account, or a query that holds a secret."""
    if not is_remote(uri):
        return uri
    base, query = split_query(uri)
    if _names_account(uri):
        return f"{base.partition('://')[0]}://***"  # where the secret ends is not known
    return base if _names_secret(query) else uri


def _names_account(uri: str) -> bool:
    """Say whether a URI begins with an account, as in ``user:password@host``.

    A password may hold ``/`` and ``?``, and what stands before them is then no bucket and no host:
    a bucket has no ``:`` in its name, a host no more than a port after it.
    """
    scheme, _, rest = uri.partition("://")
    first = re.split(r"[/?]", rest.lstrip("/"))[0]
    account, _, place = first.rpartition("@")
    if account not in ("", _WITHOUT_ACCOUNT):
        return True
    if scheme.lower() in BUCKETS:
        return ":" in place
    return "@" in rest and re.fullmatch(r"([^:]*|\[[^]]*\])(:\d+)?", place) is None


def _names_secret(query: str) -> bool:
    """Say whether a URI's query holds a secret, or an endpoint with an account."""
    for name, value in parse_qsl(query[1:], keep_blank_values=True):
        plain = re.sub(r"[^a-z]", "", name.lower())
        if plain.removesuffix("id").endswith(_SECRETS):
            return True
        if plain == "endpointoverride" and "@" in value:
            return True
    return False
