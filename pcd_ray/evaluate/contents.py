"""What labelled sets hold, as hashes: numbers of a set that has changed are not those of this one.

Lists, records and masks count by what is in them, images by place, size and time of writing, where
the file system knows it: to read them all would cost as much as to judge on them.
"""

import hashlib
import json
from collections.abc import Iterable

from pcd_ray import storage

_FOLDERS_ONE_BY_ONE = 8


def stored_files(uris: Iterable[str]) -> dict[str, storage.StoredFile]:
    """Return URI -> size and time of writing, in order; absent files have neither.

    Whole folders are listed, which on an object store is one call where files are many; many
    folders of one place there are listed together.
    """
    asked = dict.fromkeys(uris)
    folders = list(dict.fromkeys(map(storage.parent, asked)))
    above = dict.fromkeys(map(storage.parent, folders))
    # class folders in a bucket in one listing; a local listing costs little, what lies above a lot
    many = len(folders) > _FOLDERS_ONE_BY_ONE and storage.is_remote(folders[0])
    whole = many and len(above) == 1
    known = {
        file.uri: file
        for folder in (above if whole else folders)
        for file in storage.list_files(folder, recursive=whole)
    }
    return {uri: known.get(uri, storage.StoredFile(uri, 0)) for uri in asked}


def files_sha256(uris: Iterable[str]) -> str:
    """Return a hash of files by place, size and time of writing."""
    found = stored_files(uris).values()
    return hash_of([[file.uri, file.size_bytes, file.modified_ns] for file in found])


def hash_of(facts: object) -> str:
    """Return a hash of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
