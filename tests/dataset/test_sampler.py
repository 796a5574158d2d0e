"""dataset/sampler.py: every sample once, the same order on any number of processes, batches of similar length."""

import pytest
import torch

from dataset.sampler import GlobalBatchSampler, shuffle_batches

LENGTHS = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()


def epoch_of(number: int, *args, **kwargs) -> list[list[int]]:
    sampler = GlobalBatchSampler(*args, **kwargs)
    sampler.epoch = number
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_one_process_sees_every_sample_once(strategy):
    batches = epoch_of(0, LENGTHS, 4, strategy=strategy)
    assert sorted(sum(batches, [])) == list(range(203))
    assert [len(batch) for batch in batches] == [4] * 50 + [3]
    assert (sum(batches, []) == list(range(203))) == (strategy == "sequential")


@pytest.mark.parametrize("world_size, accumulation, batch_size", [(1, 2, 8), (2, 1, 8), (2, 4, 2), (8, 2, 1)])
def test_global_batches_do_not_depend_on_the_division(world_size, accumulation, batch_size):
    expected = [sorted(batch) for batch in epoch_of(3, LENGTHS, 16, seed=5)]
    ranks = [
        epoch_of(3, LENGTHS, batch_size, accumulation=accumulation, rank=rank, world_size=world_size, seed=5)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    steps = range(0, len(ranks[0]), accumulation)
    found = [sorted(i for batches in ranks for micro in batches[s : s + accumulation] for i in micro) for s in steps]
    assert found[:-1] == expected[:-1]
    left_out = set(expected[-1]) - set(found[-1])
    assert set(found[-1]) <= set(expected[-1]) and len(left_out) < world_size


def test_order_depends_on_seed_and_epoch():
    orders = {str(epoch_of(epoch, LENGTHS, 4, seed=seed)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    state = torch.get_rng_state()
    assert epoch_of(1, LENGTHS, 4, seed=1) == epoch_of(1, LENGTHS, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_grouping_saves_padding_and_puts_the_longest_first():
    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)

    grouped, random = (epoch_of(0, LENGTHS, 8, strategy=name) for name in ("group_by_length", "random"))
    assert padded(grouped) < 0.75 * padded(random)
    assert max(LENGTHS) in [LENGTHS[i] for i in grouped[0]]


def test_batches_are_shuffled_as_a_whole():
    order = list(range(100))
    shuffled = shuffle_batches(order, 8, torch.Generator().manual_seed(0))
    assert shuffled != order and sorted(shuffled) == order
    assert shuffled[:8] == order[:8] and shuffled[96:] == order[96:]
    assert all(shuffled[i : i + 8] == list(range(shuffled[i], shuffled[i] + 8)) for i in range(0, 96, 8))
    assert shuffle_batches([1, 2, 3], 8, torch.Generator()) == [1, 2, 3]


def test_errors():
    with pytest.raises(ValueError, match="unknown sampling strategy 'length'; choose one of group_by_length, random"):
        GlobalBatchSampler([1, 2], 1, strategy="length")
    with pytest.raises(ValueError, match="1 training samples are too few for 2 processes"):
        GlobalBatchSampler([1], 1, world_size=2)
