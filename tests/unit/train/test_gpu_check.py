"""A GPU that torch cannot use is named with its fix before anything trains."""

import pytest
import torch

from pcd_ray.errors import ClusterError
from pcd_ray.train.ray_worker import check_gpu, unusable_gpu


def test_a_driver_that_is_too_old_is_named_with_the_version_that_torch_wants() -> None:
    text = unusable_gpu("node-7", "13.2", "The NVIDIA driver on your system is too old")
    assert text.startswith("node node-7 has a GPU that torch cannot use (The NVIDIA driver on your")
    assert "built for CUDA 13.2 there: update the NVIDIA driver" in text
    assert text.endswith("or set train.device=cpu")


def test_a_build_without_cuda_is_not_blamed_on_the_driver() -> None:
    text = unusable_gpu("node-7", None, "Torch not compiled with CUDA enabled")
    assert "built without CUDA there: install a build with CUDA" in text
    assert "update" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that works")
def test_a_process_without_a_working_gpu_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"has a GPU that torch cannot use \(\w.*\); torch is"):
        check_gpu()
