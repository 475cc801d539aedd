"""Which maps of a teacher a run needs, where they lie, what they cost; it computes none.

Shapes: B images, D channels, H x W positions.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.config import Config, config_to_values
from pcd_ray.data.map_store import FORMAT_VERSION, RECORDS_PER_PART, Maps, StoredMaps
from pcd_ray.data.shards import Shards
from pcd_ray.distill.backbones import map_shape
from pcd_ray.distill.build import adapted_teacher
from pcd_ray.distill.build_head import FITTED_HEADS, fitted_by, stand_in_head, stored_head
from pcd_ray.distill.build_teacher import LoadedTeacher
from pcd_ray.distill.teacher import TeacherIdentity
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.errors import ShardError, TrainingError, WeightsError

_PART_VIEW_BYTES = 2**26  # of a part's views: larger blocks are cut up by Ray Data
_HEAD_FACTS = (
    *("backbone_sha256", "recentred", "mean", "std", "head", "fit", "augment", "seed"),
    *("network", "data_sha256"),
)
_LARGEST_ERROR = 2**-8  # of a map in float16, relative; 2^-11 at most where it is in range


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """The stored maps of one teacher, whole or not."""

    name: str
    """The teacher's section."""
    maps: StoredMaps
    made_of: dict[str, Any]
    """All that the maps follow from: what their key is a hash of."""

    @property
    def head_uri(self) -> str:
        """Where the fitted head of these maps lies, where the teacher has one."""
        return storage.join(self.maps.uri, "head.safetensors")

    @property
    def shared_head_uri(self) -> str:
        """Where the fitted head lies for all caches whose maps it is behind.

        It follows from the backbone, the images and how it was fitted: rules of the adaptor, crops
        and precision of the maps do not matter.
        """
        facts = {name: self.made_of[name] for name in _HEAD_FACTS}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return storage.join(storage.parent(self.maps.uri), f"head-{key[:16]}.safetensors")

    def fitted_head(self, config: Config, loaded: LoadedTeacher) -> nn.Sequential | None:
        """Return the fitted head of these maps; None: it is still to be fitted.

        Raises:
            ShardError: there are maps, but their head is gone.
        """
        head = stored_head(self.head_uri, config, loaded)
        if head is None and self.maps.finished_parts():
            raise ShardError(
                f"{self.head_uri} is missing or of other settings, but maps lie beside it; delete "
                "the folder and give the same command again, which makes all of it anew"
            )
        return head

    def state(self) -> str:
        """Return ``whole``, ``partial`` or ``missing``.

        Raises:
            ShardError: what lies there is damaged.
        """
        if self.maps.manifest() is not None:
            return "whole"
        return "partial" if self.maps.finished_parts() else "missing"

    def plan(self) -> dict[str, Any]:
        """Return what a run's plan says of it."""
        maps = self.maps
        return {
            "maps": maps.num_records,
            "bytes": maps.total_bytes,
            "uri": maps.uri,
            "state": self.state(),
        }

    def line(self) -> str:
        """Return what is said of it before it is built."""
        maps = self.maps
        width, height, across = maps.shape
        return (
            f"{self.name} cache: {maps.num_records:,} maps of {width} x {height} x {across} in "
            f"float16, {bytes_in_words(maps.total_bytes)}, in {maps.uri}"
        )

    def check_teacher(self, identity: TeacherIdentity) -> None:
        """Check that the maps are whole and of this very teacher, its head included.

        Raises:
            ShardError: they are not whole, or damaged.
            WeightsError: they are another teacher's.
        """
        found = self.maps.manifest()
        if found is None:
            raise ShardError(
                f"{self.maps.uri}: the maps are not whole; give the same command again"
            )
        if found["teacher"]["sha256"] != identity.sha256:
            raise WeightsError(
                f"{self.maps.uri}: the maps are of another fitted head than this run's; give "
                "another teacher.cache.path, or another run.name"
            )


def cache_of(
    config: Config, loaded: LoadedTeacher, shards: Shards, *, per_part: int = 0
) -> TeacherCache | None:
    """Return the cache that a run reads a teacher's maps from; None: its teacher runs.

    Args:
        config: the run.
        loaded: the teacher.
        shards: the run's images.
        per_part: maps of one file; 0: as many as have views of 64 MiB, 256 at most.
    """
    views = loaded.options.cache.views
    if not views:
        return None
    made_of = _made_of(config, loaded, shards.content_hash)
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    place = loaded.options.cache.path or usual_cache_path(config)
    maps = StoredMaps(
        uri=storage.join(place, f"maps-{key[:16]}"),
        key=key,
        shape=_shape(config, loaded),
        num_images=shards.num_images,
        views=views,
        records_per_part=per_part or _records_per_part(config.augment.image_size_px),
    )
    return TeacherCache(loaded.name, maps, made_of)


def usual_cache_path(config: Config) -> str:
    """Return where caches lie that were given no place: beside the run, for others like it."""
    return storage.join(storage.absolute(config.run.root), "teacher_cache")


def in_float16(maps: Tensor, keys: Sequence[str]) -> Maps:
    """Return maps (B, D, H, W) in float16.

    Args:
        maps: the maps of some images.
        keys: the images' keys.

    Raises:
        TrainingError: a map is not finite, or too large or too small for float16.
    """
    exact = maps.float()
    half = exact.half()
    error = (half.float() - exact).flatten(1).norm(dim=1)
    right = error <= _LARGEST_ERROR * exact.flatten(1).norm(dim=1)  # NaN and infinity are not
    if not bool(right.all()):
        first = int(right.logical_not().nonzero()[0])
        largest = float(exact[first].abs().max())
        raise TrainingError(
            f"the teacher's map of image {keys[first]!r} cannot be stored in float16: its largest "
            f"value is {largest:.3g}; set teacher.cache.views=0, so that the teacher runs in every "
            "step, or take a head with smaller values, e.g. teacher.head=pca with "
            "teacher.fit.whiten=1"
        )
    found: Maps = half.cpu().numpy()
    return found


def _made_of(config: Config, loaded: LoadedTeacher, data_sha256: str) -> dict[str, Any]:
    """Return all that a teacher's maps follow from, as plain data."""
    made_of: dict[str, Any] = json.loads(fitted_by(config, loaded))
    backbone, options = loaded.backbone, loaded.options
    kind = loaded.identity.head
    if kind not in FITTED_HEADS:
        del made_of["fit"]
    if kind == "published":
        assert loaded.head is not None
        made_of["head_sha256"] = tensors_sha256(loaded.head)
        made_of["head_layers"] = str(loaded.head)
    return made_of | {
        "format_version": FORMAT_VERSION,
        "network": [backbone.name, backbone.kwargs, backbone.tap],
        "adaptor": config_to_values(options.adaptor),
        "projection_dim": options.projection_dim,
        "precision": config.train.precision,
        "crops": 1 if config.pairing.kind == "same_view" else 2,
        "data_sha256": data_sha256,
        "views": options.cache.views,
    }


def _records_per_part(size_px: int) -> int:
    return max(1, min(RECORDS_PER_PART, _PART_VIEW_BYTES // (3 * size_px * size_px)))


def _shape(config: Config, loaded: LoadedTeacher) -> tuple[int, int, int]:
    channels, height, width = map_shape(loaded.backbone, config.augment.image_size_px)
    alike = adapted_teacher(config, loaded, stand_in_head(loaded, loaded.options.fit))
    return alike.width(channels), height, width


def bytes_in_words(count: int) -> str:
    """Return a size as a reader knows it, e.g. ``12 MB``."""
    if count >= 10**10:
        return f"{count / 10**9:,.0f} GB"
    return f"{count / 10**6:,.0f} MB" if count >= 10**7 else f"{count / 10**6:.2g} MB"
