"""How any number of workers keeps the global batch."""

from pcd_ray.config import TrainConfig
from pcd_ray.data.plan import rank_sizes


def images_per_pass(train: TrainConfig) -> int:
    """Return the most images that a worker takes at once, however many workers there are."""
    return train.global_batch_size // (train.max_workers * train.accumulation_steps)


def passes_of(train: TrainConfig, num_workers: int) -> int:
    """Return how many parts so many workers cut their images of an optimiser step into.

    As many on every worker, so that what they do together meets. Where a pass holds one image and
    the batch does not split, the workers with one more take two in a pass.
    """
    sizes = rank_sizes(num_workers, train.global_batch_size)
    return min(-(-max(sizes) // images_per_pass(train)), min(sizes))


def elastic_line(train: TrainConfig, num_workers: int) -> str:
    """Say how an elastic run keeps its global batch with so many workers."""
    sizes = sorted(set(rank_sizes(num_workers, train.global_batch_size)))
    passes = passes_of(train, num_workers)
    return (
        f"{num_workers} of {train.min_workers} to {train.max_workers} workers: the global batch of "
        f"{train.global_batch_size} is kept as {' or '.join(map(str, sizes))} images each in "
        f"{passes} pass{'es' if passes > 1 else ''}; the learning rate stays"
    )
