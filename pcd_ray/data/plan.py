"""The order of images for ever: which image stands at each position of one endless stream.

Training reads positions 0, 1, 2, ... . Epoch e holds positions [e*E, (e+1)*E), E = images per
epoch; optimiser step s reads [s*G, (s+1)*G), G = global batch; rank r of R reads its images
[r*G // R, (r+1)*G // R), as many as any other rank or one less. So batches are always full, every
image of every epoch is read once whatever R is, and resuming at step s is starting at s*G.
Positions map to rows by keyed bijections: nothing is stored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcd_ray.errors import ConfigError
from pcd_ray.seeds import derive_seed

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

_ROUNDS = 8
_AUDIT_BLOCK = 1 << 16


@dataclass(frozen=True)
class EpochPlan:
    """The order of images, a function of the seed alone.

    Args:
        sources: (rows, weight) of each collection, in index order. Weight 1 reads each image once
            per epoch, 2 twice, 0.5 every second epoch.
        seed: the run's root seed.

    Raises:
        ConfigError: there is no source, or one without rows or without weight.
    """

    sources: tuple[tuple[int, float], ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.sources or min(rows for rows, _ in self.sources) < 1:
            raise ConfigError(f"sources={self.sources} have no images; pack some first")
        if min(weight for _, weight in self.sources) <= 0:
            raise ConfigError(f"sources={self.sources} need weights > 0; see data.sources")

    @property
    def images_per_epoch(self) -> int:
        """Positions per epoch, E."""
        return sum(self._slots())

    def total_steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the optimiser steps after which ``epochs`` epochs have been read."""
        return -(-round(epochs * self.images_per_epoch) // global_batch_size)

    def epochs_read(self, step: int, global_batch_size: int, epochs: int) -> float:
        """Return the epochs read by ``step``, at most ``epochs``: the last step may read on."""
        return min(step * global_batch_size / self.images_per_epoch, epochs)

    def rows(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return epoch and index row, (stop - start,) each, of positions [start, stop)."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs = positions // self.images_per_epoch
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch_rows(int(epoch), positions[here] % self.images_per_epoch)
        return epochs, rows

    def reads_once(self) -> bool:
        """Say whether every epoch holds each image exactly once."""
        return self._slots() == [rows for rows, _ in self.sources]

    def _slots(self) -> list[int]:
        return [max(1, round(rows * weight)) for rows, weight in self.sources]

    def _epoch_rows(self, epoch: int, places: Ints) -> Ints:
        """Map places in [0, E) of an epoch to index rows."""
        slots = permuted(places, self.images_per_epoch, derive_seed(self.seed, "order", epoch))
        rows = np.empty_like(slots)
        first_slot = first_row = 0
        for source, (count, (size, _)) in enumerate(zip(self._slots(), self.sources, strict=True)):
            mine = (slots >= first_slot) & (slots < first_slot + count)
            number = epoch * count + slots[mine] - first_slot  # in the source's own endless stream
            rows[mine] = first_row + self._source_rows(source, size, number)
            first_slot, first_row = first_slot + count, first_row + size
        return rows

    def _source_rows(self, source: int, size: int, number: Ints) -> Ints:
        rows = np.empty_like(number)
        passes = number // size
        for turn in np.unique(passes):
            here = passes == turn
            key = derive_seed(self.seed, "pass", source, int(turn))
            rows[here] = permuted(number[here] % size, size, key)
        return rows


def rank_span(step: int, rank: int, num_ranks: int, global_batch_size: int) -> tuple[int, int]:
    """Return the positions [start, stop) that a rank reads in an optimiser step.

    Raises:
        ConfigError: there are more ranks than images in a step.
    """
    if global_batch_size < num_ranks:
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} leaves some of {num_ranks} workers "
            f"without an image; use at most train.num_workers={global_batch_size}"
        )
    first, stop = (number * global_batch_size // num_ranks for number in (rank, rank + 1))
    return step * global_batch_size + first, step * global_batch_size + stop


def rank_sizes(num_ranks: int, global_batch_size: int) -> list[int]:
    """Return the images of each rank in an optimiser step, the same in every step.

    Raises:
        ConfigError: there are more ranks than images in a step.
    """
    spans = [rank_span(0, rank, num_ranks, global_batch_size) for rank in range(num_ranks)]
    return [stop - start for start, stop in spans]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """What one rank reads in some optimiser steps: its images, numbered 0, 1, 2, ... ."""

    plan: EpochPlan
    """The order of all images."""
    global_batch_size: int
    """Images per optimiser step over all ranks, G."""
    stop_step: int
    """End of the optimiser steps."""
    start_step: int = 0
    """First optimiser step."""
    rank: int = 0
    """This training worker."""
    num_ranks: int = 1
    """Training workers R."""

    @property
    def batch_size(self) -> int:
        """Images of this rank per optimiser step, G / R rounded down or up.

        Raises:
            ConfigError: there are more ranks than images in a step.
        """
        first, stop = self._span(0)
        return stop - first

    @property
    def num_images(self) -> int:
        """Images of this rank in all these steps."""
        return (self.stop_step - self.start_step) * self.batch_size

    def places(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return epoch and index row, (stop - start,) each, of images number [start, stop)."""
        parts = []
        while start < stop:
            step, inside = divmod(start, self.batch_size)
            first = self._span(self.start_step + step)[0] + inside
            count = min(self.batch_size - inside, stop - start)
            parts.append(self.plan.rows(first, first + count))
            start += count
        epochs, rows = zip(*parts, strict=True)
        return np.concatenate(epochs), np.concatenate(rows)

    def _span(self, step: int) -> tuple[int, int]:
        return rank_span(step, self.rank, self.num_ranks, self.global_batch_size)


def permuted(values: Ints, size: int, key: int) -> Ints:
    """Map values in [0, size) to [0, size) by a pseudo-random bijection chosen by ``key``.

    A Feistel network permutes the 2^b numbers of the next power of two; values that land outside
    the range walk on along their cycle until they are inside, which keeps it a bijection.
    """
    bits = max(2, (size - 1).bit_length())
    keys = [np.uint64(derive_seed(key, "round", number)) for number in range(_ROUNDS)]
    words = _feistel(values.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(words >= size)).size:
        words[outside] = _feistel(words[outside], bits, keys)
    return words.astype(np.int64)


def _feistel(words: Words, bits: int, keys: Sequence[np.uint64]) -> Words:
    """Permute [0, 2^bits): each round xors one half with a keyed hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = words >> low_bits, words & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_mixed(high ^ key) & low_mask)
        else:
            high = high ^ (_mixed(low ^ key) & high_mask)
    return (high << low_bits) | low


def _mixed(words: Words) -> Words:
    """Hash 64-bit words (the finaliser of splitmix64)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class SeenAudit:
    """Proof of what was read: per epoch a count and a sum of hashes of the rows, modulo 2^63.

    A lost, repeated or foreign row changes the sum. Both numbers fit int64 and add up over ranks
    and over resumes, so that a verdict costs a few integers however large the data is.
    """

    def __init__(self, state: Iterable[Sequence[int]] = ()) -> None:
        self._seen = {int(epoch): (int(count), int(total)) for epoch, count, total in state}

    def state(self) -> list[list[int]]:
        """Return [epoch, count, sum] for each epoch: plain data for checkpoints and gathering."""
        return [[epoch, *self._seen[epoch]] for epoch in sorted(self._seen)]

    def add(self, epochs: Ints, rows: Ints) -> None:
        """Count rows as read; ``epochs`` and ``rows`` are (N,)."""
        for epoch in np.unique(epochs):
            here = rows[epochs == epoch]
            self._count(int(epoch), here.size, _hash_sum(here))

    def merge(self, others: Iterable["SeenAudit"]) -> "SeenAudit":
        """Return the sum of this audit and others, e.g. of all ranks."""
        merged = SeenAudit(self.state())
        for other in others:
            for epoch, count, total in other.state():
                merged._count(epoch, count, total)
        return merged

    def verdict(self, plan: EpochPlan, epoch: int) -> str | None:
        """Return what is wrong with an epoch that has been read, or None when all is as planned."""
        count, total = self._seen.get(epoch, (0, 0))
        wanted = plan.images_per_epoch
        if count != wanted:
            return f"epoch {epoch}: {count:,} images were read, the plan has {wanted:,}"
        if total != _planned_sum(plan, epoch):
            return f"epoch {epoch}: {count:,} images were read, but some twice and others never"
        return None

    def _count(self, epoch: int, count: int, total: int) -> None:
        old_count, old_total = self._seen.get(epoch, (0, 0))
        self._seen[epoch] = (old_count + count, (old_total + total) % 2**63)


def _hash_sum(rows: Ints) -> int:
    return int(_mixed(rows.astype(np.uint64)).sum(dtype=np.uint64)) % 2**63


def _planned_sum(plan: EpochPlan, epoch: int) -> int:
    """Return the sum over an epoch: over all rows when each is read once, else over the plan."""
    size, first = plan.images_per_epoch, epoch * plan.images_per_epoch
    total = 0
    for start in range(0, size, _AUDIT_BLOCK):
        stop = min(size, start + _AUDIT_BLOCK)
        if plan.reads_once():
            rows = np.arange(start, stop, dtype=np.int64)
        else:
            rows = plan.rows(first + start, first + stop)[1]
        total += _hash_sum(rows)
    return total % 2**63
