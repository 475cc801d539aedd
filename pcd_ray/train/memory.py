"""How much memory a worker will need, by counting."""

import torch
from torch import Tensor, nn

from pcd_ray.config import Config
from pcd_ray.distill.build import Method
from pcd_ray.distill.step import Branch
from pcd_ray.train.elastic import images_per_pass
from pcd_ray.train.run_scale import OPTIMIZER_COPIES, map_numbers


def activation_bytes(network: nn.Module, image_size_px: int) -> int:
    """Return the bytes of all layer outputs for one image: what a backward pass keeps."""
    total = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    was_training = network.training
    image = torch.zeros(1, image_size_px, image_size_px, 3, dtype=torch.uint8)
    with torch.no_grad():
        network.eval()(image)
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return total


def parameters_of(module: nn.Module) -> int:
    """Return how many numbers a module learns or could."""
    return sum(parameter.numel() for parameter in module.parameters())


def memory_gib(config: Config, method: Method) -> float:
    """Return the estimate for a worker, in GiB; `RunPlan` says of what."""
    images = images_per_pass(config.train)
    size = config.augment.image_size_px
    copies = 2 + OPTIMIZER_COPIES[config.optim.name]  # weights and gradients
    copies += bool(config.student.ema)
    teachers = sum(parameters_of(branch.teacher) for branch in method.branches)
    weights = 4 * (copies * parameters_of(method.student) + teachers)
    half = 0.5 if config.train.precision == "bf16" else 1.0
    activations = half * images * activation_bytes(method.student, size)
    negatives = [b.negatives for b in method.branches if b.negatives is not None]
    queues = sum(vectors.numel() * 4 for vectors in negatives)
    views = 2 * config.train.batch_size_per_worker * size * size * 3 * 4
    maps = 0
    if config.teacher.cache.views:  # in float16
        maps = 2 * config.train.batch_size_per_worker * sum(map(map_numbers, method.branches))
    pixels = 2 * 4 * images * sum(map(_compared_numbers, method.branches))  # the student's, theirs
    return (weights + activations + queues + views + maps + pixels) / 2**30


def _compared_numbers(branch: Branch) -> int:
    """Return D * H * W of a map on the grid of the loss."""
    height, width = branch.settings.grid or branch.teacher_map[1:]
    return branch.teacher.width(branch.teacher_map[0]) * height * width
