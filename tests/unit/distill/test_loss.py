import math

import pytest
import reference
import torch
import torch.nn.functional as F
from tiny import unit_rows
from torch import Tensor

from pcd_ray.distill.loss import (
    IMPLEMENTATIONS,
    choose_implementation,
    contrastive_loss,
    queue_logsumexp,
    regression_loss,
)
from pcd_ray.errors import ConfigError

CPU = torch.device("cpu")
# P pixels, D channels, K negatives: single, odd, no multiple of 8, over one chunk of 2048, wide
SHAPES = [(1, 1, 1), (5, 7, 13), (37, 33, 130), (64, 256, 500), (9, 20, 2049), (11, 24, 5000)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # float32: 24 bits over 1 / 0.02


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    pixels, width, queue = shape
    rows = (unit_rows(i, n, width, dtype) for i, n in enumerate((pixels, pixels, queue)))
    student, positive, negatives = rows
    return student.requires_grad_(), positive, negatives


def value_and_gradient(
    student: Tensor, positive: Tensor, negatives: Tensor, **settings: object
) -> tuple[Tensor, Tensor]:
    loss = contrastive_loss(student, positive, negatives, **settings)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.02, 0.2, 1.0])
def test_loss_is_the_written_sum(implementation: str, temperature: float) -> None:
    student, positive, negatives = inputs((6, 5, 17))
    weights = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64) / 4
    arrays = [list(rows.detach().numpy()) for rows in (student, positive, negatives)]
    settings = {"temperature": temperature, "implementation": implementation}
    got = contrastive_loss(student, positive, negatives, **settings)
    assert got.item() == pytest.approx(reference.loss(*arrays, temperature), rel=1e-12)
    got = contrastive_loss(student, positive, negatives, weights=weights, **settings)
    expected = reference.loss(*arrays, temperature, weights.tolist())
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("angle", [-1.0, 1.0])
def test_a_pixel_far_from_undecided_loses_no_digits(implementation: str, angle: float) -> None:
    # 1 / tau = 50 against one negative: the loss is 50 or e^-50, where a cut-off softplus rounds
    student = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    negatives = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    loss = contrastive_loss(
        student, angle * student, negatives, temperature=0.02, implementation=implementation
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-50)) + (angle < 0) * 50, rel=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queue", [1, 10, 29])
def test_vectors_at_right_angles_cost_log_of_one_plus_k(implementation: str, queue: int) -> None:
    axes = torch.eye(31, dtype=torch.float64)
    loss = contrastive_loss(
        axes[:1], axes[1:2], axes[2 : 2 + queue], temperature=0.2, implementation=implementation
    )
    assert loss.item() == pytest.approx(math.log(1 + queue), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("implementation", ["fused", "chunked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_and_chunked_equal_plain(
    shape: tuple[int, int, int], implementation: str, temperature: float, dtype: torch.dtype
) -> None:
    rows = inputs(shape, dtype)
    expected = value_and_gradient(*rows, temperature=temperature, implementation="plain")
    got = value_and_gradient(*rows, temperature=temperature, implementation=implementation)
    tolerance = TOLERANCE[dtype]
    assert abs(got[0] - expected[0]) <= tolerance * expected[0] + tolerance * 1e-3
    scale = 1 / (temperature * shape[0])  # of the gradient of one pixel
    assert (got[1] - expected[1]).abs().max() <= tolerance * scale


def test_chunked_takes_any_width() -> None:
    rows = inputs((12, 1280, 4100))
    expected = value_and_gradient(*rows, temperature=0.2, implementation="plain")
    got = value_and_gradient(*rows, temperature=0.2, implementation="chunked")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_the_queue_does_not_matter(implementation: str) -> None:
    student, positive, negatives = inputs((7, 9, 3000))
    shuffled = negatives[torch.randperm(3000)]
    settings = {"temperature": 0.1, "implementation": implementation}
    one, other = (
        value_and_gradient(student, positive, n, **settings) for n in (negatives, shuffled)
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_is_that_of_attention(implementation: str) -> None:
    student, positive, negatives = inputs((8, 6, 40))
    _, got = value_and_gradient(
        student, positive, negatives, temperature=0.2, implementation=implementation
    )
    s = student.detach()
    logits = torch.cat([(s * positive).sum(1, keepdim=True), s @ negatives.T], dim=1) / 0.2
    p = logits.softmax(dim=1)[:, :1]  # of the positive
    o = (s @ negatives.T / 0.2).softmax(dim=1) @ negatives
    torch.testing.assert_close(got, (1 - p) * (o - positive) / 0.2 / 8, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", ["fused", "chunked"])
def test_gradient_is_the_numerical_one(implementation: str) -> None:
    student, positive, negatives = inputs((4, 5, 2060))
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64) / 3
    assert torch.autograd.gradcheck(
        lambda s: contrastive_loss(
            F.normalize(s, dim=1),
            positive,
            negatives,
            temperature=0.3,
            implementation=implementation,
            weights=weights,
        ),
        student,
    )


@pytest.mark.parametrize("implementation", ["fused", "chunked"])
def test_a_second_derivative_is_refused_rather_than_wrong(implementation: str) -> None:
    student, _, negatives = inputs((4, 5, 6))
    lse = queue_logsumexp(student, negatives, temperature=0.2, implementation=implementation)
    (gradient,) = torch.autograd.grad(lse.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pixels_of_weight_zero_do_not_count(implementation: str) -> None:
    student, positive, negatives = inputs((6, 5, 17))
    weights = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.float64) / 3
    settings = {"temperature": 0.2, "implementation": implementation}
    value, gradient = value_and_gradient(student, positive, negatives, weights=weights, **settings)
    kept = weights.bool()
    alone, part = value_and_gradient(
        student.detach()[kept].requires_grad_(), positive[kept], negatives, **settings
    )
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient[kept], part)
    assert not gradient[~kept].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_any_positive_the_loss_and_its_gradient_are_zero(implementation: str) -> None:
    value, gradient = value_and_gradient(
        *inputs((6, 5, 17)),
        weights=torch.zeros(6, dtype=torch.float64),
        temperature=0.2,
        implementation=implementation,
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_queue_may_change_after_the_backward_pass(implementation: str) -> None:
    student, positive, negatives = inputs((6, 5, 2060))
    settings = {"temperature": 0.2, "implementation": implementation}
    first = value_and_gradient(student, positive, negatives, **settings)
    kept = [part.clone() for part in first]
    others = unit_rows(9, len(negatives), 5)
    negatives.copy_(others)  # in place, as the queue is pushed to
    assert all(map(torch.equal, first, kept))  # nothing of the step before is a view of the queue
    second = value_and_gradient(student, positive, negatives, **settings)
    afresh = value_and_gradient(student, positive, others.clone(), **settings)
    assert all(map(torch.equal, second, afresh))  # and nothing of the old queue is remembered
    assert abs(second[0] - first[0]) > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negatives_are_constants_even_if_they_ask_for_a_gradient(implementation: str) -> None:
    student, positive, negatives = inputs((6, 5, 17))
    settings = {"temperature": 0.2, "implementation": implementation}
    _, expected = value_and_gradient(student, positive, negatives, **settings)
    contrastive_loss(student, positive, negatives.requires_grad_(), **settings).backward()
    assert negatives.grad is None
    assert student.grad is not None
    assert torch.equal(student.grad, expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, positive, negatives = inputs((6, 5, 17))
    settings = {"temperature": 0.2, "implementation": "plain"}
    for wrong in ((student, positive[:5], negatives), (student, positive, negatives[:, :4])):
        with pytest.raises(ValueError, match="do not fit"):
            contrastive_loss(*wrong, **settings)
    with pytest.raises(ValueError, match=r"weights \(6, 1\) do not fit 6 pixels"):
        contrastive_loss(student, positive, negatives, weights=torch.ones(6, 1), **settings)
    with pytest.raises(ValueError, match=r"student \(6, 5\) and positive \(5, 5\) do not fit"):
        regression_loss(student, positive[:5])
    with pytest.raises(ValueError, match=r"weights \(5,\) do not fit 6 pixels"):
        regression_loss(student, positive, weights=torch.ones(5))


def test_regression_is_the_mean_squared_distance_two_minus_two_cosines() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    positive = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    each = [0.0, 2.0, 4.0, 0.8]  # equal, at right angles, opposite, of cosine 0.6
    for row, expected in enumerate(each):
        one = slice(row, row + 1)
        assert regression_loss(student[one], positive[one]).item() == pytest.approx(expected)
    assert regression_loss(student, positive).item() == pytest.approx(sum(each) / 4)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    assert regression_loss(student, positive, weights=weights).item() == pytest.approx(1.6)


def test_regression_and_its_gradient_are_the_written_sums() -> None:
    student, positive, _ = inputs((6, 5, 1))
    arrays = [list(rows.detach().numpy()) for rows in (student, positive)]
    weights = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64) / 4
    got = regression_loss(student, positive, weights=weights)
    expected = reference.squared_distance(*arrays, weights.tolist())
    assert got.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(gradient, 2 * weights[:, None] * (student - positive).detach())
    got = regression_loss(student, positive)
    assert got.item() == pytest.approx(reference.squared_distance(*arrays), rel=1e-12)
    cosines = (student * positive).sum(dim=1)
    assert got.item() == pytest.approx((2 - 2 * cosines).mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "width", "chosen"),
    [
        ("plain", 256, "plain"),
        ("chunked", 64, "chunked"),
        ("fused", 256, "fused"),
        ("auto", 1, "fused"),
        ("auto", 33, "fused"),
        ("auto", 256, "fused"),
        ("auto", 257, "chunked"),
        ("auto", 8192, "chunked"),
    ],
)
def test_implementation_that_a_width_gets(name: str, width: int, chosen: str) -> None:
    assert choose_implementation(name, width=width, device=CPU) == chosen


def test_fused_by_name_is_refused_where_it_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match=r"'fused' takes widths up to 256, got 1280; use 'auto'"):
        choose_implementation("fused", width=1280, device=CPU)
