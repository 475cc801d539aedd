"""Writes small segmentation sets in the package's layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("sky", "road", "tree")
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)

Mask = NDArray[np.uint8]


def random_mask(seed: int, *, height: int = 16, width: int = 24, block: int = 4) -> Mask:
    """Return a mask of random blocks; the classes' shares are about 50, 30 and 20 percent."""
    shape = (height // block, width // block)
    blocks = np.random.default_rng(seed).choice(3, size=shape, p=[0.5, 0.3, 0.2])
    return np.kron(blocks, np.ones((block, block))).astype(np.uint8)


def painted(mask: Mask) -> NDArray[np.uint8]:
    """Return the image whose colours tell the classes; void pixels look like class 2."""
    return COLOURS[np.minimum(mask, 2)]


def write_set(folder: Path, splits: Mapping[str, Sequence[tuple[NDArray[np.uint8], Mask]]]) -> str:
    """Write pairs (image, mask) by split; return the folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, pairs in splits.items():
        names = [f"{split}_{index:02d}" for index in range(len(pairs))]
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name, (image, mask) in zip(names, pairs, strict=True):
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return str(folder)


def painted_set(folder: Path, *, train: int = 12, val: int = 5, block: int = 4) -> str:
    """Write a set whose colours give the classes away."""
    masks = [random_mask(seed, block=block) for seed in range(train + val)]
    pairs = [(painted(mask), mask) for mask in masks]
    return write_set(folder, {"train": pairs[:train], "val": pairs[train:]})
