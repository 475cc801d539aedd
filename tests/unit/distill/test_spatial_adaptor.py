from itertools import pairwise

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.distill.spatial_adaptor import SpatialAdaptor, check_law, law_error
from pcd_ray.errors import ConfigError, WeightsError

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(0.01),
}
NORMS = ("none", "batch", "batch_plain", "layer")
ROUNDING = 1e-12  # float64: a few hundred additions


def mlp(seed: int, widths: list[int], act: str, norm: str) -> nn.Sequential:
    """A head in float64 and eval mode whose statistics are not those of a new one."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (width, out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(width, out, bias=norm != "batch"))
        if norm.startswith("batch"):
            layers.append(nn.BatchNorm1d(out, affine=norm == "batch"))
        if norm == "layer":
            layers.append(nn.LayerNorm(out))
        if index < len(widths) - 2:
            layers.append(ACTIVATIONS[act])
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.2, 3)
        if isinstance(layer, nn.BatchNorm1d | nn.LayerNorm) and layer.weight is not None:
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


def with_statistics_of(rows: Tensor, head: nn.Sequential) -> nn.Sequential:
    """Give a head's BatchNorms the statistics of its own inputs, as training does."""
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean, layer.running_var = rows.mean(0), rows.var(0)
        rows = layer(rows)
    return head


def maps(seed: int, channels: int, grid: tuple[int, int] = (7, 5), batch: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *grid, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rule", ["gate", "tangent"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_pooling_commutes_with_the_adaptor(act: str, rule: str, norm: str) -> None:
    for depth in (1, 2, 3, 4):
        head = mlp(depth, [*[12, 24, 16, 20, 8][:depth], 10], act, norm)
        adaptor = SpatialAdaptor(head, rule=rule)
        for seed, grid in enumerate([(1, 1), (7, 7), (5, 3)]):
            x = maps(seed, 12, grid)
            expected = head(x.mean((2, 3)))
            error = (adaptor(x).mean((2, 3)) - expected).abs().max() / expected.abs().max()
            assert error < ROUNDING, (depth, grid)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gate_equals_the_reference_pixel_by_pixel(act: str) -> None:
    head = mlp(1, [6, 9, 7, 5], act, "batch")
    x = maps(2, 6, (3, 4), batch=2)
    got = SpatialAdaptor(head, rule="gate")(x)
    torch.testing.assert_close(got, torch.from_numpy(reference.adapt(head, x.numpy())))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_naive_applies_the_head_to_each_pixel_and_keeps_no_mean(act: str, norm: str) -> None:
    x = maps(4, 64, (7, 7), batch=16)
    head = with_statistics_of(x.movedim(1, 3).flatten(0, 2), mlp(3, [64, 256, 32], act, norm))
    naive = SpatialAdaptor(head, rule="naive")(x)
    torch.testing.assert_close(naive[:, :, 2, 3], head(x[:, :, 2, 3]))
    expected = head(x.mean((2, 3)))
    error = (naive.mean((2, 3)) - expected).norm() / expected.norm()
    # pixels vary by 7 times their mean: the output is off by 39% (hardswish) to 190% (relu)
    assert error > 0.35


def test_a_batchnorm_that_trains_breaks_the_law() -> None:
    head = mlp(5, [16, 32, 8], "relu", "batch")
    x = maps(6, 16, batch=8)
    adaptor = SpatialAdaptor(head, rule="gate")
    frozen = adaptor(x)
    trained = head.train()(x.mean((2, 3)))
    error = (adaptor(x).mean((2, 3)) - trained).norm() / trained.norm()
    assert error > 0.1
    assert not torch.equal(head.eval()(x.mean((2, 3))), frozen.mean((2, 3)))  # statistics moved


def test_an_adaptor_that_is_told_to_train_moves_no_statistics() -> None:
    head = mlp(5, [16, 32, 8], "relu", "batch")
    before = {name: value.clone() for name, value in head.state_dict().items()}
    SpatialAdaptor(head, rule="gate").train()(maps(6, 16))
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_for_relu_the_gate_is_the_first_order_taylor_expansion(norm: str) -> None:
    head = mlp(7, [8, 16, 16, 4], "relu", norm)
    x = maps(8, 8, (3, 2), batch=2).requires_grad_()
    adapted = SpatialAdaptor(head, rule="gate")(x)
    probe = torch.randn(4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((adapted * probe[:, None, None]).sum(), x)
    for b in range(2):
        mean = x[b].mean((1, 2)).detach()
        jacobian = torch.func.jacrev(lambda m: head(m[None])[0])(mean)  # (4, 8)
        for i in range(3):
            for j in range(2):
                taylor = head(mean[None])[0] + jacobian @ (x[b, :, i, j] - mean)
                torch.testing.assert_close(adapted[b, :, i, j], taylor)
                torch.testing.assert_close(gradient[b, :, i, j], jacobian.T @ probe)


def test_for_smooth_activations_gate_and_tangent_agree_on_the_mean_alone() -> None:
    head = mlp(9, [8, 16, 4], "gelu", "none")
    x = maps(10, 8)
    gate, tangent = (SpatialAdaptor(head, rule=rule)(x) for rule in ("gate", "tangent"))
    torch.testing.assert_close(gate.mean((2, 3)), tangent.mean((2, 3)))
    assert (gate - tangent).norm() > 0.1 * gate.norm()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_closed_gates_are_the_activation_over_the_mean(act: str) -> None:
    layer = ACTIVATIONS[act]
    means = torch.tensor([-40, -3, -1, -1e-3, 1e-3, 0.5, 2.9, 3.1, 40], dtype=torch.float64)
    adaptor = SpatialAdaptor(nn.Sequential(layer), rule="gate")
    # a map whose mean is m and which has one pixel that is 1: that pixel shows the gate
    x = torch.stack([torch.ones_like(means), 2 * means - 1], dim=1)[:, None, None]  # (9, 1, 1, 2)
    torch.testing.assert_close(adaptor(x)[:, 0, 0, 0], layer(means) / means, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("act", "gate"),
    [("relu", 0.0), ("gelu", 0.5), ("gelu_tanh", 0.5), ("silu", 0.5), ("hardswish", 0.5)],
)
def test_a_mean_of_zero_has_the_gate_of_its_limit(act: str, gate: float) -> None:
    x = torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64)
    adapted = SpatialAdaptor(nn.Sequential(ACTIVATIONS[act]), rule="gate")(x)
    torch.testing.assert_close(adapted, gate * x)


@pytest.mark.parametrize("rule", ["gate", "tangent"])
def test_float32_keeps_the_law_to_its_rounding(rule: str) -> None:
    head = mlp(11, [2048, 4096, 256], "relu", "batch_plain").float()
    x = maps(12, 2048, (7, 7), batch=4).float().relu()  # as a ResNet-50 gives it
    expected = head(x.mean((2, 3)))
    got = SpatialAdaptor(head, rule=rule)(x).mean((2, 3))
    # 4e-7 measured; 4,096 products of 24 bits
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


def test_under_autocast_a_gate_differs_only_where_the_rounding_of_the_map_decides() -> None:
    head = mlp(13, [64, 512], "relu", "none").float()
    head.append(nn.ReLU())
    x = maps(14, 64, (7, 7), batch=16).float()
    adaptor = SpatialAdaptor(head, rule="gate")
    exact = adaptor(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = adaptor(x)
        hidden = F.conv2d(x, head[0].weight[:, :, None, None], head[0].bias)
    assert rounded.dtype == hidden.dtype == torch.bfloat16
    open_gates = (rounded != 0).flatten(2).any(dim=2)  # (B, C)
    # of the rounded map, the gates are float32's own: sums are not rounded to 8 bits
    assert torch.equal(open_gates, hidden.float().mean((2, 3)) > 0)
    # of the exact map, 8 bits of the map decide one gate in a hundred at most
    assert (open_gates != (exact != 0).flatten(2).any(dim=2)).float().mean() < 0.01


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
def test_the_gate_of_a_bfloat16_map_is_rounded_once_alone(act: str) -> None:
    means = torch.linspace(-3.5, 3.5, 57).bfloat16()
    got = SpatialAdaptor(nn.Sequential(ACTIVATIONS[act]), rule="gate")(means.view(57, 1, 1, 1))
    assert got.dtype == torch.bfloat16
    expected = ACTIVATIONS[act](means.double())
    # two roundings of 8 bits; a gate computed in bfloat16 loses all of them below -3
    torch.testing.assert_close(got.double().view(57), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("rule", ["gate", "tangent"])
def test_under_autocast_the_law_holds_to_the_bits_of_bfloat16(rule: str) -> None:
    head = mlp(15, [64, 256, 32], "gelu", "batch").float()
    x = maps(16, 64, (7, 7), batch=8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SpatialAdaptor(head, rule=rule)(x).float().mean((2, 3))
    expected = head(x.mean((2, 3)))
    assert (got - expected).norm() < 2**-7 * expected.norm()


def test_check_law_measures_an_honest_head() -> None:
    head = mlp(17, [8, 16, 4], "relu", "batch").float()
    assert check_law(SpatialAdaptor(head, rule="gate"), maps(18, 8).float()) < ROUNDING


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_law_refuses_weights_that_are_not_finite(value: float) -> None:
    head = mlp(17, [8, 16, 4], "relu", "batch")
    head[0].weight[3, 2] = value
    with pytest.raises(WeightsError, match=r"breaks SpatialAdaptor's law.*non-finite"):
        check_law(SpatialAdaptor(head, rule="gate"), maps(18, 8))


def test_check_law_lets_the_ablation_pass_and_says_how_wrong_it_is() -> None:
    adaptor = SpatialAdaptor(mlp(17, [8, 16, 4], "relu", "none"), rule="naive")
    x = maps(18, 8)
    assert check_law(adaptor, x) == law_error(adaptor, x) > 0.1


def test_checking_the_law_leaves_the_adaptor_as_it_was() -> None:
    adaptor = SpatialAdaptor(mlp(17, [8, 16, 4], "relu", "batch").float(), rule="gate").train()
    check_law(adaptor, maps(18, 8))
    assert adaptor.training
    assert {p.dtype for p in adaptor.parameters()} == {torch.float32}


def test_without_a_head_the_map_is_itself() -> None:
    x = maps(19, 8)
    assert torch.equal(SpatialAdaptor(nn.Sequential(), rule="gate")(x), x)


def test_dropout_is_left_out() -> None:
    head = mlp(20, [8, 16, 4], "relu", "none")
    dropped = nn.Sequential(head[0], nn.Dropout(0.9), *head[1:])
    x = maps(21, 8)
    adaptors = (SpatialAdaptor(layers, rule="gate").train() for layers in (head, dropped))
    assert torch.equal(*(adaptor(x) for adaptor in adaptors))


@pytest.mark.parametrize("rule", ["gate", "tangent", "naive"])
def test_inference_mode_changes_nothing(rule: str) -> None:
    adaptor = SpatialAdaptor(mlp(22, [8, 16, 4], "silu", "layer"), rule=rule)
    x = maps(23, 8)
    expected = adaptor(x)
    with torch.inference_mode():
        got = adaptor(x)
    torch.testing.assert_close(got, expected)


def test_layers_and_rules_that_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds Tanh.*use Linear"):
        SpatialAdaptor(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), rule="gate")
    with pytest.raises(ConfigError, match=r"rule='taylor' is unknown; use one of"):
        SpatialAdaptor(nn.Sequential(), rule="taylor")
