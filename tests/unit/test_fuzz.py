"""Readers given broken bytes: each ends in an error of ours or in a right result, and runs nothing.

Mutations are drawn from a seed: a failure names reader, file and number, and comes again.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from detection_folder import write_set
from PIL import Image
from stored_run import store_run
from stored_shards import write_shards

from pcd_ray.checkpoint import load_checkpoint
from pcd_ray.config import config_from_file, to_yaml
from pcd_ray.data.decode import UnreadableImage, decode_rgb
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.packing import finished_parts, plan_packing
from pcd_ray.data.shards import read_image_bytes, verify_shards
from pcd_ray.data.sources import list_images, list_sources
from pcd_ray.distill.weights import read_weights
from pcd_ray.errors import PcdError
from pcd_ray.evaluate.detect.detection_data import open_detection

PIXELS = 100_000
READ_S = 20.0  # of processor time, for one file: far above all, to tell a hang


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@dataclass(frozen=True)
class Reader:
    """Valid files, and what reads them; it is told which one is broken."""

    files: tuple[Path, ...]
    read: Callable[[Path], Any]
    mend: Callable[[], None] = lambda: None
    """Brings hashes up to date, so that the parsers behind them are reached too."""


def mutated(data: bytes, random: np.random.Generator, strange: list[bytes]) -> bytes:
    """Return bytes with bits flipped, a piece cut, doubled, moved or strange, or a shorter file."""
    if not data:
        return b"\0"
    first, last = sorted(random.integers(0, len(data) + 1, 2).tolist())
    last = min(last, first + 64)
    kind = random.integers(0, 7)
    if kind == 0:
        changed = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 9)):
            changed[place] ^= 1 << int(random.integers(0, 8))
        return bytes(changed)
    middle = {
        1: b"",
        2: data[first:last] * 3,
        3: random.bytes(last - first),
        4: strange[random.integers(0, len(strange))],
    }
    if kind in middle:
        return data[:first] + middle[int(kind)] + data[last:]
    return data[:first] if kind == 5 else data[first:] + data[:first]


def of_shards(folder: Path) -> Reader:
    packed = Path(write_shards(folder))
    plan = plan_packing(
        list_sources([str(folder / "images")]), seed=0, shard_bytes=10**6, max_pixels=10**6
    )
    manifest = packed / "manifest.json"

    def read(_: Path) -> None:
        finished_parts(str(packed), plan)
        index = verify_shards(str(packed)).index.to_pylist()
        columns = ([row[name] for row in index] for name in ("uri", "offset", "size"))
        for content in read_image_bytes(*columns):
            try_to_decode(content)

    def mend() -> None:
        try:
            content = json.loads(manifest.read_text())
            content["index_sha256"] = sha256(packed / "index.parquet")
            for shard in content["shards"]:
                file = packed / shard["file"]
                shard |= {"sha256": sha256(file), "bytes": file.stat().st_size}
        except (ValueError, KeyError, TypeError, OSError):
            return
        manifest.write_text(json.dumps(content))

    return Reader(tuple(path for path in packed.rglob("*") if path.is_file()), read, mend)


def of_images(folder: Path) -> Reader:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
    for kind in ("jpeg", "png", "tiff", "webp", "gif", "bmp"):
        picture.save(folder / f"image.{kind}")
    picture.save(folder / "progressive.jpeg", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    files = tuple(folder.iterdir())
    return Reader(files, lambda file: try_to_decode(file.read_bytes()))


def try_to_decode(data: bytes) -> None:
    try:
        image = decode_rgb(data, max_pixels=PIXELS)
    except UnreadableImage:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= PIXELS


def of_weights(folder: Path) -> Reader:
    tensors = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "zip.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, folder / "a.safetensors", metadata={"pcd_ray": "{}"})
    files = tuple(folder.iterdir())

    def read(file: Path) -> None:
        found = read_weights(str(file))
        assert all(isinstance(value, torch.Tensor) for value in found.tensors.values())

    return Reader(files, read)


def of_checkpoint(folder: Path) -> Reader:
    run, _ = store_run(folder, 7)
    uri = Path(run.checkpoints) / "step_00000007"
    mark = uri / "checkpoint.json"
    (state,) = uri.glob("state-*.pt")

    def mend() -> None:
        try:
            about = json.loads(mark.read_text()) | {"state_sha256": sha256(state)}
        except (ValueError, TypeError):
            return
        mark.write_text(json.dumps(about))
        (uri / f"state-{sha256(state)[:8]}.pt").write_bytes(state.read_bytes())

    return Reader(tuple(uri.iterdir()), lambda _: load_checkpoint(str(uri)).state, mend)


def of_config(folder: Path) -> Reader:
    file = folder / "config.yaml"
    file.write_text(to_yaml(config_from_file("")))
    return Reader((file,), lambda _: config_from_file(str(file)))


def of_lists(folder: Path) -> Reader:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    (folder / "list.txt").write_text("# all\n0.png\n./1.png\n2.png\n")
    (folder / "list.csv").write_text('path,label\n0.png,cat\n"1.png",dog\n2.png,\n')
    files = (folder / "list.txt", folder / "list.csv")

    def read(file: Path) -> None:
        uris = list_images(str(file)).column("uri").to_pylist()
        assert all(Path(uri).is_relative_to(folder) for uri in uris)

    return Reader(files, read)


def of_coco(folder: Path) -> Reader:
    write_set(folder)
    return Reader(tuple(folder.rglob("*.json")), lambda _: open_detection(str(folder), masks=True))


def of_maps(folder: Path) -> Reader:
    maps = StoredMaps(
        uri=str(folder), key="k", shape=(2, 2, 2), num_images=3, views=2, records_per_part=4
    )
    for part in range(maps.num_parts):
        maps.write_part(part, np.ones((len(maps.records(part)), 2, 2, 2), np.float16))
    maps.write_manifest(made_of={}, teacher={})

    def read(_: Path) -> None:
        maps.manifest()
        assert maps.read(np.array([0, 1]), np.array([0, 2])).shape == (2, 2, 2, 2)

    return Reader(tuple(folder.iterdir()), read)


READERS = {
    "shards": (of_shards, 50),
    "images": (of_images, 140),
    "weights": (of_weights, 200),
    "checkpoint": (of_checkpoint, 36),
    "config": (of_config, 20),
    "lists": (of_lists, 150),
    "coco": (of_coco, 120),
    "maps": (of_maps, 150),
}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", READERS)
def test_broken_bytes_end_in_our_error_or_in_a_right_result(name: str, tmp_path: Path) -> None:
    make, rounds = READERS[name]
    home, mark = tmp_path / "home", tmp_path / "was_run"
    home.mkdir()
    reader = make(home)
    for file in reader.files:
        reader.read(file)  # all is well before
    strange = [
        pickle.dumps(_Runs(str(mark)), protocol=2),
        f"!!python/object/apply:os.mkdir ['{mark}']".encode(),
        b"../../../etc/passwd",
        b"\xff" * 8,
        b"[" * 5000,
        b"-1",
        b"1e999",
        b"null",
        b"&a [*a, *a]",
    ]
    valid = {file: file.read_bytes() for file in reader.files}
    random, refused = np.random.default_rng(0), 0
    for number in range(rounds):
        file = reader.files[number % len(reader.files)]
        file.write_bytes(
            b"" if number < len(reader.files) else mutated(valid[file], random, strange)
        )
        if random.random() < 0.5:
            reader.mend()
        start = time.thread_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(file)
        except PcdError as error:
            refused += bool(str(error))
        except Exception as error:
            kept = tmp_path / f"broken_{file.name}"
            shutil.copy(file, kept)
            raise AssertionError(f"{name}, {file.name}, number {number}, kept as {kept}") from error
        assert time.thread_time() - start < READ_S, (name, file.name, number)
        assert not mark.exists(), (name, file.name, number)
        for one, data in valid.items():
            one.write_bytes(data)
    assert refused > rounds // 8 or name == "images"


def test_the_strange_pickle_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    pickle.load(io.BytesIO(pickle.dumps(_Runs(str(mark)), protocol=2)))
    assert mark.exists()
