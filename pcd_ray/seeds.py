"""One root seed, one derived seed for each consumer: nobody depends on who drew first."""

import hashlib


def derive_seed(root: int, *path: str | int) -> int:
    """Return a 63-bit seed for one consumer, e.g. ``derive_seed(0, "augment", epoch, key)``."""
    text = "/".join(map(str, (root, *path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
