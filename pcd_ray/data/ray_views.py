"""Ray Data: executes the plan. Images by byte range -> views -> full batches, on CPU nodes.

Shapes: B images per batch, S pixels per side. Each rank runs one streaming execution over all its
remaining steps: chunk numbers -> one task per chunk of ``data.images_per_task`` images -> batches.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pcd_ray.config import DataConfig
from pcd_ray.data.augment import ViewRecipe, eval_view, views_of_bytes
from pcd_ray.data.decode import UnreadableImage, decode_rgb, unreadable
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.plan import RankPlan
from pcd_ray.data.ray_stream import Batch, Stage, stream_chunks
from pcd_ray.data.recipe import recipe_from as recipe_from  # callers of `view_batches` need it
from pcd_ray.data.shards import read_image_bytes
from pcd_ray.seeds import derive_seed


def view_batches(
    index: pa.Table,
    mine: RankPlan,
    recipe: ViewRecipe,
    *,
    seed: int,
    data: DataConfig,
    maps: Mapping[str, StoredMaps] | None = None,
) -> Generator[Batch]:
    """Yield a rank's batch of each of its optimiser steps, in plan order.

    An image's views depend on the seed, its epoch and its key alone; with stored maps on the number
    of the view, which is the epoch modulo their views. Close the generator to stop early; Ray
    Data's tasks end with it.

    Args:
        index: the image index of N rows.
        mine: which of them, in which order.
        recipe: how images become views.
        seed: root seed of the views.
        data: sizes of tasks, prefetching, limits of images.
        maps: whole maps of the teachers' views, by the teachers' names; all have the same views.

    Yields:
        ``student_view`` and, unless one view serves both or maps are stored, ``teacher_view``
        (B, S, S, 3) uint8; ``student_box``, ``teacher_box`` (B, 5) float32; ``row``, ``epoch``
        (B,) int64; of each of ``maps`` ``NAME_map`` (B, D, H, W) float16.

    Raises:
        ConfigError: the global batch does not split over the ranks.
        ShardError: an image or a map is gone or can no longer be decoded.
        StorageError: the storage fails.
    """
    blocks = stream_chunks(
        _views_of_chunk(index, mine, recipe, seed=seed, data=data, maps=maps or {}),
        -(-mine.num_images // data.images_per_task),
        data=data,
        chunks_ahead=chunks_ahead(data, mine.batch_size),
        num_streams=mine.num_ranks,
    )
    yield from rebatched(blocks, mine.batch_size)


def _views_of_chunk(
    index: pa.Table,
    mine: RankPlan,
    recipe: ViewRecipe,
    *,
    seed: int,
    data: DataConfig,
    maps: Mapping[str, StoredMaps],
) -> Stage:
    """Return what a task does: the number of a chunk of images -> their views and maps."""
    images = ray.put(lean_index(index))
    repeat = next((stored.views for stored in maps.values()), 0)
    made = replace(recipe, teacher_rendered=not maps)

    def views(chunk: Batch) -> Batch:
        start = int(chunk["id"][0]) * data.images_per_task
        epochs, rows = mine.places(start, min(start + data.images_per_task, mine.num_images))
        numbers = epochs % repeat if repeat else epochs
        batch = _chunk_views(ray.get(images), numbers, rows, made, seed=seed, data=data)
        taught = {f"{name}_map": stored.read(numbers, rows) for name, stored in maps.items()}
        return batch | taught | {"row": rows, "epoch": epochs}

    return views


def eval_batches(
    index: pa.Table,
    rows: Sequence[int] | np.ndarray[Any, Any],
    *,
    size_px: int,
    batch_size: int,
    data: DataConfig,
) -> Generator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Yield centre crops of some images in the order of ``rows``; the last batch may be smaller.

    Args:
        index: the image index of N rows.
        rows: rows of the index.
        size_px: side S of the crops.
        batch_size: images per batch B.
        data: sizes of tasks, prefetching, limits of images.

    Yields:
        (B, S, S, 3) uint8 crops and their (B,) rows.

    Raises:
        ShardError: an image is gone or can no longer be decoded.
        StorageError: the storage fails.
    """
    crops = crop_chunks(index, rows, size_px=size_px, data=data)
    blocks = stream_chunks(
        crops.make,
        crops.count,
        data=data,
        chunks_ahead=chunks_ahead(data, batch_size),
        num_streams=1,
    )
    for batch in rebatched(blocks, batch_size):
        yield batch["view"], batch["row"]


@dataclass(frozen=True, slots=True)
class CropChunks:
    """Centre crops of some images, a chunk of ``data.images_per_task`` at a time."""

    make: Stage
    """Chunk number -> ``view`` (B, S, S, 3) uint8 and ``row`` (B,)."""
    count: int
    """How many chunks there are."""


def crop_chunks(
    index: pa.Table,
    rows: Sequence[int] | np.ndarray[Any, Any],
    *,
    size_px: int,
    data: DataConfig,
) -> CropChunks:
    """Return how tasks make the centre crops of ``rows``; arguments as of `eval_batches`."""
    wanted = np.asarray(rows, np.int64)
    images = ray.put(lean_index(index))
    order = ray.put(wanted)

    def crops(chunk: Batch) -> Batch:
        start = int(chunk["id"][0]) * data.images_per_task
        mine = ray.get(order)[start : start + data.images_per_task]
        pixels = [
            eval_view(explained(decode_rgb, row, content, **limits_of(data)), size_px)
            for row, content in contents_of(ray.get(images), mine)
        ]
        return {"view": np.stack(pixels), "row": mine}

    return CropChunks(crops, -(-wanted.size // data.images_per_task))


def chunks_ahead(data: DataConfig, batch_size: int) -> int:
    """Return the blocks that hold ``data.prefetch_batches`` batches of this size."""
    return -(-data.prefetch_batches * batch_size // data.images_per_task)


def lean_index(index: pa.Table) -> pa.Table:
    """Return the columns that tasks need, in one piece each, so that they are not copied."""
    return index.select(["key", "uri", "offset", "size"]).combine_chunks()


def contents_of(
    index: pa.Table, rows: np.ndarray[Any, Any]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the index entry and the encoded bytes of each row."""
    entries = index.take(pa.array(rows)).to_pylist()
    contents = read_image_bytes(
        [entry["uri"] for entry in entries],
        [entry["offset"] for entry in entries],
        [entry["size"] for entry in entries],
    )
    yield from zip(entries, contents, strict=True)


def explained(make: Callable[..., Any], entry: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``make(*args, **kwargs)``; what it says of an image names the image.

    Raises:
        ShardError: the image cannot be decoded.
    """
    try:
        return make(*args, **kwargs)
    except UnreadableImage as error:
        raise unreadable(entry["key"], entry["uri"], str(error)) from error


def limits_of(data: DataConfig) -> dict[str, Any]:
    """Return what bounds the decoding of one image, as `decode_rgb` calls it."""
    return {"max_pixels": data.max_pixels, "max_decode_s": data.max_decode_s}


def _chunk_views(
    index: pa.Table,
    numbers: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    recipe: ViewRecipe,
    *,
    seed: int,
    data: DataConfig,
) -> Batch:
    """Return the views of some rows, stacked; ``numbers`` says which view of each."""
    made = []
    for number, (entry, content) in zip(numbers.tolist(), contents_of(index, rows), strict=True):
        own_seed = view_seed(seed, number, entry)
        made.append(explained(views_of_bytes, entry, content, recipe, own_seed, **limits_of(data)))
    batch = {
        "student_view": np.stack([views.student for views in made]),
        "student_box": np.stack([views.student_box for views in made]),
        "teacher_box": np.stack([views.teacher_box for views in made]),
    }
    if recipe.two_colours and recipe.teacher_rendered:
        batch["teacher_view"] = np.stack([views.teacher for views in made])
    return batch


def view_seed(seed: int, number: int, entry: Mapping[str, Any]) -> int:
    """Return the seed of an image's view of this number: of its epoch, where none comes again."""
    return derive_seed(seed, "augment", number, entry["key"])


def rebatched(blocks: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Cut a stream of blocks of any length into batches; only the last may be shorter."""
    batch: Batch = {}
    filled = 0
    for block in blocks:
        length, used = len(block["row"]), 0
        while used < length:
            if not filled:
                batch = {k: np.empty((batch_size, *v.shape[1:]), v.dtype) for k, v in block.items()}
            count = min(batch_size - filled, length - used)
            for key, values in block.items():
                batch[key][filled : filled + count] = values[used : used + count]
            filled, used = filled + count, used + count
            if filled == batch_size:
                yield batch
                filled = 0
    if filled:
        yield {key: values[:filled] for key, values in batch.items()}
