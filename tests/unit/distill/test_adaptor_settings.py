"""What the adaptor's settings keep of the law: layers, norms, windows, projections."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from tiny import tiny_config
from torch import Tensor, nn

from pcd_ray.config import Config
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.heads import kept_head, random_projection
from pcd_ray.distill.spatial_adaptor import SpatialAdaptor, check_law, law_error
from pcd_ray.distill.weights import save_teacher
from pcd_ray.errors import ConfigError, WeightsError

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}
ROUNDING = 1e-12  # float64: a few hundred additions


def norm_of(kind: str, width: int) -> list[nn.Module]:
    if kind == "none":
        return []
    norm: nn.Module = nn.LayerNorm(width)
    if kind.startswith("batch"):
        norm = nn.BatchNorm1d(width, affine=kind == "batch")
        norm.running_mean, norm.running_var = torch.randn(width), torch.rand(width) + 0.2
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return [norm]


def mlp(seed: int, widths: list[int], act: str, norm: str, *, bias: bool = True) -> nn.Sequential:
    """Linear, norm, activation in a row; the last Linear has a norm and no activation."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (width, out) in enumerate(pairwise(widths)):
        layers += [nn.Linear(width, out, bias=bias), *norm_of(norm, out)]
        if index < len(widths) - 2:
            layers.append(ACTIVATIONS[act])
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


def maps(seed: int, channels: int, grid: tuple[int, int] = (5, 3), batch: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *grid, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["none", "batch", "batch_plain", "layer"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_law_holds_for_every_head_and_every_part_of_it(act: str, norm: str, bias: bool) -> None:
    x = maps(0, 12)
    for depth in (1, 2, 3, 4):
        whole = mlp(depth, [12, 20, 16, 14, 10][: depth + 1], act, norm, bias=bias)
        for layers in range(depth + 1):
            for final_norm in (True, False):
                head = kept_head(whole, layers=layers, final_norm=final_norm)
                expected = head(x.mean((2, 3)))
                for rule in ("gate", "tangent"):
                    got = SpatialAdaptor(head, rule=rule)(x).mean((2, 3))
                    error = (got - expected).abs().max() / expected.abs().max()
                    assert error < ROUNDING, (depth, layers, final_norm, rule)


def test_a_kept_head_is_the_first_layers_and_ends_at_a_linear_and_its_norm() -> None:
    head = mlp(1, [6, 9, 8, 7], "gelu", "batch")
    linear1, norm1, act, linear2, norm2, _, linear3, norm3 = head
    rows = torch.randn(4, 6, dtype=torch.float64)
    first = norm1(linear1(rows))
    second = norm2(linear2(act(first)))
    for layers, final_norm, expected in (
        (1, True, first),
        (1, False, linear1(rows)),
        (2, True, second),
        (2, False, linear2(act(first))),
        (3, False, linear3(act(second))),
        (0, False, linear3(act(second))),
        (3, True, norm3(linear3(act(second)))),
    ):
        kept = kept_head(head, layers=layers, final_norm=final_norm)
        assert torch.equal(kept(rows), expected), (layers, final_norm)
    assert kept_head(head, layers=0, final_norm=True) is head
    assert kept_head(head, layers=3, final_norm=True) is head


def test_an_activation_at_the_end_of_the_whole_head_is_a_part_of_it() -> None:
    head = nn.Sequential(nn.Linear(4, 3), nn.Hardswish())
    assert kept_head(head, layers=1, final_norm=False) is head
    bare = nn.Sequential(nn.LayerNorm(4))
    assert kept_head(bare, layers=0, final_norm=False) is bare


def test_more_layers_than_the_head_has_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"layers=3, but the head has 2 Linear .* at most 2"):
        kept_head(mlp(1, [6, 9, 8], "relu", "none"), layers=3, final_norm=True)


def windowed_gate(x: np.ndarray, act: str, window: int) -> np.ndarray:
    """The gate around each position in plain loops; a window ends where the map does."""
    function = reference.activation(ACTIVATIONS[act])
    result = np.zeros_like(x)
    batch, channels, height, width = x.shape
    reach = window // 2
    for i in range(height):
        for j in range(width):
            rows = slice(max(i - reach, 0), min(i + reach + 1, height))
            columns = slice(max(j - reach, 0), min(j + reach + 1, width))
            for b in range(batch):
                for c in range(channels):
                    mean = float(np.mean(x[b, c, rows, columns]))
                    result[b, c, i, j] = x[b, c, i, j] * function(mean) / mean
    return result


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_window_gates_each_position_by_its_neighbourhood(act: str, window: int) -> None:
    x = maps(2, 3, (5, 4), batch=2)
    head = nn.Sequential(ACTIVATIONS[act])
    got = SpatialAdaptor(head, rule="gate", gate_window=window)(x)
    torch.testing.assert_close(got, torch.from_numpy(windowed_gate(x.numpy(), act, window)))


@pytest.mark.parametrize("rule", ["gate", "tangent"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_window_of_one_position_is_naive_and_one_over_the_map_is_the_image(
    norm: str, rule: str
) -> None:
    head = mlp(3, [6, 12, 8], "gelu", norm)
    x = maps(4, 6, (4, 5))
    naive = SpatialAdaptor(head, rule="naive")(x)
    alone = SpatialAdaptor(head, rule=rule, gate_window=1)(x)
    torch.testing.assert_close(alone, naive)
    image = SpatialAdaptor(head, rule=rule)(x)
    for window in (9, 11):  # from each end of five positions a reach of four sees them all
        assert torch.equal(SpatialAdaptor(head, rule=rule, gate_window=window)(x), image)
    assert not torch.equal(SpatialAdaptor(head, rule=rule, gate_window=7)(x), image)


def test_a_window_breaks_the_law_and_passes_its_check_with_the_error_told() -> None:
    head = mlp(5, [8, 32, 4], "relu", "none")
    x = maps(6, 8, (7, 7))
    windowed = SpatialAdaptor(head, rule="gate", gate_window=3)
    assert not windowed.keeps_mean
    # windows of 9 positions have means three times as large as the map's
    assert check_law(windowed, x) == law_error(windowed, x) > 0.05
    assert law_error(SpatialAdaptor(head, rule="gate", gate_window=13), x) < ROUNDING
    with pytest.raises(ConfigError, match="gate_window=4 has no middle"):
        SpatialAdaptor(head, rule="gate", gate_window=4)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh"])
def test_under_bf16_autocast_gates_are_those_of_float32(act: str, window: int) -> None:
    offsets = torch.linspace(-3, 3, 64, dtype=torch.float64)[:, None, None]
    x = (maps(7, 64, (7, 7), batch=4) + offsets).bfloat16()
    adaptor = SpatialAdaptor(nn.Sequential(ACTIVATIONS[act]), rule="gate", gate_window=window)
    expected = adaptor(x.double())  # of the same rounded map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = adaptor(x)
    assert got.dtype == torch.bfloat16
    # two roundings of 2^-8; a gate computed in bfloat16 would be off by half of itself at -3, while
    # float32 leaves 1 + erf(-3) off by 6e-8
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=1e-6)


def teacher_file(folder: Path) -> str:
    """Write timm's test_resnet (96 channels) with a head 96-40-24-12, a norm behind each."""
    head = mlp(8, [96, 40, 24, 12], "relu", "batch").float()
    uri = str(folder / "headed.safetensors")
    save_teacher(uri, build_backbone("test_resnet"), head, activation="relu", licence="MIT")
    return uri


def built(uri: str, **teacher: object) -> Method:
    config = tiny_config(teacher={"weights": uri, "head": "auto", **teacher})
    return build_method(config, [(load_teacher(config.teacher), None)], device=torch.device("cpu"))


def layers_of(head: nn.Sequential) -> str:
    names = [
        f"{layer.out_channels}" if isinstance(layer, nn.Conv2d) else type(layer).__name__[0]
        for layer in head
    ]
    return " ".join(names)


def test_the_students_head_mirrors_what_is_kept_of_the_teachers(tmp_path: Path) -> None:
    uri = teacher_file(tmp_path)
    for adaptor, expected in (
        ({}, "40 B R 24 B R 12 B"),
        ({"final_norm": False}, "40 B R 24 B R 12"),
        ({"layers": 2}, "40 B R 24 B"),
        ({"layers": 1, "final_norm": False}, "40"),
    ):
        method = built(uri, adaptor=adaptor)
        assert layers_of(method.student.heads[0]) == expected
        assert method.branches[0].law_error < ROUNDING
    assert method.branches[0].queue.negatives.shape[1] == 40
    with pytest.raises(WeightsError, match=r"layers=4, but the head has 3"):
        built(uri, adaptor={"layers": 4})


def test_gates_of_a_window_reach_the_teacher(tmp_path: Path) -> None:
    uri = teacher_file(tmp_path)
    windowed = built(uri, adaptor={"gate_mean": "window", "gate_window": 1})
    naive = built(uri, adaptor={"rule": "naive"})
    image = built(uri, adaptor={"gate_window": 1})  # a window that the mean does not use
    x = maps(9, 96).float()
    torch.testing.assert_close(
        windowed.branches[0].teacher.adaptor(x), naive.branches[0].teacher.adaptor(x)
    )
    assert torch.equal(
        image.branches[0].teacher.adaptor(x), built(uri).branches[0].teacher.adaptor(x)
    )
    assert not torch.allclose(
        windowed.branches[0].teacher.adaptor(x), image.branches[0].teacher.adaptor(x), rtol=0.1
    )


@pytest.mark.parametrize(
    ("adaptor", "message"),
    [
        ({"layers": -1}, r"adaptor.layers must be >= 0, got -1"),
        ({"gate_window": 4}, r"adaptor.gate_window must be odd and > 0, got 4"),
        ({"gate_window": 0}, r"adaptor.gate_window must be odd and > 0, got 0"),
        ({"rule": "naive", "gate_mean": "window"}, r"gate_mean must be image with .*rule=naive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(adaptor: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(teacher={"adaptor": adaptor})


def test_rows_of_a_projection_are_orthogonal_and_of_the_stated_length() -> None:
    weight = random_projection(96, 24, seed=1).weight.detach().double()
    # entries are multiples of 2^-20, 24 x 96 of them
    torch.testing.assert_close(weight @ weight.T, 4 * torch.eye(24).double(), rtol=0, atol=1e-4)
    assert torch.equal(weight * 2**20, (weight * 2**20).round())
    assert torch.equal(random_projection(96, 24, seed=1).weight.double(), weight)
    assert not torch.equal(random_projection(96, 24, seed=2).weight.double(), weight)


def test_a_projection_keeps_norms_and_products_on_average() -> None:
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = []
    with torch.no_grad():
        for seed in range(400):
            a, b = random_projection(64, 16, seed=seed).double()(rows)
            products.append(torch.stack([a @ a, b @ b, a @ b]))
    got = torch.stack(products).mean(0)
    a, b = rows
    expected = torch.stack([a @ a, b @ b, a @ b])
    scale = torch.stack([a @ a, b @ b, (a.norm() * b.norm())])
    # one draw is off by sqrt(2 / 16) = 35% of the norms, the mean of 400 by 1.8%
    assert ((got - expected).abs() < 0.06 * scale).all()


def projected(uri: str, dim: int, *, seed: int = 0, head: str = "auto") -> tuple[Config, Method]:
    teacher = {"weights": uri, "head": head, "projection_dim": dim}
    config = tiny_config(teacher=teacher, run={"seed": seed})
    loaded = load_teacher(config.teacher)
    return config, build_method(config, [(loaded, None)], device=torch.device("cpu"))


def test_a_projected_teacher_keeps_the_law_and_its_student_is_nowhere_wider(
    tmp_path: Path,
) -> None:
    uri = teacher_file(tmp_path)
    _, method = projected(uri, 10)
    assert method.branches[0].queue.negatives.shape[1] == 10
    assert method.branches[0].law_error < ROUNDING
    assert layers_of(method.student.heads[0]) == "10 B R 10 B R 10 B"
    plain = built(uri)
    x = torch.randn(3, 96, 2, 2)
    inner = plain.branches[0].teacher.adaptor(x)
    weight = method.branches[0].teacher.adaptor.head[-1].weight
    torch.testing.assert_close(
        method.branches[0].teacher.adaptor(x), torch.einsum("dc,bchw->bdhw", weight, inner)
    )
    _, bare = projected(uri, 10, head="none")
    assert layers_of(bare.student.heads[0]) == "10"
    assert bare.branches[0].law_error < ROUNDING


def test_the_projection_follows_the_runs_seed_and_is_part_of_the_teachers_hash(
    tmp_path: Path,
) -> None:
    uri = teacher_file(tmp_path)
    hashes = [projected(uri, 10, seed=seed)[1].branches[0].identity.sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert built(uri).branches[0].identity.sha256 not in hashes
    with pytest.raises(ConfigError, match=r"projection_dim=13 exceeds the 12 channels"):
        projected(uri, 13)
    with pytest.raises(ConfigError, match=r"projection_dim must be >= 0"):
        tiny_config(teacher={"projection_dim": -1})
