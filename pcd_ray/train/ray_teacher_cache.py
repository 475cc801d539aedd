"""Ray Data: a run's images -> the maps of its teachers on storage, through a pool of actors.

Tasks on CPUs make the views that the teacher sees; each actor holds the teacher, on a GPU where
there is one, and writes the maps itself, so that they travel nowhere. Parts that are there already
are not computed again.

Shapes: B images, D channels, H x W positions.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn

from pcd_ray.checkpoint import RunFolder, latest_checkpoint
from pcd_ray.config import Config
from pcd_ray.data.ray_stream import ActorPool, Batch, Stage, stream_through_pool
from pcd_ray.data.ray_teacher_views import teacher_views
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import Shards, open_shards
from pcd_ray.distill.build import adapted_teacher, autocast_dtype, on_device
from pcd_ray.distill.build_head import FITTED_HEADS, save_fitted_head, stored_head
from pcd_ray.distill.build_teacher import LoadedTeacher, blaming, load_teacher, load_teachers
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.errors import CheckpointError, WeightsError
from pcd_ray.progress import progress
from pcd_ray.ray_cluster import call_in_task
from pcd_ray.ray_placement import share_of_pool
from pcd_ray.ray_shares import WorkerShare
from pcd_ray.train.ray_heads import fit_head, fitting_line
from pcd_ray.train.teacher_cache import TeacherCache, cache_of, in_float16


def build_caches(
    config: Config,
    shards: Shards,
    *,
    share: WorkerShare,
    say: Callable[[str], None],
    per_part: int = 0,
) -> int:
    """Compute the maps that a run reads, as far as they are not stored; Ray is up.

    Heads that are fitted are fitted before, once for all caches of a place that can share them, and
    become the run's own. A run without
    ``teacher.cache.views`` needs nothing.

    Args:
        config: the run, its places absolute.
        shards: its images.
        share: what a training worker gets; a head is fitted with that.
        say: is given lines on cost and progress.
        per_part: maps of one file; 0: as `cache_of` decides.

    Returns:
        How many maps were computed.

    Raises:
        ShardError: an image cannot be decoded, or what is stored is damaged.
        TrainingError: a map has no place in float16.
        CheckpointError: the run goes on with another fitted head than the maps'.
        StorageError: the storage fails.
    """
    if not config.teacher.cache.views:
        return 0
    computed = 0
    for loaded in load_teachers(config):
        with blaming(loaded.name):
            cache = cache_of(config, loaded, shards, per_part=per_part)
            assert cache is not None
            computed += _Build(config, shards, loaded, cache, share, say).run()
    return computed


@dataclass(frozen=True, slots=True)
class _Build:
    """One teacher's cache in the making."""

    config: Config
    shards: Shards
    loaded: LoadedTeacher
    cache: TeacherCache
    share: WorkerShare
    say: Callable[[str], None]

    def run(self) -> int:
        """Do what is missing; return how many maps were computed."""
        maps = self.cache.maps
        whole = maps.manifest() is not None
        finished = maps.finished_parts()
        there = sum(len(maps.records(part)) for part in finished)
        kept = "all there" if whole else f"{there:,} there already" if there else ""
        self.say(self.cache.line() + (f": {kept}" if kept else ""))
        fitted = self._settled_head() if self.loaded.identity.head in FITTED_HEADS else None
        teacher = adapted_teacher(self.config, self.loaded, fitted)
        identity = replace(self.loaded.identity, sha256=tensors_sha256(teacher))
        if not whole:
            missing = [part for part in range(maps.num_parts) if part not in finished]
            self._compute(missing, there, identity.sha256)
            maps.write_manifest(made_of=self.cache.made_of, teacher=asdict(identity))
        self.cache.check_teacher(identity)
        return 0 if whole else maps.num_records - there

    def _settled_head(self) -> nn.Sequential:
        """Return the fitted head of the maps, which becomes the run's own; fit it if need be.

        A run that goes on has a head already. It is the same: a function of what the key holds, but
        perhaps not to the last bit where another machine has fitted it.
        """
        config, loaded = self.config, self.loaded
        own_uri = RunFolder.of(config).fitted_head(loaded.name)
        own = stored_head(own_uri, config, loaded)
        head = self.cache.fitted_head(config, loaded)
        if head is None:
            if own is None:
                head = self._shared_head()
            else:
                self._check_images()
                head = own
            save_fitted_head(self.cache.head_uri, head, config, loaded)
        if own is None:
            save_fitted_head(own_uri, head, config, loaded)
        elif tensors_sha256(own) != tensors_sha256(head):
            raise CheckpointError(
                f"{self.cache.maps.uri} holds maps of another fitted head than this run's, "
                f"{own_uri}; give another teacher.cache.path, or another run.name"
            )
        return head

    def _shared_head(self) -> nn.Sequential:
        """Return the head that these maps share with those of other adaptors; fit it if need be."""
        config, loaded, uri = self.config, self.loaded, self.cache.shared_head_uri
        if stored_head(uri, config, loaded) is None:
            self.say(fitting_line(loaded))
            task = config, self.cache, self.share
            what = f"fitting the {loaded.name}'s head"
            remark = call_in_task(_fit_and_store, *task, share=self.share, what=what)
            if remark:
                self.say(remark)
        head = stored_head(uri, config, loaded)
        assert head is not None  # just written
        return head

    def _check_images(self) -> None:
        """Refuse to give other runs a head that was fitted to other images."""
        stored = latest_checkpoint(RunFolder.of(self.config), with_state=False)
        if stored is None or stored.about["data_sha256"] != self.shards.content_hash:
            raise CheckpointError(
                f"the run's {self.loaded.identity.head} head was fitted to other images than those "
                f"at {self.config.data.shards}, and maps are shared by runs; set "
                f"teacher.cache.views=0, or choose another run.name"
            )

    def _compute(self, parts: list[int], there: int, sha256: str) -> None:
        """Compute and write the maps of some parts; ``there`` maps are stored already."""
        if not parts:
            return
        config, maps = self.config, self.cache.maps
        make = teacher_views(
            self.shards.index,
            recipe_from(config.augment, config.pairing.kind),
            maps,
            parts,
            seed=config.run.seed,
            data=config.data,
        )
        pool = self._pool(sha256, most=len(parts))
        blocks = stream_through_pool(
            make, pool, len(parts), data=config.data, chunks_ahead=pool.size
        )
        started, name = time.monotonic(), f"{self.cache.name} cache"
        computed = maps.num_records - there
        with closing(blocks), progress(name, "maps", computed) as shown:
            for block in blocks:  # the actors have stored it
                shown.add(len(maps.records(int(block["part"][0]))))
        took = time.monotonic() - started
        self.say(f"{name}: {computed:,} maps computed in {took:,.0f} s")

    def _pool(self, sha256: str, *, most: int) -> ActorPool:
        """Return the actors that hold the teacher of this hash, at most ``most``."""
        device = self.share.device
        size, share = share_of_pool(self.config, device=device, most=most)
        config, cache = self.config, self.cache

        def build() -> Stage:
            torch.set_num_threads(share.threads)
            return _stored_by(_teacher_of(config, cache, sha256), config, cache, device=device)

        return ActorPool(build=build, size=size, share=share)


def _teacher_of(config: Config, cache: TeacherCache, sha256: str) -> FrozenTeacher:
    """Return the teacher of this hash on the CPU, its fitted head from beside the maps.

    Raises:
        WeightsError: this node reads other weights.
    """
    loaded = load_teacher(config.teachers[cache.name], name=cache.name)
    fitted = None
    if loaded.identity.head in FITTED_HEADS:
        fitted = cache.fitted_head(config, loaded)
    teacher = adapted_teacher(config, loaded, fitted)
    if tensors_sha256(teacher) != sha256:
        raise WeightsError(
            f"teacher.weights={loaded.options.weights!r} are others on another node; give a place "
            "that all nodes share"
        )
    return teacher


def _stored_by(
    teacher: FrozenTeacher, config: Config, cache: TeacherCache, *, device: str
) -> Stage:
    """Return what writes the maps of a part's views and says so: ``part`` and ``bytes``, (1,)."""
    teacher = on_device(teacher, config, torch.device(device))
    dtype = autocast_dtype(config)

    def store(block: Batch) -> Batch:
        part, keys = int(block["part"][0]), block["key"].tolist()
        images = torch.tensor(block["view"])  # a copy: Ray's memory is read-only
        found, start = [], 0
        for few in images.split(config.eval.images_per_forward):
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                maps = teacher(few.to(device))  # (B, D, H, W)
            found.append(in_float16(maps, keys[start : start + len(few)]))
            start += len(few)
        written = cache.maps.write_part(part, np.concatenate(found))
        return {"part": np.array([part]), "bytes": np.array([written])}

    return store


def _fit_and_store(config: Config, cache: TeacherCache, share: WorkerShare) -> str:
    """Fit the head of a teacher in a task of its own; return what there is to say of it."""
    torch.set_num_threads(share.threads)
    loaded = load_teacher(config.teachers[cache.name], name=cache.name)
    shards = open_shards(config.data.shards)
    found = fit_head(loaded, shards, config, device=torch.device(share.device))
    save_fitted_head(cache.shared_head_uri, found.head, config, loaded)
    return found.remark
