"""Fine-tuning on two gloo ranks: what one process does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from finetune_parts import CPU, SmallTask, finetune_settings, trained_state
from ranks import run_on_ranks

from pcd_ray.checkpoint import to_host
from pcd_ray.evaluate.finetune.finetune import finetune_steps, new_state
from pcd_ray.evaluate.segment.fcn import mean_over_labelled

TASK = SmallTask(num_images=11)
SETTINGS = finetune_settings(steps=8, clip_grad_norm=0.2)


def trained(task: SmallTask) -> dict[str, Any]:
    state = new_state(task, SETTINGS, device=CPU)
    losses = [done.losses for done in finetune_steps(task, SETTINGS, state, device=CPU)]
    return {"state": to_host(state.state_dict()), "losses": losses}


def stopped_and_gone_on(stop: int) -> dict[str, Any]:
    """Store at a step and go on with new objects, all from what rank 0 has stored."""
    task = SmallTask(num_images=11, batchnorm=True, dropout=0.2)
    box = [to_host(trained_state(task, SETTINGS, stop=stop).state_dict())] if stop else [None]
    dist.broadcast_object_list(box, src=0)
    return to_host(trained_state(task, SETTINGS, stored=box[0]).state_dict())


def test_two_ranks_of_half_the_batch_are_one_process() -> None:
    alone = trained(TASK)
    one, other = run_on_ranks(2, trained, TASK)
    for name, value in alone["state"]["model"].items():
        # float64: sums in another order, a few steps
        torch.testing.assert_close(one["state"]["model"][name], value, rtol=1e-10, atol=1e-13)
        assert torch.equal(one["state"]["model"][name], other["state"]["model"][name])
    assert one["losses"] == other["losses"]
    for ours, expected in zip(one["losses"], alone["losses"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)  # float32 means


def test_ranks_that_stopped_and_went_on_end_with_the_same_bits() -> None:
    whole = run_on_ranks(2, stopped_and_gone_on, 0)[0]
    gone_on = run_on_ranks(2, stopped_and_gone_on, 3)[0]
    assert whole["step"] == gone_on["step"] == 8
    for name, value in whole["model"].items():
        assert torch.equal(value, gone_on["model"][name]), name


def test_a_loss_that_is_not_finite_on_one_rank_stops_both() -> None:
    with pytest.raises(RuntimeError, match="is not finite at step"):
        run_on_ranks(2, trained, SmallTask(num_images=11, poison=5))


def loss_and_gradient(part: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a segmentation batch of which the ranks have parts with other shares of void."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 6, generator=random, dtype=torch.float64)
    masks = torch.randint(0, 3, (4, 6, 6), generator=random)
    masks[:2, 1:] = 255
    rows = part or slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    weight = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    loss = mean_over_labelled(weight * logits[rows], masks[rows])
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient


def test_the_mean_over_labelled_pixels_is_that_of_all_ranks() -> None:
    alone = loss_and_gradient(slice(0, 4))
    ranks = run_on_ranks(2, loss_and_gradient, None)
    for expected, *found in zip(alone, *ranks, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), expected)
