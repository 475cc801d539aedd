from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute small things on one thread: on a busy machine threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batchnorm_state(prefix: str, width: int, *, affine: bool = True) -> dict[str, Tensor]:
    """Keys and values of a BatchNorm layer that has seen data."""
    layer = nn.BatchNorm1d(width, affine=affine)
    layer(torch.randn(8, width))
    return {f"{prefix}.{key}": value for key, value in layer.state_dict().items()}


@pytest.fixture(scope="package")
def mocov3_tensors() -> dict[str, Tensor]:
    """MoCo v3's ResNet-50 state dict as published, with random values.

    Its code names the layers so: three networks inside DistributedDataParallel, the encoders'
    ``fc`` replaced by an MLP whose last BatchNorm has no affine part, a predictor without one.
    """
    torch.manual_seed(0)
    body = timm.create_model("resnet50", num_classes=0).state_dict()
    head = {
        "fc.0.weight": torch.randn(4096, 2048) / 45,
        **batchnorm_state("fc.1", 4096),
        "fc.3.weight": torch.randn(256, 4096) / 64,
        **batchnorm_state("fc.4", 256, affine=False),
    }
    predictor = {
        "0.weight": torch.randn(4096, 256) / 16,
        **batchnorm_state("1", 4096),
        "3.weight": torch.randn(256, 4096) / 64,
    }
    # the online network: the same names, other values (zeros, which take no room in a file)
    online = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in (body | head).items()}
    return {
        **{f"module.base_encoder.{key}": value for key, value in online.items()},
        **{f"module.momentum_encoder.{key}": value for key, value in (body | head).items()},
        **{f"module.predictor.{key}": value for key, value in predictor.items()},
    }


@pytest.fixture(scope="package")
def mocov3_file(
    mocov3_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The published container around it: epoch, arch, state dict, optimiser."""
    path = tmp_path_factory.mktemp("mocov3") / "r-50-1000ep.pth.tar"
    momentum = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 1000, "arch": "resnet50", "state_dict": mocov3_tensors}
    torch.save({**content, "optimizer": momentum}, path)
    return path
