"""Ray Data: the views that teachers see, made once, in the order in which their maps are stored.

Shapes: N images, S pixels per side.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray

from pcd_ray.config import DataConfig
from pcd_ray.data.augment import ViewRecipe, teacher_view_of_bytes
from pcd_ray.data.map_store import StoredMaps
from pcd_ray.data.ray_stream import Batch, Stage
from pcd_ray.data.ray_views import contents_of, explained, lean_index, limits_of, view_seed


def teacher_views(
    index: pa.Table,
    recipe: ViewRecipe,
    maps: StoredMaps,
    parts: Sequence[int],
    *,
    seed: int,
    data: DataConfig,
) -> Stage:
    """Return how tasks make the views of some parts of maps, those of a part at a time.

    Args:
        index: the image index of N rows.
        recipe: how images become views.
        maps: the maps that the views are for.
        parts: numbers of parts.
        seed: root seed of the views.
        data: limits of images.

    Returns:
        Number in ``parts`` -> ``view`` (count, S, S, 3) uint8, the ``key`` (count,) of each one's
        image, and the ``part`` (count,) that they are for.
    """
    images = ray.put(lean_index(index))
    limits = limits_of(data)

    def views(chunk: Batch) -> Batch:
        part = parts[int(chunk["id"][0])]
        numbers, rows = np.divmod(np.asarray(maps.records(part), np.int64), maps.num_images)
        pixels, keys = [], []
        contents = contents_of(ray.get(images), rows)
        for number, (entry, content) in zip(numbers.tolist(), contents, strict=True):
            keys.append(entry["key"])
            own = view_seed(seed, number, entry)
            pixels.append(explained(teacher_view_of_bytes, entry, content, recipe, own, **limits))
        return {"view": np.stack(pixels), "key": np.array(keys), "part": np.full(len(rows), part)}

    return views
