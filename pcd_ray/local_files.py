r"""Folders of local disks: each real folder once, and names that are not UTF-8 as text.

A byte of a name that is not UTF-8 is written ``\xe9`` in URIs, keys and class names; a file is
found by that name again.
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

DUPLICATE = "duplicate folder link"
BROKEN = "broken link"
SPECIAL = "special file"  # a pipe, a socket, a device
AMBIGUOUS = "ambiguous file name"  # escaped, it is that of another file


def text_of_path(path: str) -> str:
    """Return a path as UTF-8 text, other bytes escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_on_disk(text: str) -> str:
    """Return the path that a text of `text_of_path` stands for; a file of just that name wins."""
    if "\\x" not in text or os.path.lexists(text):
        return text
    plain = re.sub(rb"\\x([89a-f][0-9a-f])", lambda m: bytes.fromhex(m[1].decode()), text.encode())
    return os.fsdecode(plain)


_NO_LINKS: tuple[str, ...] = ()


def walk(
    top: str, *, recursive: bool, skip: Callable[[str], bool] | None, once: bool
) -> tuple[list[tuple[str, os.stat_result]], Counter[str]]:
    """Return the files under a folder, as text of their paths, and what was left out, counted.

    Links are followed, unless to a folder that holds the link.

    Args:
        top: the folder; it has no files if it is absent.
        recursive: whether to enter the folders in it.
        skip: whether to leave out the files and folders of a name; None: all are read.
        once: whether a folder that several paths lead to is read by one alone, without links if
            there is such a path.

    Raises:
        OSError: a folder cannot be read, or ``top`` is a file.
    """
    if os.path.isfile(top):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), top)
    files: list[tuple[str, os.stat_result]] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    # each with its real path, and the real folders of the links on the way to it
    folders, links = [(top, os.path.realpath(top), _NO_LINKS)], list[tuple[str, tuple[str, ...]]]()
    while folders or links:
        if not folders:  # links are followed when all that is reached without them is known
            link, way = links.pop(0)
            real = os.path.realpath(link)
            if any(_is_in(holder, real) for holder in way):
                left_out[DUPLICATE] += 1
            else:
                folders.append((link, real, way))
            continue
        folder, real, way = folders.pop()
        if once and real in seen:
            left_out[DUPLICATE] += 1
            continue
        seen.add(real)
        found = _look_into(folder, skip)
        files += found.files
        left_out += found.left_out
        if recursive:
            folders += [
                (os.path.join(folder, n), os.path.join(real, n), way) for n in found.folders
            ]
            links += [(os.path.join(folder, name), (*way, real)) for name in found.links]
    return files, left_out


def _is_in(folder: str, other: str) -> bool:
    return os.path.join(folder, "").startswith(os.path.join(other, ""))


@dataclass(slots=True)
class _Folder:
    """What lies in one folder."""

    files: list[tuple[str, os.stat_result]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """To folders."""
    left_out: Counter[str] = field(default_factory=Counter)


def _look_into(folder: str, skip: Callable[[str], bool] | None) -> _Folder:
    found = _Folder()
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):  # it has gone, or was never there
        return found
    for entry in entries:
        if skip is not None and skip(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            found.folders.append(entry.name)
        else:
            _add_file_or_link(found, entry)
    return found


def _add_file_or_link(found: _Folder, entry: "os.DirEntry[str]") -> None:
    try:
        status = entry.stat()
    except OSError:
        if os.path.lexists(entry.path):
            found.left_out[BROKEN] += 1
        return  # it has gone
    if stat.S_ISDIR(status.st_mode):
        found.links.append(entry.name)
    elif not stat.S_ISREG(status.st_mode):
        found.left_out[SPECIAL] += 1
    else:
        text = text_of_path(entry.path)
        if path_on_disk(text) == entry.path:
            found.files.append((text, status))
        else:
            found.left_out[AMBIGUOUS] += 1
