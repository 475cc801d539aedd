"""What a run asks of a cluster, in closed form: bytes, cores and seconds. Arithmetic alone.

Letters: N images, G global batch, W workers (a GPU each), D embedding channels, K queued vectors,
P trained weights, S pixels per side of a view. Numbers are float32 unless said otherwise.
"""

import math
from dataclasses import asdict, dataclass

_BOXES_AND_PLACE = 2 * 5 * 4 + 2 * 8
"""Bytes beside an image's views: two boxes (5 float32 each), its row and its epoch (int64)."""
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is trained, counted."""

    images: int
    """Packed images, N."""
    images_per_epoch: int
    epochs: int
    image_bytes: float
    """Mean of an encoded image."""
    index_bytes: float
    """Memory of the image index, per image."""
    image_size_px: int
    """S."""
    views: int
    """Views that travel to the worker: 1 where one serves both networks, or maps are stored."""
    map_bytes: int
    """Stored maps that a worker reads per image; 0: the teacher runs."""
    images_per_task: int
    """Images in a block of views."""
    blocks_ahead: int
    """Blocks kept ready for a worker beside the one that it takes."""
    global_batch_size: int
    """G."""
    num_workers: int
    """W."""
    trained_weights: int
    """P."""
    student_bytes: int
    """Weights and statistics of the student."""
    optimizer_copies: int
    """Of the trained weights: what the optimiser keeps."""
    average: bool
    """Whether a moving average of the student is kept."""
    key_width: int
    """D, the sum over the teachers whose vectors are queued."""
    queue_bytes: int
    """K x D numbers, the sum over the teachers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """What it runs on: measured, or assumed until it is."""

    cpu_ms_per_image: float
    """CPU time of reading, decoding and augmenting one image."""
    images_per_s_per_worker: float
    """Images per second that one worker trains when data does not keep it waiting."""
    network_gbit_per_s: float
    """Bandwidth of a node."""
    workers_per_node: int
    """Workers (GPUs) of a node."""
    data_node_cores: int
    """Cores of a node that makes views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What it comes to, all workers together unless a name says otherwise."""

    images_per_s: float
    epoch_hours: float
    run_hours: float
    read_bytes_per_image: float
    """Encoded, from storage to a data task."""
    sent_bytes_per_image: float
    """Views, boxes and place, uint8 and uncompressed, from a data task to a worker."""
    storage_reads_per_s: float
    """Ranges read, one per image."""
    storage_mib_per_s: float
    data_cores_per_worker: float
    data_cores: float
    data_nodes: int
    views_gbit_per_s_per_node: float
    """Into a node of workers."""
    network_share_of_views: float
    """That, as a share of the node's bandwidth; the step itself needs some too."""
    object_store_gib_per_node: float
    """What a node of workers holds: blocks of views, and the index."""
    gather_mib_per_step: float
    """Keys that one worker receives for its queue."""
    gather_ms_per_step: float
    """On the network; 0 inside one node."""
    allreduce_mib_per_step: float
    """Gradients that one worker sends, and receives, in a ring."""
    allreduce_ms_per_step: float
    """The same; mostly hidden behind the backward pass."""
    step_ms: float
    """What a step may take for the images per second above."""
    checkpoint_mib: float
    index_gib_per_worker: float
    """The image index in each worker's memory; each also shares a copy with its data tasks."""

    def summary(self) -> dict[str, float]:
        """Return plain numbers, rounded to what they are worth: four digits."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def scale_of(work: Workload, machines: Machines) -> Scale:
    """Return what a run asks for."""
    rate = machines.images_per_s_per_worker * work.num_workers
    workers_per_node = min(work.num_workers, machines.workers_per_node)
    sent = sent_bytes_per_image(work)
    node_rate = machines.images_per_s_per_worker * workers_per_node
    views_gbit = 8 * sent * node_rate / 1e9
    cores = machines.cpu_ms_per_image / 1000 * rate
    gather, reduce = gather_bytes(work), allreduce_bytes(work)
    # a ring passes from node to node once, whatever a node's workers; inside one it stays
    spans_nodes = work.num_workers > machines.workers_per_node
    network_ms = spans_nodes * 8000 / (machines.network_gbit_per_s * 1e9)  # per byte
    epoch_hours = work.images_per_epoch / rate / 3600
    return Scale(
        images_per_s=rate,
        epoch_hours=epoch_hours,
        run_hours=epoch_hours * work.epochs,
        read_bytes_per_image=work.image_bytes,
        sent_bytes_per_image=sent,
        storage_reads_per_s=rate,
        storage_mib_per_s=work.image_bytes * rate / _MIB,
        data_cores_per_worker=cores / work.num_workers,
        data_cores=cores,
        data_nodes=math.ceil(cores / machines.data_node_cores),
        views_gbit_per_s_per_node=views_gbit,
        network_share_of_views=views_gbit / machines.network_gbit_per_s,
        object_store_gib_per_node=workers_per_node * store_bytes_per_worker(work) / _GIB,
        gather_mib_per_step=gather / _MIB,
        gather_ms_per_step=gather * network_ms,
        allreduce_mib_per_step=reduce / _MIB,
        allreduce_ms_per_step=reduce * network_ms,
        step_ms=1000 * work.global_batch_size / rate,
        checkpoint_mib=checkpoint_bytes(work) / _MIB,
        index_gib_per_worker=work.index_bytes * work.images / _GIB,
    )


def sent_bytes_per_image(work: Workload) -> int:
    """Return the bytes that travel to a worker per image: 3 S^2 per view, maps, boxes, place."""
    pixels = work.views * 3 * work.image_size_px**2
    return pixels + work.map_bytes + _BOXES_AND_PLACE


def store_bytes_per_worker(work: Workload) -> float:
    """Return what lies in the object store for one worker: blocks ahead, its own, the index."""
    block = work.images_per_task * sent_bytes_per_image(work)
    return (work.blocks_ahead + 1) * block + work.index_bytes * work.images


def gather_bytes(work: Workload) -> float:
    """Return the key bytes that a worker receives per step: those of the others, 4 D each."""
    return 4 * work.key_width * work.global_batch_size * (1 - 1 / work.num_workers)


def allreduce_bytes(work: Workload) -> float:
    """Return the gradient bytes that a worker sends per step in a ring, 2 (1 - 1 / W) 4 P."""
    return 2 * (1 - 1 / work.num_workers) * 4 * work.trained_weights


def checkpoint_bytes(work: Workload) -> int:
    """Return the bytes of a checkpoint: student, its average, optimiser, queues."""
    students = 2 if work.average else 1
    optimizer = 4 * work.optimizer_copies * work.trained_weights
    return students * work.student_bytes + optimizer + work.queue_bytes


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")
