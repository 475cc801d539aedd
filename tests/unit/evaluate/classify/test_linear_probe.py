"""Laws of the linear probe, against scikit-learn and against torch's own optimiser."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pcd_ray.errors import EvaluationError, ShardError
from pcd_ray.evaluate.classify.linear_probe import (
    LinearSettings,
    ProbeState,
    ProbeTask,
    chosen,
    fit_cached,
    held_out_rows,
    probe_steps,
)

CPU = torch.device("cpu")
SETTINGS = LinearSettings(
    epochs=20,
    global_batch_size=32,
    base_lrs=(0.01, 0.1, 1.0),
    held_out_fraction=0.2,
    standardise=True,
    seed=0,
)


def labelled(count: int, *, seed: int, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Return features of four overlapping classes, not 0 to 3, of channels of unlike spread."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, channels, generator=generator)
    spread = torch.logspace(-1, 2, channels)
    return (noise + 1.5 * torch.eye(4, channels)[labels]) * spread + 5, 10 * labels + 3


def test_enough_steps_reach_the_optimum_that_scikit_learn_finds() -> None:
    (train, labels), (test, truth) = labelled(400, seed=0), labelled(300, seed=1)
    settings = replace(SETTINGS, epochs=600, global_batch_size=400, base_lrs=(0.5,))
    found = fit_cached(train, labels, settings, device=CPU).classifier

    scaled = ((x - train.mean(0)) / train.std(0, correction=0) for x in (train, test))
    x_train, x_test = (x.double().numpy() for x in scaled)
    reference = LogisticRegression(C=1e9, tol=1e-10, max_iter=10_000).fit(x_train, labels.numpy())
    assert found.labels.tolist() == reference.classes_.tolist()
    probability = (test @ found.weight + found.bias).softmax(dim=1)
    expected = torch.from_numpy(reference.predict_proba(x_test)).float()
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-3)
    accuracy = found.hits(test, truth, top=1).double().mean()
    assert abs(float(accuracy) - reference.score(x_test, truth.numpy())) <= 1 / 300


def test_side_by_side_is_each_rate_alone() -> None:
    train, labels = labelled(150, seed=0)
    together = _trained(train, labels, SETTINGS)
    count = len(SETTINGS.base_lrs)
    for place, rate in enumerate(SETTINGS.base_lrs):
        alone = _trained(train, labels, replace(SETTINGS, base_lrs=(rate,)))
        for mine, other in ((place, 0), (count + place, 1)):
            torch.testing.assert_close(together.weight[:, mine], alone.weight[:, other])
            torch.testing.assert_close(together.bias[mine], alone.bias[other])


@pytest.mark.parametrize("sees_all", [False, True])
def test_each_classifier_is_what_torch_trains_on_its_images(sees_all: bool) -> None:
    train, labels = labelled(150, seed=0)
    task = ProbeTask.of(train, labels, SETTINGS)
    state = _trained(train, labels, SETTINGS)
    scaled = (train - train.mean(0)) / train.std(0, correction=0)
    for place, rate in enumerate(SETTINGS.base_lrs):
        model = torch.nn.Linear(6, 4)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for step, (_, rows) in enumerate(task.cached_batches(train)):
            kept = rows if sees_all else rows[~task.held_out[rows]]
            cosine = 0.5 * (1 + math.cos(math.pi * step / task.num_steps))
            optimizer.param_groups[0]["lr"] = rate * 32 / 256 * cosine
            optimizer.zero_grad()
            F.cross_entropy(model(scaled[kept]), (labels[kept] - 3) // 10).backward()
            optimizer.step()
        mine = place + len(SETTINGS.base_lrs) * sees_all
        torch.testing.assert_close(state.weight[:, mine], model.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.bias[mine], model.bias, rtol=1e-4, atol=1e-5)


def test_all_training_images_set_the_statistics_for_both_classifiers() -> None:
    train, labels = labelled(150, seed=0)
    task = ProbeTask.of(train, labels, SETTINGS)
    torch.testing.assert_close(task.mean, train.mean(0))
    torch.testing.assert_close(task.std, train.std(0, correction=0))


def test_labels_of_held_out_images_move_the_choice_alone() -> None:
    train, labels = labelled(150, seed=0)
    task = ProbeTask.of(train, labels, SETTINGS)
    state = _trained(train, labels, SETTINGS)
    turned = torch.where(task.held_out, (task.targets + 1) % 4, task.targets)
    other = replace(task, targets=turned)
    changed = _stepped(other, train)
    count = len(SETTINGS.base_lrs)
    assert torch.equal(changed.weight[:, :count], state.weight[:, :count])
    assert not torch.equal(changed.weight[:, count:], state.weight[:, count:])
    before, after = (chosen(t, state, train).held_out_top1_pct for t in (task, other))
    assert all(after[rate] < before[rate] for rate in SETTINGS.base_lrs)


def test_the_rate_chosen_is_the_best_on_held_out_images_and_said_when_at_the_edge() -> None:
    train, labels = labelled(150, seed=0)
    settings = replace(SETTINGS, base_lrs=(1e-9, 0.1, 1e-8))
    probe = fit_cached(train, labels, settings, device=CPU)
    assert list(probe.held_out_top1_pct) == [1e-9, 0.1, 1e-8]
    assert max(probe.held_out_top1_pct.values()) == probe.held_out_top1_pct[probe.base_lr]
    assert (probe.base_lr, probe.at_edge) == (0.1, True)
    assert not fit_cached(
        train, labels, replace(settings, base_lrs=(1e-9, 0.1, 1e9)), device=CPU
    ).at_edge
    assert not fit_cached(train, labels, replace(settings, base_lrs=(0.1,)), device=CPU).at_edge


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_a_rate_that_diverges_is_never_chosen(value: float, half: int) -> None:
    train, labels = labelled(150, seed=0)
    task = ProbeTask.of(train, labels, SETTINGS)
    state = _trained(train, labels, SETTINGS)
    state.weight.neg_()  # the finite ones are as wrong as they can be
    state.bias.neg_()
    state.weight[:, half * len(SETTINGS.base_lrs), 1] = value
    probe = chosen(task, state, train)
    assert probe.base_lr in (0.1, 1.0)
    assert (list(probe.held_out_top1_pct), probe.diverged) == ([0.1, 1.0], (0.01,))
    assert bool(probe.classifier.weight.isfinite().all())


@pytest.mark.parametrize("standardise", [True, False])
def test_a_probe_that_diverges_at_all_rates_is_refused(standardise: bool) -> None:
    train, labels = labelled(150, seed=0)
    settings = replace(SETTINGS, base_lrs=(2e38, 3e38), standardise=standardise)
    fix = "" if standardise else r", or set eval\.linear\.standardise=true"
    message = rf"eval\.linear\.base_lrs=\[2e\+38, 3e\+38\]: .* diverges .* give smaller ones{fix}$"
    with pytest.raises(EvaluationError, match=message):
        fit_cached(train, labels, settings, device=CPU)


def test_equal_seeds_give_equal_probes_and_others_do_not() -> None:
    train, labels = labelled(150, seed=0)
    first, again, other = (
        fit_cached(train, labels, replace(SETTINGS, seed=seed), device=CPU).classifier.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_going_on_from_a_state_is_not_noticed() -> None:
    train, labels = labelled(150, seed=0)
    task = ProbeTask.of(train, labels, SETTINGS)
    batches = list(task.cached_batches(train))
    state = ProbeState.new(task, CPU)
    for part in (batches[:7], batches[7:]):
        for _ in probe_steps(task, state, part):
            pass
    assert torch.equal(state.weight, _trained(train, labels, SETTINGS).weight)
    assert state.step == task.num_steps == math.ceil(20 * 150 / 32)


def test_standardised_probes_do_not_depend_on_scale_and_shift_of_channels() -> None:
    (train, labels), (test, truth) = labelled(150, seed=0), labelled(200, seed=1)
    scale, shift = torch.logspace(-2, 2, 6), torch.linspace(-3, 3, 6)
    plain = fit_cached(train, labels, SETTINGS, device=CPU)
    moved = fit_cached(train * scale + shift, labels, SETTINGS, device=CPU)
    logits = test @ plain.classifier.weight + plain.classifier.bias
    others = (test * scale + shift) @ moved.classifier.weight + moved.classifier.bias
    torch.testing.assert_close(logits, others, rtol=1e-3, atol=1e-3)
    assert plain.classifier.hits(test, truth, top=1).double().mean() > 0.4


def test_a_channel_that_never_varies_does_no_harm() -> None:
    train, labels = labelled(150, seed=0)
    constant = torch.cat([train, torch.full((150, 1), 7.0)], dim=1)
    weight = fit_cached(constant, labels, SETTINGS, device=CPU).classifier.weight
    assert torch.equal(weight[6], torch.zeros(4))


def test_top_5_holds_top_1_and_unknown_labels_are_never_right() -> None:
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(200, 6, generator=generator), torch.arange(200) % 8
    found = fit_cached(train, labels, SETTINGS, device=CPU).classifier
    top1, top5 = (found.hits(train, labels, top=top) for top in (1, 5))
    assert bool((top5 | ~top1).all())
    assert int(top5.sum()) > int(top1.sum())
    assert bool(found.hits(train, labels, top=8).all())
    assert not bool(found.hits(train, labels + 50, top=8).any())


def test_held_out_images_are_a_share_of_each_class() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    held_out = held_out_rows(targets, 0.1, seed=0)
    assert targets[held_out].bincount().tolist() == [6, 3, 1]
    assert not torch.equal(held_out, held_out_rows(targets, 0.1, seed=1))
    assert int(held_out_rows(torch.tensor([0, 1, 1]), 0.1, seed=0).sum()) == 1
    assert int(held_out_rows(torch.tensor([0, 1]), 0.5, seed=0).sum()) == 1


def test_one_class_and_features_that_are_not_finite_are_refused() -> None:
    train, labels = labelled(20, seed=0)
    with pytest.raises(ShardError, match=r"eval\.knn_train has 1 class; give images of two"):
        fit_cached(train, torch.zeros(20).long(), SETTINGS, device=CPU)
    train[3, 2] = float("inf")
    with pytest.raises(EvaluationError, match="1 of 20 images have infinite or NaN"):
        fit_cached(train, labels, SETTINGS, device=CPU)


def _trained(train: Tensor, labels: Tensor, settings: LinearSettings) -> ProbeState:
    return _stepped(ProbeTask.of(train, labels, settings), train)


def _stepped(task: ProbeTask, train: Tensor) -> ProbeState:
    state = ProbeState.new(task, CPU)
    for _ in probe_steps(task, state, task.cached_batches(train)):
        pass
    return state
