import pytest
import torch
from torch import Tensor, nn

from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.features import frozen_map, pooled_features


def _stride_two(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)[:, :, ::2, ::2].float()


def test_pooling_is_the_mean_over_positions_in_the_order_of_images() -> None:
    images = torch.arange(5 * 4 * 6 * 3).remainder(251).to(torch.uint8).view(5, 4, 6, 3)
    pooled = pooled_features(_stride_two, [images[:2], images[2:]])
    torch.testing.assert_close(pooled, images[:, ::2, ::2].float().mean(dim=(1, 2)))


def test_half_precision_maps_are_pooled_in_float32() -> None:
    value = torch.full(
        (1, 1, 64, 64), 3.0, dtype=torch.float16
    )  # float16 sums 4096 x 3 to infinity
    pooled = pooled_features(
        lambda images: value * 1000 + 0 * images.sum(), [torch.zeros(1, 1, 1, 3)]
    )
    assert pooled.dtype == torch.float32
    assert pooled.item() == 3000


def test_images_with_infinite_features_are_counted_and_refused() -> None:
    def diverged(images: Tensor) -> Tensor:
        features = _stride_two(images)
        features[1, 0, 0, 0] = float("inf")
        features[3, 2] = float("nan")
        return features

    with pytest.raises(
        EvaluationError, match=r"2 of 4 images have infinite or NaN values.*base_lr"
    ):
        pooled_features(diverged, [torch.zeros(4, 4, 4, 3, dtype=torch.uint8)])


def test_no_images_is_an_error() -> None:
    with pytest.raises(ShardError, match=r"0 images.*at least one"):
        pooled_features(_stride_two, [])


def test_a_network_in_train_mode_is_refused_and_its_statistics_stay() -> None:
    network = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="train mode"):
        frozen_map(network, torch.ones(2, 3, 4, 4))
    assert network.running_mean is not None
    assert network.running_mean.tolist() == [0, 0, 0]


def test_no_gradient_reaches_the_network() -> None:
    network = nn.Conv2d(3, 2, 1).eval()
    assert not frozen_map(network, torch.ones(1, 3, 2, 2)).requires_grad


def test_images_follow_a_module_to_its_device() -> None:
    network = nn.Conv2d(3, 2, 1, device="meta").eval()
    with pytest.raises(RuntimeError, match=r"item.* cannot be called on meta tensors"):
        frozen_map(network, torch.ones(1, 3, 2, 2))
