import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from finetune_parts import CPU, SmallTask, finetune_settings, trained_state
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR

from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.finetune.finetune import (
    FinetuneSettings,
    example_batches,
    finetune_steps,
    fingerprint,
    new_state,
    unwrapped,
)


def torch_rates(settings: FinetuneSettings, kind: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = kind(optimizer, **options)
    rates = []
    for _ in range(settings.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_poly_is_torchs_and_its_closed_form() -> None:
    settings = finetune_settings(steps=40, lr=0.01, warmup_steps=0)
    rates = [settings.learning_rate(step) for step in range(40)]
    assert rates == pytest.approx(
        torch_rates(settings, PolynomialLR, total_iters=40, power=0.9), rel=1e-12
    )
    assert rates[0] == 0.01
    assert rates[30] == pytest.approx(0.01 * 0.25**0.9)


def test_step_is_torchs_and_its_closed_form() -> None:
    settings = finetune_settings(
        steps=9, lr=0.02, schedule="step", milestones=(6, 8), warmup_steps=0
    )
    rates = [settings.learning_rate(step) for step in range(9)]
    assert rates == pytest.approx(
        torch_rates(settings, MultiStepLR, milestones=[6, 8], gamma=0.1), rel=1e-12
    )
    assert rates == pytest.approx([0.02] * 6 + [0.002] * 2 + [0.0002])


@pytest.mark.parametrize("schedule", ["poly", "step"])
def test_warm_up_multiplies_the_schedule_by_equal_parts(schedule: str) -> None:
    settings = finetune_settings(steps=20, warmup_steps=4, schedule=schedule, milestones=(10,))
    plain = replace(settings, warmup_steps=0)
    shares = [settings.learning_rate(step) / plain.learning_rate(step) for step in range(6)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_each_image_is_seen_once_per_epoch_and_each_time_otherwise() -> None:
    @dataclass(frozen=True)
    class Noted(SmallTask):
        def example(self, index: int, seed: int) -> Any:
            return index, seed

    task = Noted(num_images=10)
    settings = finetune_settings(steps=15, global_batch_size=4)  # six epochs; batches straddle them
    batches = list(example_batches(task, settings, start_step=0, threads=3))
    drawn = [example for batch in batches for example in batch]
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    for epoch in epochs:
        assert sorted(index for index, _ in epoch) == list(range(10))
    assert len({tuple(index for index, _ in epoch) for epoch in epochs}) == 6  # in other orders
    assert max(Counter(seed for _, seed in drawn).values()) == 1
    assert list(example_batches(task, settings, start_step=6, threads=1)) == batches[6:]


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_gone_on_ends_with_the_same_bits(stop: int) -> None:
    task, settings = SmallTask(batchnorm=True, dropout=0.3), finetune_settings()
    whole = trained_state(task, settings).state_dict()
    stored = copy.deepcopy(trained_state(task, settings, stop=stop).state_dict())
    assert stored["step"] == stop
    gone_on = trained_state(task, settings, stored=stored).state_dict()
    assert gone_on["step"] == whole["step"] == 7
    for name, value in whole["model"].items():
        assert torch.equal(value, gone_on["model"][name]), name
    assert any(
        not torch.equal(value, whole["model"][name]) for name, value in stored["model"].items()
    )


def test_steps_are_those_of_sgd_written_out() -> None:
    task, settings = SmallTask(), finetune_settings(clip_grad_norm=0.05)
    model = task.build()
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = example_batches(task, settings, start_step=0, threads=1)
    for step, examples in enumerate(batches):
        losses = model(task.collate(examples, CPU))
        grads = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
        shrink = min(1.0, 0.05 / (float(torch.cat([g.flatten() for g in grads]).norm()) + 1e-6))
        with torch.no_grad():
            for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
                head = name.startswith("head")
                full = grad * shrink + (0.0 if head else settings.weight_decay) * p
                velocity[name] = settings.momentum * velocity[name] + full
                p -= settings.learning_rate(step) * (10 if head else 1) * velocity[name]
    ours = trained_state(task, settings).state_dict()["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


@dataclass(frozen=True)
class Indices(SmallTask):
    """An image is its number."""

    def example(self, index: int, seed: int) -> Any:
        del seed
        return index


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    settings = finetune_settings(warmup_steps=0)
    order = list(example_batches(Indices(), settings, start_step=0, threads=1))
    poisoned = order[1][2]  # of the first epoch's ten
    task = SmallTask(poison=poisoned)
    state = new_state(task, settings, device=CPU)
    before = copy.deepcopy(trained_state(SmallTask(), settings, stop=1).state_dict()["model"])
    rate = f"{settings.learning_rate(1):.4g}"
    message = rf"\(class, norm\) is not finite at step 1 with learning rate {rate}"
    steps = finetune_steps(task, settings, state, device=CPU)
    with pytest.raises(EvaluationError, match=message):
        list(steps)
    assert state.step == 1
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_that_are_not_finite_are_not_stored() -> None:
    state = new_state(SmallTask(), finetune_settings(), device=CPU)
    with torch.no_grad():
        unwrapped(state.model).get_parameter("head.bias")[1] = float("nan")
    with pytest.raises(EvaluationError, match=r"head\.bias is not finite after step 0"):
        state.state_dict()


def test_an_images_error_reaches_the_caller() -> None:
    @dataclass(frozen=True)
    class Damaged(SmallTask):
        def example(self, index: int, seed: int) -> Any:
            del seed
            raise EvaluationError(f"image {index} is damaged")

    with pytest.raises(EvaluationError, match="is damaged"):
        trained_state(Damaged(), finetune_settings())


def test_the_network_trains_in_train_mode() -> None:
    state = trained_state(SmallTask(batchnorm=True), finetune_settings())
    assert int(state.model.get_buffer("norm.num_batches_tracked")) == 7


@dataclass(frozen=True)
class _Outer:
    text: str
    parts: tuple[Any, ...]
    options: dict[str, Any]
    place: str = field(default="", compare=False)


def test_the_fingerprint_differs_where_plain_data_does() -> None:
    weights = {"a": torch.arange(4.0), "b": torch.zeros(0, 2)}
    one = _Outer("x", (1, None, SmallTask()), {"weights": weights})
    same = _Outer("x", (1, None, SmallTask()), {"weights": copy.deepcopy(weights)}, place="/else")
    assert fingerprint(one) == fingerprint(same)
    moved = {"a": torch.tensor([0.0, 1.0, 3.0, 2.0]), "b": torch.zeros(0, 2)}
    others = [
        replace(one, text="y"),
        replace(one, parts=(1, None, SmallTask(num_images=11))),
        replace(one, options={"weights": moved}),
        replace(one, options={"weights": {"a": weights["a"].double(), "b": weights["b"]}}),
        replace(one, options={"weights": {"a": weights["a"].view(2, 2), "b": weights["b"]}}),
    ]
    assert len({fingerprint(each) for each in (one, *others)}) == 6
    with pytest.raises(TypeError, match="object is no plain data"):
        fingerprint(replace(one, parts=(object(),)))
