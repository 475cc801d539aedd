"""The loop on gloo ranks: what one process does, and the same end for all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from loop_parts import loop_settings, new_state, plan_of, small_backbone, steps_of
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import to_host
from pcd_ray.data.plan import rank_sizes
from pcd_ray.errors import TrainingError
from pcd_ray.train.state import TrainState, average_batchnorm, unwrapped

STEPS = 7


def place() -> dict[str, int]:
    if not dist.is_initialized():
        return {"rank": 0, "num_ranks": 1}
    return {"rank": dist.get_rank(), "num_ranks": dist.get_world_size()}


def trained(stop: int, stored: dict[str, Any] | None, batchnorm: bool) -> dict[str, Any]:
    """Train up to a step, from the start or from a stored state; return what is stored then."""
    state = new_state(batchnorm=batchnorm, dtype=torch.float64, ema=0.9)
    if stored is not None:
        state.load_state_dict(to_host(stored))  # a copy: what ranks are given lies in shared memory
    settings = loop_settings(steps=STEPS, clip_grad_norm=3.0)
    metrics = [done.metrics for done in steps_of(state, settings, stop=stop, **place())]
    own_audit = state.audit.state()
    return {"state": to_host(state.state_dict()), "metrics": metrics, "own_audit": own_audit}


def on_one_thread(*args: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trained(*args)
    finally:
        torch.set_num_threads(threads)


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    for network in ("student", "average"):
        for name, value in one[network].items():
            # float64: sums in another order, a few steps
            torch.testing.assert_close(other[network][name], value, rtol=1e-10, atol=1e-13)
    for queue, expected in zip(other["queues"], one["queues"], strict=True):
        torch.testing.assert_close(queue["negatives"], expected["negatives"])
        assert queue["cursor"] == expected["cursor"]
    assert (other["step"], other["audit"]) == (one["step"], one["audit"])


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return on_one_thread(STEPS, None, False)


@pytest.fixture(scope="module", params=[2, 3])  # 8 images split over two ranks, not over three
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_on_ranks(request.param, trained, STEPS, None, False)


def test_ranks_train_read_and_log_as_one_process(
    alone: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    assert_close(alone["state"], ranks[0]["state"])
    for network in ("student", "average"):
        for name, value in ranks[0]["state"][network].items():
            assert torch.equal(value, ranks[-1]["state"][network][name])
    first, last = ranks[0]["metrics"], ranks[-1]["metrics"]
    for ours, theirs, expected in zip(first, last, alone["metrics"], strict=True):
        for name in (names.LOSS, names.GRAD_NORM, names.POSITIVE_COSINE, names.QUEUE_TOP1):
            assert ours[name] == theirs[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_the_audit_adds_up_over_ranks_and_is_kept_once(
    alone: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    counts = [sum(count for _, count, _ in rank["own_audit"]) for rank in ranks]
    assert counts == [STEPS * size for size in rank_sizes(len(ranks), 8)]
    assert ranks[0]["state"]["audit"] == alone["state"]["audit"]
    assert ranks[1]["state"]["audit"] == []


@pytest.mark.parametrize("sizes", [(3, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    sizes: tuple[int, int], alone: dict[str, Any]
) -> None:
    stored = None
    for count, stop in zip(sizes, (4, STEPS), strict=True):
        args = (stop, stored, False)
        stored = (run_on_ranks(count, trained, *args) if count > 1 else [on_one_thread(*args)])[0][
            "state"
        ]
    assert stored is not None
    assert_close(alone["state"], stored)


def test_going_on_with_as_many_ranks_is_never_having_stopped() -> None:
    straight = run_on_ranks(2, stopped_and_gone_on, False)[0]
    resumed = run_on_ranks(2, stopped_and_gone_on, True)[0]
    for network in ("student", "average"):
        for name, value in straight[network].items():
            assert torch.equal(value, resumed[network][name]), name
    for queue, expected in zip(resumed["queues"], straight["queues"], strict=True):
        assert torch.equal(queue["negatives"], expected["negatives"])


def stopped_and_gone_on(stop: bool) -> dict[str, Any]:
    """Store at step 4 and go on, with the same objects or with new ones."""
    settings = loop_settings(steps=STEPS)
    state = new_state(batchnorm=True, dropout=0.2, ema=0.9)
    for _ in steps_of(state, settings, stop=4, **place()):
        pass
    box = [to_host(state.state_dict())]
    if stop:
        dist.broadcast_object_list(box, src=0)  # there is one checkpoint: rank 0's
        state = new_state(batchnorm=True, dropout=0.2, ema=0.9)
        state.load_state_dict(box[0])
    for _ in steps_of(state, settings, stop=STEPS, **place()):
        pass
    stored = to_host(state.state_dict())
    plan = plan_of(settings)
    if dist.get_rank() == 0:
        assert [state.audit.verdict(plan, epoch) for epoch in (0, 1)] == [None, None]
    return stored


def averages_of_ranks() -> tuple[Tensor, ...]:
    """Statistics in the moving average, before and after a checkpoint, and its weights."""
    state = new_state(batchnorm=True, dtype=torch.float64, ema=0.9)
    settings = loop_settings(steps=6)
    for _ in steps_of(state, settings, stop=5, **place()):
        pass
    before = state.judged.backbone.body.norm.running_var.clone()
    stored = to_host(state.state_dict())["average"]
    return before, stored["backbone.body.norm.running_var"], stored["heads.0.0.weight"]


def test_the_moving_averages_statistics_become_their_mean_and_its_weights_are_equal() -> None:
    (before, stored, weight), (other, other_stored, other_weight) = run_on_ranks(
        2, averages_of_ranks
    )
    assert not torch.equal(before, other)  # each rank's norms have seen its own images
    assert torch.equal(weight, other_weight)
    assert torch.equal(stored, other_stored)
    torch.testing.assert_close(stored, (before + other) / 2, rtol=1e-15, atol=0)


def batchnorms_of_ranks() -> tuple[Tensor, ...]:
    """Statistics before and after averaging; and buffers that are none."""
    state = new_state(batchnorm=True)
    for _ in steps_of(state, loop_settings(steps=2), stop=2, **place()):
        pass
    student = unwrapped(state.student)
    norm = student.backbone.body.norm
    before = torch.stack([norm.running_mean.clone(), norm.running_var.clone()])
    average_batchnorm(student)
    after = torch.stack([norm.running_mean, norm.running_var])
    return before, after, norm.num_batches_tracked, student.backbone.mean, student.backbone.std


def test_batchnorm_statistics_become_their_mean_and_other_buffers_stay() -> None:
    ranks = run_on_ranks(2, batchnorms_of_ranks)
    befores, afters = [r[0] for r in ranks], [r[1] for r in ranks]
    assert not torch.equal(*befores)
    for after in afters:
        torch.testing.assert_close(after, (befores[0] + befores[1]) / 2)
    assert torch.equal(*afters)
    assert [r[2].item() for r in ranks] == [2, 2]


def constants_of_ranks(constants: Tensor) -> Tensor:
    backbone = small_backbone(0, batchnorm=True)
    backbone.mean.copy_(constants.view(3, 1, 1))
    average_batchnorm(backbone)
    return backbone.mean.flatten()


def test_averaging_over_three_ranks_leaves_constants_to_the_bit() -> None:
    values = torch.linspace(100, 127, 100)
    values = values[(values + values + values) / 3 != values][:3]
    assert len(values) == 3  # which a mean over three ranks would change
    for found in run_on_ranks(3, constants_of_ranks, values):
        assert torch.equal(found, values)


def stopped_by_one_rank() -> tuple[str, int, bool]:
    """Rank 1's loss is not finite at the third step."""
    state, expected = new_state(), None
    steps = steps_of(state, loop_settings(steps=5), stop=5, **place())
    next(steps)
    next(steps)
    expected = to_host(state.student.state_dict())
    if dist.get_rank() == 1:
        unwrapped(state.student).heads[0].register_forward_hook(lambda _m, _i, output: output / 0)
    try:
        next(steps)
    except TrainingError as error:
        left = state.student.state_dict()
        same = all(torch.equal(value, left[name]) for name, value in expected.items())
        return str(error), state.step, same
    return "", state.step, False


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step() -> None:
    one, other = run_on_ranks(2, stopped_by_one_rank)
    assert one == other
    assert "not finite at step 2 with learning rate" in one[0]
    assert one[1:] == (2, True)


def gradient_exchanges(accumulation_steps: int) -> int:
    """Count how often gradients travel in two steps."""
    state: TrainState = new_state(optimizer="sgd")
    wrapped = state.student
    assert isinstance(wrapped, DistributedDataParallel)
    exchanged = []

    def count(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.index())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    wrapped.register_comm_hook(None, count)
    settings = loop_settings(steps=2, accumulation_steps=accumulation_steps)
    for _ in steps_of(state, settings, stop=2, **place()):
        pass
    return exchanged.count(0)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_gradients_travel_once_per_step(accumulation_steps: int) -> None:
    assert run_on_ranks(2, gradient_exchanges, accumulation_steps) == [2, 2]


def averaged_nothing() -> bool:
    student = nn.Sequential(nn.Linear(2, 2))
    before = to_host(student.state_dict())
    average_batchnorm(student)
    return all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_student_without_batchnorm_has_nothing_to_average() -> None:
    assert run_on_ranks(2, averaged_nothing) == [True, True]
