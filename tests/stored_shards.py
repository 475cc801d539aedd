"""Three small images of two classes, and shards of them packed without Ray."""

from pathlib import Path

from PIL import Image

from pcd_ray.data.packing import pack_part, packed_index, plan_packing
from pcd_ray.data.shard_writer import publish_shards
from pcd_ray.data.shards import PackedSource
from pcd_ray.data.sources import list_sources


def write_images(root: Path) -> str:
    for number, name in enumerate(["left/0.png", "left/1.jpg", "right/2.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + number, 8), (number, 50, 90)).save(path)
    return str(root)


def write_shards(root: Path, source: str = "") -> str:
    """Pack a folder of images, by default three small ones, into ``root/packed``."""
    source = source or write_images(root / "images")
    plan = plan_packing(list_sources([source]), seed=0, shard_bytes=10**6, max_pixels=10**6)
    folder = str(root / "packed")
    records = [pack_part(folder, plan, part) for part in range(len(plan.parts))]
    index, files = packed_index(plan, records)
    publish_shards(
        folder,
        index=index,
        sources=[PackedSource(source, 1.0, index.num_rows)],
        files=files,
        num_bad=0,
        plan_hash=plan.plan_hash,
    )
    return folder
