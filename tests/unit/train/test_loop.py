import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_parts import DISTILL, QUEUE, host_batches, loop_settings, new_state, plan_of, steps_of
from torch import Tensor, nn

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import load_checkpoint, save_checkpoint, to_host
from pcd_ray.config import Config
from pcd_ray.data.plan import SeenAudit
from pcd_ray.distill.diagnostics import diagnose
from pcd_ray.distill.loss import KINDS
from pcd_ray.distill.step import distill_step
from pcd_ray.errors import TrainingError
from pcd_ray.train.loop import train_steps, views_of
from pcd_ray.train.metrics import warnings_of
from pcd_ray.train.optim import Schedule
from pcd_ray.train.state import TrainState, unwrapped

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute small things on one thread, and in one order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_all(state: TrainState, stop: int, **changes: Any) -> TrainState:
    for _ in steps_of(state, loop_settings(steps=stop, **changes), stop=stop):
        pass
    return state


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def different(one: TrainState, other: TrainState) -> list[str]:
    """Return the names of all that differs in a single bit."""
    left, right = flat(one.state_dict()), flat(other.state_dict())
    assert left.keys() == right.keys()
    return [
        name
        for name, value in left.items()
        if not (
            torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        )
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_of_a_batch_train_as_the_whole(kind: str) -> None:
    whole = run_all(new_state(dtype=torch.float64, kind=kind), 6)
    parts = run_all(new_state(dtype=torch.float64, kind=kind), 6, accumulation_steps=2)
    fresh = new_state(dtype=torch.float64)
    for name, value in whole.student.state_dict().items():
        # float64: sums in another order, six steps
        torch.testing.assert_close(parts.student.state_dict()[name], value, rtol=1e-10, atol=1e-13)
    assert not torch.equal(whole.student.heads[0][0].weight, fresh.student.heads[0][0].weight)
    if kind != "mse":
        one, other = whole.branches[0].queue, parts.branches[0].queue
        torch.testing.assert_close(other.negatives, one.negatives)
        assert other.num_pushed == one.num_pushed == 48
    assert parts.audit.state() == whole.audit.state()


@pytest.mark.parametrize(
    ("optimizer", "stop", "kind"),
    [
        *((name, stop, "pixel") for name in ("lars", "adamw") for stop in (1, 3, 6)),
        ("lars", 3, "image"),
        ("adamw", 3, "mse"),
    ],
)
def test_going_on_from_a_checkpoint_is_never_having_stopped(
    optimizer: str, stop: int, kind: str, tmp_path: Path
) -> None:
    parts = {"batchnorm": True, "dropout": 0.3, "optimizer": optimizer, "ema": 0.9, "kind": kind}
    straight = run_all(new_state(**parts), 8)
    settings = loop_settings(steps=8)
    first = new_state(**parts)
    for _ in steps_of(first, settings, stop=stop):
        torch.rand(7)  # what happens between steps draws as it likes
    save_checkpoint(str(tmp_path), to_host(first.state_dict()), {"step": stop}, Config())
    second = new_state(**parts)
    second.load_state_dict(load_checkpoint(str(tmp_path)).state)
    assert second.step == stop
    torch.manual_seed(99)
    for _ in steps_of(second, settings, stop=8):
        pass
    assert different(second, straight) == []


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_loss_learns_what_it_measures(kind: str) -> None:
    state = new_state(kind=kind, optimizer="adamw")
    schedule = Schedule(0.01, 0.0, 60, 1.0)
    batches = [*host_batches(loop_settings(steps=2), 0, 2)] * 30  # the same images again
    settings = loop_settings(steps=60, schedule=schedule)
    lines = [done.metrics for done in train_steps(state, batches, settings) if done.metrics]
    above = [line[names.LOSS_ABOVE_TEACHER] for line in lines]
    assert min(above[-2:]) < 0.5 * above[0]
    assert lines[-1][names.POSITIVE_COSINE] > lines[0][names.POSITIVE_COSINE] + 0.2


def test_a_queue_that_a_checkpoint_does_not_hold_starts_anew_and_one_too_many_goes() -> None:
    stored = to_host(run_all(new_state(kind="mse"), 4).state_dict())
    assert stored["queues"] == [None]
    fresh, state = new_state(), new_state()
    state.load_state_dict(stored)
    assert torch.equal(state.branches[0].queue.negatives, fresh.branches[0].queue.negatives)
    assert state.branches[0].queue.num_pushed == 0
    without = new_state(kind="mse")
    without.load_state_dict(to_host(run_all(new_state(), 4).state_dict()))
    assert without.step == 4
    assert without.branches[0].queue is None


def copy_of(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_moving_average_is_its_written_recursion(decay: float) -> None:
    state = new_state(batchnorm=True, dtype=torch.float64, ema=decay)
    expected = copy_of(unwrapped(state.student))
    for done in steps_of(state, loop_settings(steps=7), stop=7):
        d = min(decay, 1 - done.step ** (-2 / 3))
        for name, value in copy_of(unwrapped(state.student)).items():
            if value.is_floating_point():
                expected[name] = d * expected[name] + (1 - d) * value
            else:  # how many batches a norm has seen
                expected[name] = value
        found = copy_of(state.judged)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # float64: the same sum in another order
            torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-15)
    assert not torch.equal(found["heads.0.0.weight"], unwrapped(state.student).heads[0][0].weight)
    assert "backbone.body.norm.running_var" in found
    assert not any(p.requires_grad for p in state.judged.parameters())
    assert not state.judged.training


def test_a_moving_average_changes_nothing_in_the_run_that_it_follows() -> None:
    without = run_all(new_state(batchnorm=True, dropout=0.3), 5)
    beside = run_all(new_state(batchnorm=True, dropout=0.3, ema=0.9), 5)
    assert without.judged is unwrapped(without.student)
    assert "average" not in without.state_dict()
    beside.average = None
    assert different(without, beside) == []


def test_a_moving_average_that_is_new_starts_at_the_stored_student_and_an_old_one_can_go() -> None:
    stored = to_host(run_all(new_state(batchnorm=True), 4).state_dict())
    state = new_state(batchnorm=True, ema=0.9)
    state.load_state_dict(stored)
    for name, value in stored["student"].items():
        assert torch.equal(state.judged.state_dict()[name], value)
    without = new_state(batchnorm=True)
    without.load_state_dict(to_host(state.state_dict()))
    assert "average" not in without.state_dict()


def test_each_step_and_each_seed_draws_its_own_random_numbers() -> None:
    draws: list[Tensor] = []
    for seed in (3, 4):
        state = new_state()
        state.student.register_forward_hook(lambda _m, _i, _o: draws.append(torch.rand(9)))
        for _ in steps_of(state, loop_settings(steps=3, seed=seed), stop=3):
            pass
    assert len({tuple(draw.tolist()) for draw in draws}) == 6


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(parts: int) -> None:
    settings = loop_settings(steps=6, accumulation_steps=parts)
    state, expected = new_state(), run_all(new_state(), 0)
    steps = steps_of(state, settings, stop=6)
    next(steps)
    next(steps)
    for _ in steps_of(expected, settings, stop=2):
        pass
    unwrapped(state.student).heads[0].register_forward_hook(lambda _m, _i, output: output / 0)
    rate = settings.schedule.learning_rate(2)
    with pytest.raises(TrainingError, match=rf"step 2 with learning rate {rate:.4g}; .*base_lr"):
        next(steps)
    assert state.step == 2
    changed = set(different(state, expected))
    assert {name for name in changed if not name.endswith("/lr")} == set()


def test_weights_that_are_not_finite_are_not_stored() -> None:
    state = run_all(new_state(), 2)
    with torch.no_grad():
        unwrapped(state.student).heads[0][0].weight[1, 2] = math.inf
    with pytest.raises(
        TrainingError, match=r"heads\.0\.0\.weight is not finite after step 2; .*stored"
    ):
        state.state_dict()


def test_each_step_takes_its_own_learning_rate() -> None:
    schedule = Schedule(0.5, 2.5, 9, 0.1)
    state = new_state()
    rates = []
    for done in steps_of(state, loop_settings(steps=9, schedule=schedule), stop=9):
        assert done.metrics is not None
        rates.append({done.metrics[names.LEARNING_RATE], state.optimizer.param_groups[1]["lr"]})
    assert rates == [{schedule.learning_rate(step)} for step in range(9)]


def test_a_step_follows_the_gradient_at_its_rate() -> None:
    settings = loop_settings(steps=3)
    state = new_state(optimizer="sgd", dtype=torch.float64)
    before = [p.detach().clone() for p in state.student.parameters()]
    for step, _ in enumerate(steps_of(state, settings, stop=3)):
        rate = settings.schedule.learning_rate(step)
        after = [p.detach().clone() for p in state.student.parameters()]
        for p, old, new in zip(state.student.parameters(), before, after, strict=True):
            torch.testing.assert_close(new, old - rate * p.grad, rtol=0, atol=1e-15)
        before = after


def test_the_audit_holds_what_was_read() -> None:
    settings = loop_settings(steps=6)  # 48 images: two epochs of 20 and 8 more
    state = run_all(new_state(), 6)
    plan = plan_of(settings)
    assert [state.audit.verdict(plan, epoch) for epoch in (0, 1)] == [None, None]
    expected = SeenAudit()
    expected.add(*plan.rows(0, 48))
    assert state.audit.state() == expected.state()
    assert [count for _, count, _ in state.audit.state()] == [20, 20, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_come_at_logging_steps_and_the_last_under_their_public_names(kind: str) -> None:
    settings = loop_settings(steps=8, log_every_steps=3)
    state = new_state(kind=kind)
    found = {done.step: done.metrics for done in steps_of(state, settings, stop=8)}
    assert [step for step, metrics in found.items() if metrics is not None] == [3, 6, 8]
    public = {
        value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)
    }
    elsewhere = {names.KNN_TOP1, names.KNN1_TOP1, names.SEGMENTATION_MIOU}
    if kind == "mse":
        elsewhere |= {names.QUEUE_FILL, names.QUEUE_TOP1, names.NEGATIVE_COSINE}
    assert set(found[3] or {}) == public - elsewhere
    assert "queue" not in " ".join(warnings_of(found[8] or {}))
    assert all(math.isfinite(value) for value in (found[6] or {}).values())


@pytest.mark.parametrize(
    ("size", "batch"), [(20, 8), (10, 4), (8, 8), (12, 5), (5, 7), (3, 8), (40, 4)]
)
def test_an_epoch_ends_with_the_step_that_reads_its_last_image(size: int, batch: int) -> None:
    settings = loop_settings(
        steps=10, images_per_epoch=size, global_batch_size=batch, log_every_steps=100
    )
    for done in steps_of(new_state(), settings, stop=10):
        read = range((done.step - 1) * batch, done.step * batch)
        last_images = [position // size for position in read if position % size == size - 1]
        assert list(done.epochs_ended) == last_images


def moved(state: TrainState, **changes: Any) -> tuple[float, float]:
    """Return how far one step moves all weights together, and the norm that it logs."""
    start = torch.cat([p.detach().flatten() for p in state.student.parameters()])
    settings = loop_settings(steps=1, schedule=Schedule(1.0, 0.0, 1, 1.0), **changes)
    (done,) = steps_of(state, settings, stop=1)
    end = torch.cat([p.detach().flatten() for p in state.student.parameters()])
    assert done.metrics is not None
    return (end - start).norm().item(), done.metrics[names.GRAD_NORM]


def test_clipping_shortens_long_gradients_and_leaves_short_ones() -> None:
    free, norm = moved(new_state(optimizer="sgd", dtype=torch.float64))
    assert free == pytest.approx(norm, rel=1e-6)  # logged as float32
    for limit, expected in [(norm / 2, norm / 2), (norm * 2, norm)]:
        state = new_state(optimizer="sgd", dtype=torch.float64)
        clipped, logged = moved(state, clip_grad_norm=limit)
        assert clipped == pytest.approx(expected, rel=1e-5)  # torch divides by norm + 1e-6
        assert logged == norm  # what was clipped, not what is left


def test_what_is_logged_is_what_direct_computation_gives() -> None:
    settings = loop_settings(steps=4, log_every_steps=2)
    state, twin = new_state(), new_state()
    *_, last = steps_of(state, settings, stop=4)
    losses = []
    for step, host in enumerate(host_batches(settings, 0, 4)):
        twin.optimizer.zero_grad()
        (result,) = distill_step(twin.student, twin.branches, views_of(host, CPU))
        losses.append(result.loss.item())
        if step == 3:
            expected = diagnose(result, twin.branches[0].queue.negatives, DISTILL)
            result.loss.backward()
            gradients = [p.grad.norm() for p in twin.student.parameters() if p.grad is not None]
        else:
            next(train_steps(twin, [host], settings))
    assert last.metrics is not None
    logged = {name: last.metrics.pop(name) for name in expected}
    assert logged == pytest.approx({name: value.item() for name, value in expected.items()})
    assert last.metrics[names.LOSS] == pytest.approx(np.mean(losses[2:]))  # since the last line
    assert last.metrics[names.GRAD_NORM] == pytest.approx(torch.stack(gradients).norm().item())
    assert last.metrics[names.QUEUE_FILL] == 100  # 32 keys of 21
    assert last.metrics[names.PEAK_GIB] > 0


def test_a_queue_that_is_not_full_yet_says_so() -> None:
    fills = [
        done.metrics[names.QUEUE_FILL]
        for done in steps_of(new_state(), loop_settings(steps=3), stop=3)
        if done.metrics is not None
    ]
    assert fills == [100 * 8 / QUEUE, 100 * 16 / QUEUE, 100]


def test_time_goes_to_waiting_or_computing_and_none_to_what_happens_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("pcd_ray.train.clock.time.perf_counter", lambda: now[0])
    settings = loop_settings(steps=6, log_every_steps=3)

    def slow_batches() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for batch in host_batches(settings, 0, 6):
            now[0] += 3
            yield batch

    def compute_1_s(_module: nn.Module, _inputs: object, _output: object) -> None:
        now[0] += 1

    state = new_state()
    state.student.register_forward_hook(compute_1_s)
    for done in train_steps(state, slow_batches(), settings):
        now[0] += 100  # a checkpoint, an evaluation
        if done.metrics is not None:
            assert done.metrics[names.STEP_S] == 4
            assert done.metrics[names.DATA_WAIT_S] == 3
            assert done.metrics[names.DATA_WAIT] == 75
            assert done.metrics[names.IMAGES_PER_S] == 8 / 4
