"""dataset/sampler.py: every sample once, the same order on any number of processes, batches of similar length."""

import numpy as np
import pytest
import torch

from dataset.mixture import Mixture
from dataset.sampler import GlobalBatchSampler, divided_by_tokens, shuffle_batches

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


@pytest.fixture
def small_blocks(monkeypatch):
    """An epoch of 203 samples is a long one then: of four blocks, of 60 samples or 64 as global batches have it."""
    monkeypatch.setattr("dataset.sampler.ONE_BLOCK", 100)
    monkeypatch.setattr("dataset.sampler.BLOCK", 60)


class Watched(list):
    """Lengths that remember which of them were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked: set[int] = set()

    def __getitem__(self, index):
        self.asked.add(index)
        return super().__getitem__(index)


def padding(lengths: list[int]) -> int:
    """Positions without a token in batches of 4."""
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_long_epochs_are_measured_block_by_block(small_blocks):
    lengths = Watched(LENGTHS)
    sampler = GlobalBatchSampler(lengths, 2, accumulation=2)
    order = sampler.order()
    assert sorted(order) == list(range(203)) and len(lengths.asked) == 203
    lengths.asked.clear()
    first = next(iter(sampler))
    assert lengths.asked == set(order[:60]) and set(first) < set(order[:60])
    found = [LENGTHS[i] for i in order]
    assert padding(found) < 0.6 * padding(torch.tensor(LENGTHS)[torch.randperm(203)].tolist())
    assert {i // 51 for i in order[:60]} == {0, 1, 2, 3}  # a block is a sample of the whole


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("world_size, rank", [(1, 0), (2, 1)])
def test_a_resumed_epoch_goes_on_where_it_was(strategy, blocks, world_size, rank, request):
    if blocks:
        request.getfixturevalue("small_blocks")
    lengths = Watched(LENGTHS)
    sampler = GlobalBatchSampler(
        lengths, 4, accumulation=2, world_size=world_size, rank=rank, strategy=strategy, seed=7
    )
    sampler.epoch = 2
    whole = list(sampler)
    for had in (0, 1, 10, 17, len(whole) - 1, len(whole)):
        lengths.asked.clear()
        sampler.skip = had
        resumed = list(sampler)
        assert resumed == [[]] * had + whole[had:]
        assert len(sampler.handed_out) == len(whole) - had
        if blocks and strategy == "group_by_length" and had * 4 * world_size >= 64:
            assert len(lengths.asked) <= 203 - 64  # nothing is measured of what was had
    assert list(sampler) == whole  # `skip` holds for one time


def test_what_was_handed_out_is_known_for_all_processes():
    samplers = [GlobalBatchSampler(LENGTHS, 4, world_size=2, rank=rank) for rank in (0, 1)]
    batches = list(zip(*samplers, strict=True))
    assert samplers[0].handed_out == samplers[1].handed_out
    assert [sorted(a + b) for a, b in batches] == [sorted(both) for both in samplers[0].handed_out]


@pytest.mark.parametrize("world_size, accumulation, batch_size", [(1, 4, 4), (2, 2, 4), (4, 1, 4), (1, 1, 16)])
def test_balanced_micro_batches_hold_the_same_global_batches(world_size, accumulation, batch_size):
    options = dict(accumulation=accumulation, world_size=world_size, seed=5, strategy="random")
    plain = [epoch_of(2, LENGTHS, batch_size, rank=rank, **options) for rank in range(world_size)]
    ranks = [epoch_of(2, LENGTHS, batch_size, rank=rank, balanced=True, **options) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [len(batches) for batches in plain]
    assert all(batch for batches in ranks for batch in batches)
    for step in range(0, len(ranks[0]), accumulation):
        steps = [[b[step : step + accumulation] for b in batches] for batches in (ranks, plain)]
        found, expected = (sorted(i for own in some for micro in own for i in micro) for some in steps)
        assert len(found) == len(expected)
        if step + accumulation < len(ranks[0]):
            assert found == expected
            tokens = [sum(LENGTHS[i] for i in micro) for own in steps[0] for micro in own]
            assert max(tokens) - min(tokens) <= max(LENGTHS)


@pytest.mark.parametrize("skip", [1, 6, 8, 13])
def test_a_resumed_balanced_epoch_goes_on_where_it_was(skip, small_blocks):
    def sampler():
        return GlobalBatchSampler(LENGTHS, 2, accumulation=4, rank=1, world_size=2, balanced=True)

    whole, resumed = sampler(), sampler()
    resumed.skip = skip
    expected, batches = list(whole), list(resumed)
    assert batches[:skip] == [[]] * skip and batches[skip:] == expected[skip:]
    assert list(resumed.handed_out) == list(whole.handed_out)[skip:]


@pytest.mark.parametrize("samples", range(8, 25))
def test_balanced_batches_leave_out_what_padded_ones_do(samples):
    def drawn(balanced):
        options = dict(accumulation=2, world_size=4, balanced=balanced, strategy="sequential")
        return [epoch_of(0, LENGTHS[:samples], 2, rank=rank, **options) for rank in range(4)]

    balanced, padded = drawn(True), drawn(False)
    assert [len(batches) for batches in balanced] == [len(batches) for batches in padded]
    found, expected = (sorted(i for rank in ranks for batch in rank for i in batch) for ranks in (balanced, padded))
    assert found == expected and all(batch for rank in balanced for batch in rank)


def test_division_by_tokens_leaves_no_part_empty():
    assert divided_by_tokens([7, 8, 9], [0, 0, 0], 3) == [[7], [8], [9]]
    assert divided_by_tokens([1, 2, 3, 4], [9, 5, 4, 1], 2) == [[1, 4], [2, 3]]


@pytest.mark.parametrize("blocks", [True, False])
def test_batches_by_modality(blocks, request):
    if blocks:
        request.getfixturevalue("small_blocks")
    has_media = np.random.default_rng(0).random(203) < 0.6
    sampler = GlobalBatchSampler(LENGTHS, 4, accumulation=2, world_size=2, has_media=has_media)
    order = sampler.order()
    assert sorted(order) == list(range(203))
    kinds = [set(has_media[order[start : start + 16]].tolist()) for start in range(0, 203, 16)]
    mixed = sum(len(kind) == 2 for kind in kinds)
    assert {True} in kinds and {False} in kinds and mixed <= (4 if blocks else 2)
    assert order != GlobalBatchSampler(LENGTHS, 4, accumulation=2, world_size=2).order()


def test_the_longest_comes_first_whatever_its_modality():
    for longest in (3, 150):
        lengths = [999 if i == longest else length for i, length in enumerate(LENGTHS)]
        has_media = np.arange(203) < 100
        assert longest in GlobalBatchSampler(lengths, 8, has_media=has_media).order()[:8]


def test_a_mixture_decides_what_an_epoch_has(small_blocks):
    numbers = (np.arange(203) >= 150).astype(int)
    mixture = Mixture(["many", "few"], numbers, {"many": 0.5, "few": 0.5})
    sampler = GlobalBatchSampler(LENGTHS, 4, strategy="group_by_length", mixture=mixture)
    for epoch in (0, 3):
        sampler.epoch = epoch
        order = sampler.order()
        assert sorted(order) == sorted(mixture.epoch(epoch).tolist()) and order != mixture.epoch(epoch).tolist()
        assert sorted(i for batch in sampler for i in batch) == sorted(order)


def test_errors():
    with pytest.raises(ValueError, match="need the sampling strategy 'group_by_length'"):
        GlobalBatchSampler([1, 2], 1, strategy="random", has_media=np.array([True, False]))
    with pytest.raises(ValueError, match="need another sampling strategy than 'sequential'"):
        GlobalBatchSampler([1, 2], 1, strategy="sequential", has_media=np.array([True, False]))
    with pytest.raises(ValueError, match="unknown sampling strategy 'length'; choose one of group_by_length, random"):
        GlobalBatchSampler([1, 2], 1, strategy="length")
    with pytest.raises(ValueError, match="1 training samples are too few for 2 processes"):
        GlobalBatchSampler([1], 1, world_size=2)
