"""Laws of the order of images: bijections, epochs, ranks, weights, and their audit."""

import numpy as np
import pytest

from pcd_ray.data.plan import EpochPlan, RankPlan, SeenAudit, permuted, rank_sizes, rank_span
from pcd_ray.errors import ConfigError

WEIGHTED = ((60, 0.5), (7, 2.0), (100, 1.0))


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4097, 65_536, 100_003])
def test_permuted_is_a_bijection(size: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key=3)), np.arange(size))


def test_permuted_of_a_part_is_the_part_of_permuted() -> None:
    whole = permuted(np.arange(5000), 5000, key=1)
    assert np.array_equal(permuted(np.arange(1234, 1300), 5000, key=1), whole[1234:1300])


def test_permuted_spreads_evenly() -> None:
    # 200 keys x 64 values: each of 64 x 64 (value, image) pairs is expected 200 / 64 = 3.1 times;
    # chi-square over 63 * 63 degrees of freedom has mean 3969 and deviation 89, allowed: 5 of them
    counts = np.zeros((64, 64))
    for key in range(200):
        counts[np.arange(64), permuted(np.arange(64), 64, key)] += 1
    expected = 200 / 64
    assert abs(((counts - expected) ** 2 / expected).sum() - 63 * 63) < 5 * 89


def test_neighbours_do_not_stay_neighbours() -> None:
    # of 10,000 neighbours, a random order keeps about 2 next to each other
    rows = permuted(np.arange(10_000), 10_000, key=0)
    assert (np.abs(np.diff(rows)) == 1).sum() < 12


def test_each_epoch_holds_every_image_once_in_its_own_order() -> None:
    plan = EpochPlan(((101, 1.0), (13, 1.0)), seed=0)
    orders = []
    for epoch in range(3):
        epochs, rows = plan.rows(epoch * 114, (epoch + 1) * 114)
        assert np.array_equal(np.sort(rows), np.arange(114))
        assert set(epochs.tolist()) == {epoch}
        orders.append(rows.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_seed_is_the_order() -> None:
    first, again, other = (EpochPlan(((500, 1.0),), seed).rows(0, 500)[1] for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 7, 60])
@pytest.mark.parametrize("start_step", [0, 1, 4])
def test_ranks_together_read_the_stream_from_any_step(num_ranks: int, start_step: int) -> None:
    plan, batch = EpochPlan(((97, 1.0),), seed=2), 60
    spans = [
        rank_span(step, rank, num_ranks, batch)
        for step in range(start_step, start_step + 3)
        for rank in range(num_ranks)
    ]
    rows = np.concatenate([plan.rows(*span)[1] for span in spans])
    assert np.array_equal(rows, plan.rows(start_step * batch, (start_step + 3) * batch)[1])
    sizes = rank_sizes(num_ranks, batch)
    assert [stop - start for start, stop in spans] == 3 * sizes
    assert max(sizes) - min(sizes) <= (batch % num_ranks > 0)


@pytest.mark.parametrize("chunk", [1, 7, 20, 33])
def test_a_rank_numbers_its_images_over_steps_whatever_the_chunks(chunk: int) -> None:
    plan, batch, first, stop = EpochPlan(((97, 1.0),), seed=2), 60, 2, 5
    mine = RankPlan(
        plan=plan, global_batch_size=batch, start_step=first, stop_step=stop, rank=1, num_ranks=3
    )
    spans = [rank_span(step, 1, 3, batch) for step in range(first, stop)]
    expected = [np.concatenate(each) for each in zip(*(plan.rows(*s) for s in spans), strict=True)]
    ends = [(start, min(start + chunk, 60)) for start in range(0, 60, chunk)]
    read = [np.concatenate(each) for each in zip(*(mine.places(*e) for e in ends), strict=True)]
    assert (mine.batch_size, mine.num_images) == (20, 60)
    assert [each.tolist() for each in read] == [each.tolist() for each in expected]


def test_an_epoch_may_end_inside_a_batch_and_no_image_is_lost() -> None:
    plan = EpochPlan(((10, 1.0),), seed=0)
    epochs, rows = plan.rows(0, 12)  # steps of 4: the third holds 2 + 2
    assert epochs.tolist() == [0] * 10 + [1] * 2
    assert sorted(rows[:10].tolist()) == list(range(10))


def test_a_rank_without_an_image_is_refused() -> None:
    assert rank_sizes(3, 3) == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"batch_size=2 leaves some of 3 workers .*num_workers=2"):
        rank_span(0, 0, 3, 2)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (2, 4), (5, 8), (0.5, 1)])
def test_total_steps_covers_the_epochs(epochs: float, steps: int) -> None:
    assert EpochPlan(((97, 1.0),), seed=0).total_steps(epochs, 64) == steps


@pytest.mark.parametrize(("size", "epochs", "batch"), [(97, 2, 64), (10, 3, 16), (8, 2, 4)])
def test_the_last_step_ends_the_last_epoch_however_far_it_reads(
    size: int, epochs: int, batch: int
) -> None:
    plan = EpochPlan(((size, 1.0),), seed=0)
    last = plan.total_steps(epochs, batch)
    assert plan.epochs_read(last, batch, epochs) == epochs
    assert plan.epochs_read(last - 1, batch, epochs) == (last - 1) * batch / size < epochs


def test_weights_say_how_often_an_image_is_seen() -> None:
    plan = EpochPlan(WEIGHTED, seed=0)
    size = plan.images_per_epoch
    assert size == 30 + 14 + 100
    counts = np.bincount(plan.rows(0, 2 * size)[1], minlength=167)
    assert set(counts[:60].tolist()) == {1}  # every second epoch
    assert set(counts[60:67].tolist()) == {4}  # twice in each
    assert set(counts[67:].tolist()) == {2}
    assert set(np.bincount(plan.rows(0, size)[1], minlength=167)[60:67].tolist()) == {2}


def test_a_source_with_a_tiny_weight_is_seen_at_last() -> None:
    plan = EpochPlan(((5, 0.01), (20, 1.0)), seed=0)
    assert plan.images_per_epoch == 21
    rows = plan.rows(0, 5 * 21)[1]
    assert sorted(rows[rows < 5].tolist()) == [0, 1, 2, 3, 4]


def test_positions_of_a_huge_plan_need_no_memory() -> None:
    plan = EpochPlan(((10**12, 1.0),), seed=0)
    rows = plan.rows(10**12 - 100, 10**12 + 100)[1]
    assert len(set(rows[:100].tolist())) == 100
    assert rows.min() >= 0
    assert rows.max() < 10**12


@pytest.mark.parametrize("sources", [(), ((0, 1.0),), ((5, 0.0),)])
def test_sources_without_images_or_weight_are_refused(
    sources: tuple[tuple[int, float], ...],
) -> None:
    with pytest.raises(ConfigError, match="sources="):
        EpochPlan(sources, seed=0)


def _audited(plan: EpochPlan, epoch: int, num_ranks: int) -> SeenAudit:
    """Read an epoch through several ranks' audits, each of them stored and restored half-way."""
    size = plan.images_per_epoch
    epochs, rows = plan.rows(epoch * size, (epoch + 1) * size)
    audits = [SeenAudit() for _ in range(num_ranks)]
    for rank in range(num_ranks):
        mine, half = slice(rank, None, num_ranks), len(rows[rank::num_ranks]) // 2
        audits[rank].add(epochs[mine][:half], rows[mine][:half])
        audits[rank] = SeenAudit(audits[rank].state())
        audits[rank].add(epochs[mine][half:], rows[mine][half:])
    return audits[0].merge(audits[1:])


@pytest.mark.parametrize("sources", [((200, 1.0),), WEIGHTED])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_audit_accepts_what_was_planned(
    sources: tuple[tuple[int, float], ...], num_ranks: int
) -> None:
    plan = EpochPlan(sources, seed=4)
    for epoch in (0, 3):
        assert _audited(plan, epoch, num_ranks).verdict(plan, epoch) is None


@pytest.mark.parametrize("sources", [((200, 1.0),), WEIGHTED])
def test_the_audit_finds_one_image_read_in_place_of_another(
    sources: tuple[tuple[int, float], ...],
) -> None:
    plan, audit = EpochPlan(sources, seed=4), SeenAudit()
    epochs, rows = plan.rows(0, plan.images_per_epoch)
    rows[3] = rows[4]
    audit.add(epochs, rows)
    verdict = audit.verdict(plan, 0)
    assert verdict is not None
    assert "some twice and others never" in verdict


def test_the_audit_finds_a_lost_image_and_an_unread_epoch() -> None:
    plan, audit = EpochPlan(((200, 1.0),), seed=4), SeenAudit()
    epochs, rows = plan.rows(0, 199)
    audit.add(epochs, rows)
    assert audit.verdict(plan, 0) == "epoch 0: 199 images were read, the plan has 200"
    assert audit.verdict(plan, 1) == "epoch 1: 0 images were read, the plan has 200"


def test_the_audit_fits_in_int64() -> None:
    audit = _audited(EpochPlan(((5000, 1.0),), seed=0), 0, 1)
    assert all(0 <= value < 2**63 for entry in audit.state() for value in entry)
