import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from pcd_ray.distill.mhsa import MhsaNeck
from pcd_ray.train.optim import (
    Schedule,
    build_optimizer,
    parameter_groups,
    peak_learning_rate,
    set_learning_rate,
)


@pytest.mark.parametrize(("peak", "final"), [(4.0, 0.0), (0.3, 0.1)])
def test_warm_up_is_a_line_and_the_rest_a_cosine(peak: float, final: float) -> None:
    schedule = Schedule(peak, warmup_steps=10, total_steps=110, final_fraction=final)
    for step in range(10):
        assert schedule.learning_rate(step) == pytest.approx(peak * (step + 1) / 11)
    for step in range(10, 110):
        cosine = (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        expected = peak * (final + (1 - final) * cosine)
        assert schedule.learning_rate(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.learning_rate(10) == peak
    assert schedule.learning_rate(60) == pytest.approx(peak * (1 + final) / 2)
    assert schedule.learning_rate(110) == pytest.approx(peak * final, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 7.0, 12.25])
def test_a_schedule_has_no_jump_rises_to_its_peak_and_falls(warmup: float) -> None:
    rates = [Schedule(1.0, warmup, 100, 0.0).learning_rate(step) for step in range(100)]
    top = rates.index(max(rates))
    assert top == math.ceil(warmup)
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    largest = max(abs(b - a) for a, b in pairwise(rates))
    assert largest <= max(1 / (warmup + 1) if warmup else 0, math.pi / 2 / (100 - warmup)) + 1e-9
    assert min(rates) > 0


def test_a_warm_up_longer_than_the_run_stays_finite() -> None:
    rates = [Schedule(1.0, 50, 20, 0.0).learning_rate(step) for step in range(20)]
    assert rates == pytest.approx([(step + 1) / 51 for step in range(20)])


@pytest.mark.parametrize(("batch", "peak"), [(1024, 4.0), (256, 1.0), (32, 0.125), (1, 1 / 256)])
def test_the_rate_is_per_256_images_and_never_rounds_to_zero(batch: int, peak: float) -> None:
    assert peak_learning_rate(1.0, batch) == peak
    assert Schedule(peak_learning_rate(1.0, batch), 10, 100, 0.0).learning_rate(0) > 0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), MhsaNeck(8, depth=1, heads=2))
    frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
    return nn.Sequential(body, frozen, nn.Conv2d(8, 4, 1))


def test_groups_hold_each_weight_that_trains_once_and_decay_matrices_alone() -> None:
    student = network()
    decayed, plain = parameter_groups(student, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    members = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert len(set(members)) == len(members)
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    expected = {id(p) for m in student.modules() if isinstance(m, norms) for p in m.parameters()}
    expected |= {id(p) for n, p in student.named_parameters() if n.endswith("bias")}
    expected &= {id(p) for p in student.parameters() if p.requires_grad}
    assert {id(p) for p in plain["params"]} == expected


@pytest.mark.parametrize(
    ("backbone", "named"),
    [
        ("test_vit", {"cls_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_positions_and_tokens_of_timm_models_are_neither_decayed_nor_adapted(
    backbone: str, named: set[str], optimizer: str
) -> None:
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1)} if "swin" in backbone else {}
    body = timm.create_model(backbone, num_classes=0, **small)
    student = nn.Sequential(nn.Sequential(body), nn.Conv2d(4, 2, 1))  # their names get a prefix
    decayed, plain = build_optimizer(optimizer, student, weight_decay=0.1).param_groups
    assert (plain["weight_decay"], plain.get("always_adapt", False)) == (0.0, False)
    found = {
        kind: {name.rpartition(".")[2] for name, p in student.named_parameters() if ids & {id(p)}}
        for kind, group in (("decayed", decayed), ("plain", plain))
        for ids in [{id(p) for p in group["params"]}]
    }
    assert found["decayed"] == {"weight"}
    assert found["plain"] >= named


def moved(name: str, weight_decay: float, steps: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weight before, gradient, and how far it moved, for each of a layer's two weights."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 4)
    optimizer = build_optimizer(name, layer, weight_decay=weight_decay)
    set_learning_rate(optimizer, 0.5)
    before = [p.detach().clone() for p in layer.parameters()]
    gradients = [torch.randn_like(p) for p in layer.parameters()]
    for _ in range(steps):
        for p, gradient in zip(layer.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    pairs = zip(before, layer.parameters(), strict=True)
    return [(b, g, p.detach() - b) for g, (b, p) in zip(gradients, pairs, strict=True)]


@pytest.mark.parametrize("decay", [0.0, 1e-5, 0.1])
def test_lars_scales_weights_to_their_own_norm_and_leaves_biases_alone(decay: float) -> None:
    (weight, gradient, step), (_, bias_gradient, bias_step) = moved("lars", decay)
    trust = 1e-3 * weight.norm() / (gradient.norm() + decay * weight.norm())
    torch.testing.assert_close(step, -0.5 * trust * (gradient + decay * weight))
    torch.testing.assert_close(bias_step, -0.5 * bias_gradient)  # plain, undecayed


def test_lars_has_a_momentum_of_nine_tenths() -> None:
    _, (_, gradient, one) = moved("lars", 0.0, steps=1)
    _, (_, _, two) = moved("lars", 0.0, steps=2)
    torch.testing.assert_close(two - one, -0.5 * 1.9 * gradient)


def test_adamw_decays_weights_and_no_biases() -> None:
    for decay in (0.0, 0.1):
        (weight, gradient, step), (_, bias_gradient, bias_step) = moved("adamw", decay)
        # the first step of Adam is the sign of the gradient
        expected = -0.5 * (gradient.sign() + decay * weight)
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias_step, -0.5 * bias_gradient.sign(), rtol=1e-4, atol=1e-5)


def test_every_group_gets_the_rate() -> None:
    optimizer = build_optimizer("lars", network(), weight_decay=1e-5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
