import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pcd_ray.errors import ConfigError, EvaluationError, ShardError
from pcd_ray.evaluate.classify import knn
from pcd_ray.evaluate.classify.knn import knn_hits, knn_top1_pct


def _labelled(count: int, *, seed: int, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Return noisy features of five classes whose labels are not 0 to 4."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    noise = torch.randn(count, channels, generator=generator)
    return noise + 1.5 * torch.eye(5, channels)[labels], 10 * labels + 3


def _brute_force_pct(
    train: NDArray[np.float64],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float64],
    test_labels: NDArray[np.int64],
    *,
    k: int,
    temperature: float,
) -> float:
    right = 0
    for row, truth in zip(test, test_labels, strict=True):
        cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        votes: dict[int, float] = {}
        for index in np.argsort(-cosine, kind="stable")[:k]:
            label = int(train_labels[index])
            votes[label] = votes.get(label, 0.0) + float(np.exp(cosine[index] / temperature))
        right += max(sorted(votes), key=lambda label: votes[label]) == truth
    return 100 * right / len(test)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force(temperature: float) -> None:
    train, train_labels = _labelled(120, seed=0)
    test, test_labels = _labelled(77, seed=1)
    ks = (1, 5, 20, 120)
    found = knn_top1_pct(train, train_labels, test, test_labels, ks=ks, temperature=temperature)
    arrays = (
        train.double().numpy(),
        train_labels.numpy(),
        test.double().numpy(),
        test_labels.numpy(),
    )
    expected = {k: _brute_force_pct(*arrays, k=k, temperature=temperature) for k in ks}
    assert found == expected
    assert len(set(found.values())) > 1  # the ks differ, so the comparison means something


@pytest.mark.parametrize("k", [1, 10, 20, 100, 200])
def test_equals_scikit_learn(k: int) -> None:
    train, train_labels = _labelled(300, seed=0)
    test, test_labels = _labelled(150, seed=1)
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(train.double().numpy(), train_labels.numpy())
    expected = reference.predict(test.double().numpy()) == test_labels.numpy()
    found = knn_hits(train, train_labels, test, test_labels, ks=[k])[k]
    assert found.tolist() == expected.tolist()
    assert 0 < expected.sum() < 150


def test_voters_compared_block_by_block_are_those_compared_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = (*_labelled(120, seed=0, channels=4), *_labelled(77, seed=1, channels=4))
    grid = tuple(values.sign() if values.is_floating_point() else values for values in data)
    ks = (1, 20, 50, 120)
    for given in (data, grid):  # on the grid, cosines are exact and many neighbours equally near
        whole = knn_hits(*given, ks=ks)
        with monkeypatch.context() as patch:
            patch.setattr(knn, "_MAX_VOTERS", 7)
            blocks = knn_hits(*given, ks=ks)
        assert all(torch.equal(whole[k], blocks[k]) for k in ks)


def test_the_numbers_do_not_depend_on_which_ks_are_asked_together() -> None:
    data = (*_labelled(60, seed=0), *_labelled(40, seed=1))
    together = knn_top1_pct(*data, ks=(20, 1, 7))
    assert list(together) == [20, 1, 7]
    assert together == {k: knn_top1_pct(*data, ks=[k])[k] for k in (20, 1, 7)}


def test_more_queries_than_fit_a_chunk_are_the_sum_of_their_parts() -> None:
    train, train_labels = _labelled(4200, seed=0)
    test, test_labels = _labelled(5000, seed=1)  # 21 M similarities: two chunks
    whole = knn_top1_pct(train, train_labels, test, test_labels, ks=[20])[20]
    halves = [
        knn_top1_pct(train, train_labels, test[part], test_labels[part], ks=[20])[20]
        for part in (slice(0, 2500), slice(2500, 5000))
    ]
    assert whole == pytest.approx(sum(halves) / 2, abs=1e-9)
    assert halves[0] != halves[1]


def test_two_far_neighbours_outvote_a_near_one_only_at_a_high_temperature() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # cosines 1, 0.6, 0.6
    labels = torch.tensor([7, 4, 4])
    query, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([4])
    warm = knn_top1_pct(train, labels, query, truth, ks=[1, 3], temperature=1.0)
    assert warm == {1: 0, 3: 100}  # 2 exp(0.6) > exp(1)
    cold = knn_top1_pct(train, labels, query, truth, ks=[1, 3], temperature=0.07)
    assert cold == {1: 0, 3: 0}  # 2 exp(0.6 / 0.07) < exp(1 / 0.07)


def test_a_tie_of_votes_goes_to_the_smaller_label() -> None:
    train = torch.tensor([[0.6, 0.8], [0.6, -0.8]])
    query = torch.tensor([[1.0, 0.0]])
    for labels in ([5, 2], [2, 5]):
        found = knn_top1_pct(train, torch.tensor(labels), query, torch.tensor([2]), ks=[2])
        assert found == {2: 100}


def test_among_equal_neighbours_the_earlier_row_is_nearer() -> None:
    train = torch.ones(9, 4)  # a collapsed network: all features are equal
    labels = torch.tensor([6, 6, 6, 1, 1, 1, 1, 1, 1])
    found = knn_top1_pct(train, labels, torch.ones(2, 4), torch.tensor([6, 6]), ks=[1, 3, 5, 9])
    assert found == {1: 100, 3: 100, 5: 100, 9: 0}


def test_a_tiny_temperature_is_one_neighbour_and_does_not_overflow() -> None:
    train, train_labels = _labelled(50, seed=0)
    test, test_labels = _labelled(50, seed=1)
    found = knn_top1_pct(train, train_labels, test, test_labels, ks=[1, 20], temperature=1e-5)
    assert found[20] == found[1]


def test_only_directions_count() -> None:
    train, train_labels = _labelled(50, seed=0)
    test, test_labels = _labelled(50, seed=1)
    scales = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    assert knn_top1_pct(train * scales, train_labels, test, test_labels, ks=[5]) == knn_top1_pct(
        train, train_labels, test * scales, test_labels, ks=[5]
    )


def test_a_label_without_training_images_is_never_right() -> None:
    ones = torch.ones(3, 2)
    found = knn_top1_pct(ones, torch.zeros(3).long(), ones, torch.tensor([0, 9, 9]), ks=[1])
    assert found[1] == pytest.approx(100 / 3)


@pytest.mark.parametrize("ks", [(1, 13), (0,), ()])
def test_impossible_numbers_of_neighbours_are_refused(ks: tuple[int, ...]) -> None:
    data = (*_labelled(12, seed=0), *_labelled(4, seed=1))
    with pytest.raises(
        ConfigError, match=r"k=\[.*\] with 12 images that vote; use k between 1 and 12"
    ):
        knn_top1_pct(*data, ks=ks)


def test_features_that_are_not_finite_are_refused_on_either_side() -> None:
    good, labels = _labelled(4, seed=0)
    bad = good.clone()
    bad[2, 1] = float("nan")
    for train, test in ((bad, good), (good, bad)):
        with pytest.raises(EvaluationError, match="1 of 4 images have infinite or NaN"):
            knn_top1_pct(train, labels, test, labels, ks=[1])


def test_an_empty_test_set_is_refused() -> None:
    train, labels = _labelled(4, seed=0)
    with pytest.raises(ShardError, match="0 test images"):
        knn_top1_pct(train, labels, train[:0], labels[:0], ks=[1])


@pytest.mark.parametrize("k", [1, 3, 7])
def test_leaving_one_out_is_classifying_each_image_by_all_others(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    features = torch.randn(20, 5, generator=random)
    features[7] = features[3]  # two equal images vote for each other
    labels = torch.randint(0, 4, (20,), generator=random)
    one_by_one = []
    for row in range(20):
        others = torch.arange(20) != row
        hit = knn_hits(
            features[others], labels[others], features[row : row + 1], labels[row : row + 1], ks=[k]
        )
        one_by_one.append(hit[k])
    found = knn_hits(features, labels, features, labels, ks=[k], leave_one_out=True)[k]
    assert found.tolist() == torch.cat(one_by_one).tolist()


def test_of_many_equal_images_one_that_is_not_among_its_neighbours_loses_the_farthest() -> None:
    features, labels = torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    found = knn_hits(features, labels, features, labels, ks=[2], leave_one_out=True)[2]
    assert found.tolist() == [True, True, True, False, False, False]  # the first two others vote


def test_an_image_cannot_vote_for_itself() -> None:
    features, labels = torch.eye(3), torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="use k between 1 and 2"):
        knn_hits(features, labels, features, labels, ks=[3], leave_one_out=True)
