"""The last K teacher vectors, equal on all ranks: the negatives of the loss.

It is training state: saved, restored, and started as random unit vectors (never zeros, which
would be negatives at right angles to everything).

Shapes: K entries, D embedding channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class FeatureQueue:
    """First in, first out, for batches of any size."""

    def __init__(self, size: int, width: int, *, seed: int, device: torch.device) -> None:
        random = torch.Generator().manual_seed(seed)
        self.negatives = F.normalize(torch.randn(size, width, generator=random), dim=1).to(device)
        """(K, D) unit vectors, in no particular order."""
        self.cursor = 0
        """Row that the next push writes first: the oldest."""
        self.num_pushed = 0
        """Vectors pushed so far."""

    @property
    def fill(self) -> float:
        """Share of entries that came from the teacher, in [0, 1]."""
        return min(1.0, self.num_pushed / len(self.negatives))

    def push(self, keys: Tensor) -> None:
        """Replace the oldest entries by (N, D) unit vectors, N of any size; equal on all ranks."""
        size = len(self.negatives)
        self.num_pushed += len(keys)
        first = self.cursor + max(0, len(keys) - size)  # of more than K keys the last K stay
        keys = keys[-size:].to(self.negatives.dtype)
        rows = (first + torch.arange(len(keys), device=keys.device)) % size
        self.negatives[rows] = keys
        self.cursor = (first + len(keys)) % size

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to continue."""
        return {
            "negatives": self.negatives,
            "cursor": self.cursor,
            "num_pushed": self.num_pushed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a stored state of the same size and width."""
        self.negatives.copy_(state["negatives"])
        self.cursor = int(state["cursor"])
        self.num_pushed = int(state["num_pushed"])


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Return the (N, D) rows of all ranks in rank order; a collective.

    Args:
        rows: this rank's rows.
        counts: how many rows each rank has; None: all have as many.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = counts or [len(rows)] * dist.get_world_size()
    longest = max(counts)  # what travels is equally long on all ranks
    gathered = rows.new_empty(len(counts) * longest, rows.shape[1])
    dist.all_gather_into_tensor(gathered, F.pad(rows, (0, 0, 0, longest - len(rows))).contiguous())
    if min(counts) == longest:
        return gathered
    parts = gathered.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
