import pytest
import torch
from torch import Tensor, nn

from pcd_ray.distill.heads import (
    MlpShape,
    head_from_state,
    linear_widths,
    mirrored_head,
    output_width,
    shape_of,
)
from pcd_ray.errors import WeightsError


def batchnorm(width: int, *, affine: bool = True) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(width, affine=affine)
    layer.running_mean = torch.randn(width)
    layer.running_var = torch.rand(width) + 0.1
    return layer


def mocov3(channels: int = 12, hidden: int = 20, out: int = 6) -> nn.Sequential:
    """The layers of MoCo v3's ResNet-50 head; published widths are 2048, 4096 and 256."""
    return nn.Sequential(
        nn.Linear(channels, hidden, bias=False),
        batchnorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        batchnorm(out, affine=False),
    )


HEADS = {
    "mocov3": mocov3,
    "one layer": lambda: nn.Sequential(nn.Linear(12, 6)),
    "mocov2": lambda: nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 6)),
    "swav": lambda: nn.Sequential(nn.Linear(12, 9), batchnorm(9), nn.ReLU(), nn.Linear(9, 6)),
    "three layers": lambda: nn.Sequential(
        nn.Linear(12, 9, bias=False), batchnorm(9), nn.ReLU(), nn.Linear(9, 8, bias=False),
        batchnorm(8), nn.ReLU(), nn.Linear(8, 6, bias=False), batchnorm(6, affine=False),
    ),
    "four layers": lambda: nn.Sequential(
        nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(),
        nn.Linear(7, 6),
    ),
    "layer norm": lambda: nn.Sequential(
        nn.LayerNorm(12), nn.Linear(12, 9), nn.LayerNorm(9, bias=False), nn.ReLU(), nn.Linear(9, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_read_back_from_its_state_alone(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]().eval()
    read = head_from_state(head.state_dict())
    assert [type(layer) for layer in read] == [type(layer) for layer in head]
    assert not any(layer.training for layer in read.modules())
    x = torch.randn(5, 12)
    assert torch.equal(read(x), head(x))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("gelu", nn.GELU()), ("silu", nn.SiLU()), ("leaky_relu", nn.LeakyReLU())],
)
def test_the_activation_is_what_the_file_says(name: str, layer: nn.Module) -> None:
    head = nn.Sequential(nn.Linear(12, 9), layer, nn.Linear(9, 6)).eval()
    x = torch.randn(5, 12)
    assert torch.equal(head_from_state(head.state_dict(), activation=name)(x), head(x))


def state(**changes: Tensor | None) -> dict[str, Tensor]:
    """MoCo v3's head with keys replaced, added, or (None) left out; dots are written __."""
    found: dict[str, Tensor | None] = dict(mocov3().state_dict())
    found |= {key.replace("__", ".").removeprefix("k"): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.ones(3)}, "'extra' is not INDEX.NAME"),
        ({"mlp__0__weight": torch.ones(3, 3)}, "'mlp.0.weight' is not INDEX.NAME"),
        ({"k0__weight_g": torch.ones(20, 1)}, r'Unexpected key\(s\) in state_dict: "0.weight_g"'),
        ({"k3__scale": torch.ones(6)}, r'Unexpected key\(s\) in state_dict: "3.scale"'),
        ({"k1__running_var": None}, r'Missing key\(s\) in state_dict: "1.running_var"'),
        ({"k0__weight": torch.ones(20, 12, 1, 1)}, "head layer 0 with .* is no Linear, BatchNorm"),
        ({"k3__weight": torch.ones(6, 19)}, "layer 3 takes 19 channels but the layer before gives"),
        ({"k4__running_mean": torch.ones(5)}, "layer 4 takes 5 channels but the layer before giv"),
        ({"k3__bias": torch.ones(5)}, "size mismatch for 3.bias"),
        ({"k0__weight": None}, r"leave \[0\] without keys"),
        ({"k6__weight": torch.ones(2, 6), "k9__weight": torch.ones(2, 2)}, r"\[8\] without keys"),
    ],
)
def test_a_key_that_is_left_over_missing_or_misshapen_is_refused(
    changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        head_from_state(state(**changes))


def test_a_state_without_linear_layers_is_no_head() -> None:
    with pytest.raises(WeightsError, match="has no layers"):
        head_from_state({})
    with pytest.raises(WeightsError, match="has no Linear layer"):
        head_from_state({"0.weight": torch.ones(4), "0.bias": torch.ones(4)})
    with pytest.raises(WeightsError, match="activation 'tanh' is unknown; use one of"):
        head_from_state(mocov3().state_dict(), activation="tanh")


def test_widths_and_shape_of_a_head() -> None:
    head = mocov3()
    assert linear_widths(head) == [(12, 20), (20, 6)]
    assert output_width(head, 12) == 6
    assert output_width(nn.Sequential(), 12) == 12
    assert shape_of(head) == MlpShape((20, 6), final_norm=True)
    assert shape_of(head[:-1]) == MlpShape((20, 6), final_norm=False)


def test_a_mirrored_head_has_the_teachers_widths_behind_the_students_channels() -> None:
    head = mirrored_head(512, [MlpShape((40, 16), final_norm=True), MlpShape((40, 16))])
    kinds = [type(layer).__name__.removesuffix("2d") for layer in head]
    assert " ".join(kinds) == "Conv BatchNorm ReLU Conv BatchNorm Conv BatchNorm ReLU Conv"
    convolutions = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    widths = [(c.in_channels, c.out_channels) for c in convolutions]
    assert widths == [(512, 40), (40, 16), (16, 40), (40, 16)]
    assert {c.kernel_size for c in convolutions} == {(1, 1)}
    assert [c.bias is not None for c in convolutions] == [False, False, False, True]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_place_activations_of_a_mirrored_head_change_no_gradient(
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    head = mirrored_head(6, [MlpShape((8, 5), final_norm=True), MlpShape((7, 5))]).double()
    plain = mirrored_head(6, [MlpShape((8, 5), final_norm=True), MlpShape((7, 5))]).double()
    plain.load_state_dict(head.state_dict())
    for layer in plain:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    results = []
    for module, given in ((head, x.to(memory_format=memory_format)), (plain, x)):
        leaf = given.clone().requires_grad_()
        out = module(leaf)
        results.append(
            (out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()]))
        )
    torch.testing.assert_close(*results)
