import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.distill.fitted_head import contrastive_head, pca_head
from pcd_ray.distill.spatial_adaptor import SpatialAdaptor, law_error
from pcd_ray.errors import WeightsError

SETTINGS = {"hidden": 64, "dim": 16, "temperature": 0.2, "seed": 0}


def views_of_images(seed: int, images: int = 2000, views: int = 4) -> Tensor:
    """Features (V, N, 24): eight channels tell the image, sixteen louder ones the view."""
    random = torch.Generator().manual_seed(seed)
    identity = torch.randn(1, images, 8, generator=random).expand(views, -1, -1)
    nuisance = 3 * torch.randn(views, images, 16, generator=random)
    return torch.cat([identity, nuisance], dim=2)


def retrieval_pct(one: Tensor, other: Tensor) -> float:
    nearest = (F.normalize(one, dim=1) @ F.normalize(other, dim=1).T).argmax(dim=1)
    return 100 * (nearest == torch.arange(len(one))).float().mean().item()


def test_it_learns_what_views_of_an_image_share_also_of_images_never_seen() -> None:
    fitted = contrastive_head(views_of_images(0), steps=400, **SETTINGS)
    new = views_of_images(1, images=200)
    before = retrieval_pct(new[0], new[1])
    with torch.no_grad():
        after = retrieval_pct(fitted.head(new[0]), fitted.head(new[1]))
    assert before < 10  # chance is 0.5
    assert after > 60
    assert fitted.top1_pct > 60


def test_the_same_features_and_seed_give_the_same_head_and_others_another() -> None:
    features = views_of_images(0, images=30)
    heads = [
        contrastive_head(features, steps=5, **(SETTINGS | {"seed": seed})).head
        for seed in (3, 3, 4)
    ]
    same, again, other = (head(features[0]) for head in heads)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not heads[0].training
    assert not any(p.requires_grad for p in heads[0].parameters())


def test_fitting_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    contrastive_head(views_of_images(0, images=8), steps=2, **SETTINGS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("rule", ["gate", "tangent"])
def test_spatial_adaptor_keeps_its_mean(rule: str) -> None:
    head = contrastive_head(views_of_images(0), steps=20, **SETTINGS).head
    maps = torch.randn(3, 24, 5, 4)
    assert law_error(SpatialAdaptor(head, rule=rule), maps) < 1e-12  # float64 rounding


@pytest.mark.parametrize(
    ("features", "story"),
    [
        (torch.randn(1, 9, 24), "at least 2 views of 2 images, got 1 of 9"),
        (torch.randn(3, 1, 24), "at least 2 views of 2 images, got 3 of 1"),
        (torch.ones(2, 9, 24), "do not vary .*or use larger images"),
    ],
)
def test_features_that_teach_nothing_are_refused(features: Tensor, story: str) -> None:
    with pytest.raises(WeightsError, match=story):
        contrastive_head(features, steps=2, **SETTINGS)


def pixels(count: int = 400, channels: int = 9) -> Tensor:
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=random, dtype=torch.float64)
    rows = torch.randn(count, channels, generator=random, dtype=torch.float64) @ mixing
    return (rows + torch.arange(channels)).float()


def numpy_pca(rows: Tensor, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return projections and standard deviations of the first components, signs as they fall."""
    centred = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    _, deviations, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:dim].T, deviations[:dim] / np.sqrt(len(rows) - 1)


@pytest.mark.parametrize("dim", [1, 4, 9])
def test_pca_is_numpys(dim: int) -> None:
    rows = pixels()
    got = pca_head(rows, dim=dim, whiten=0.0)(rows).detach().double().numpy()
    expected, deviations = numpy_pca(rows, dim)
    signs = np.sign((got * expected).sum(axis=0))
    np.testing.assert_allclose(got, expected * signs, atol=2e-5)  # weights are kept in float32
    np.testing.assert_allclose(got.std(axis=0, ddof=1), deviations, rtol=1e-5)
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("whiten", [0.5, 1.0])
def test_whitening_divides_by_a_power_of_the_deviation_relative_to_the_first(whiten: float) -> None:
    rows = pixels()
    got = pca_head(rows, dim=5, whiten=whiten)(rows).detach().numpy().std(axis=0, ddof=1)
    _, deviations = numpy_pca(rows, 5)
    expected = deviations / (deviations / deviations[0]) ** whiten
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_signs_of_components_do_not_depend_on_the_order_of_the_pixels() -> None:
    rows = pixels()
    one, other = (pca_head(r, dim=6, whiten=0.0) for r in (rows, rows.flip(0)))
    torch.testing.assert_close(one[0].weight, other[0].weight, rtol=1e-5, atol=1e-6)
    strongest = one[0].weight.gather(1, one[0].weight.abs().argmax(1, keepdim=True))
    assert (strongest > 0).all()


def test_more_components_than_the_pixels_hold_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"teacher.fit.dim=10 exceeds .* use at most 9"):
        pca_head(pixels(), dim=10, whiten=0.0)
    with pytest.raises(WeightsError, match=r"teacher.fit.dim=5 exceeds .* use at most 4"):
        pca_head(pixels(count=5), dim=5, whiten=0.0)
    with pytest.raises(WeightsError, match=r"do not vary .*or use larger images"):
        pca_head(torch.ones(50, 9), dim=3, whiten=0.0)
