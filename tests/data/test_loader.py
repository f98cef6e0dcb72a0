"""The loader's promises: one global order on every mesh, each slice read alone, nothing read twice, nothing crossed."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longstride.data import CorpusError, DataConfig, SequenceLoader, ValidationSet
from tests.data.memory import MemoryCorpus


def take(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


def assemble(corpus, data_size, cuts, steps, context=96, batch=4, **options):
    """The global batches, put together from what every (data rank, slice) reads by itself."""
    ranks = []
    for data_rank in range(data_size):
        place = {"data_rank": data_rank, "data_size": data_size, "seed": 5, **options}
        slices = [
            take(SequenceLoader(corpus, context, batch, bounds=bounds, **place), steps)
            for bounds in itertools.pairwise(cuts)
        ]
        for parts in zip(*slices, strict=True):
            assert len({(part.document_starts, part.num_targets, part.step) for part in parts}) == 1
        ranks.append(slices)
    return [
        (
            torch.cat([torch.cat([part[step].tokens_BT for part in slices], 1) for slices in ranks]).tolist(),
            torch.cat([torch.cat([part[step].targets_BT for part in slices], 1) for slices in ranks]).tolist(),
            tuple(row for slices in ranks for row in slices[0][step].document_starts),
            ranks[0][0][step].num_targets,
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(0, 96), (0, 48, 96), (0, 1, 2, 95, 96), (0, 24, 48, 72, 96), (0, 0, 96, 96)])
@pytest.mark.parametrize("weights", [None, (3, 1)])
def test_every_mesh_reads_the_same_global_batches(data_size, cuts, weights):
    corpus = MemoryCorpus(weights=weights)
    whole = assemble(corpus, 1, (0, 96), 8)
    assert assemble(corpus, data_size, cuts, 8) == whole
    assert assemble(corpus, data_size, cuts, 8, start_step=1) != whole  # the comparison can fail
    assert assemble(corpus, data_size, cuts, 8, seed=6) != whole


@given(
    length=st.integers(1, 300),
    context=st.integers(1, 120),
    batch=st.integers(1, 5),
    documents=st.sets(st.integers(0, 299), max_size=12),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_tokens_targets_and_boundaries_against_a_slow_reading(length, context, batch, documents, seed):
    context = min(length, context)
    corpus = MemoryCorpus((length, length), sorted(documents | {0}))
    steps = 2 * (length // context) // batch + 2
    for step, part in enumerate(take(SequenceLoader(corpus, context, batch, seed=seed, prefetch=0), steps)):
        counted = 0
        for tokens, targets, starts in zip(part.tokens_BT, part.targets_BT, part.document_starts, strict=True):
            positions = [(int(tokens[0]) + offset) % length for offset in range(context + 1)]
            begins = [position in documents or position == 0 for position in positions]
            following = zip(positions[1:], begins[1:], strict=True)
            expected = [-100 if begin else position for position, begin in following]
            assert tokens.tolist() == positions[:-1]
            assert targets.tolist() == expected
            assert starts == tuple(place for place in range(1, context) if begins[place])
            counted += sum(target != -100 for target in expected)
        assert part.tokens_BT.dtype == part.targets_BT.dtype == torch.int64
        assert (part.step, part.num_targets) == (step, counted)


def test_a_slice_is_read_alone_and_only_once():
    corpus = MemoryCorpus((1024, 512), documents=(0, 500))
    for start, stop in ((0, 32), (32, 64), (0, 128), (17, 18)):
        for data_rank in range(2):
            corpus.ranges.clear()
            place = {"data_rank": data_rank, "data_size": 2, "bounds": (start, stop), "prefetch": 0}
            batches = take(SequenceLoader(corpus, 128, 4, seed=0, **place), 5)
            assert sum(last - first for first, last in corpus.ranges) == 5 * 2 * (stop - start + 1)
            wanted = {int(token) for batch in batches for token in batch.tokens_BT.flatten()}
            touched = {token for first, last in corpus.ranges for token in range(first, last)}
            assert wanted <= touched
    corpus.ranges.clear()
    take(SequenceLoader(corpus, 128, 4, seed=0, bounds=(64, 64), prefetch=0), 5)
    assert corpus.ranges == []


@pytest.mark.parametrize("context", [50, 64, 333, 1000])
def test_an_epoch_reads_every_token_once(context):
    corpus = MemoryCorpus()
    num_windows = 1000 // context
    batches = take(SequenceLoader(corpus, context, 1, seed=1, prefetch=0), 3 * num_windows)
    orders, missing = [], []
    for epoch in range(3):
        part = batches[epoch * num_windows : (epoch + 1) * num_windows]
        seen = Counter(int(token) for batch in part for token in batch.tokens_BT[0])
        assert set(seen.values()) == {1}
        assert len(seen) == num_windows * context
        orders.append([int(batch.tokens_BT[0, 0]) for batch in part])
        missing.append(frozenset(range(1000)) - set(seen))
    assert orders[0] != orders[1] != orders[2]  # each epoch has its own phase
    if 1000 % context:
        assert len(set(missing)) > 1
    if num_windows > 3:
        assert orders[0] != sorted(orders[0])


def test_a_mixture_holds_its_weights_and_repeats_nothing():
    corpus = MemoryCorpus((40_000, 300), documents=(0,), weights=(0.7, 0.2, 0.1))
    edges = [region.start for region in corpus.regions("train")]
    starts = [int(batch.tokens_BT[0, 0]) for batch in take(SequenceLoader(corpus, 4, 1, seed=1, prefetch=0), 2000)]
    which = [sum(start >= edge for edge in edges) - 1 for start in starts]
    assert [which[:1000].count(number) for number in range(3)] == [700, 200, 100]
    assert [which[1000:].count(number) for number in range(3)] == [700, 200, 100]
    assert len(set(starts)) == 2000
    assert which[:20] != sorted(which[:20])


def test_resume_needs_the_step_alone():
    corpus = MemoryCorpus()
    tokens = [batch.tokens_BT.tolist() for batch in take(SequenceLoader(corpus, 96, 3, seed=2), 12)]
    corpus.ranges.clear()
    loader = SequenceLoader(corpus, 96, 3, seed=2, start_step=7, prefetch=0)
    assert loader.position == 7
    assert [batch.tokens_BT.tolist() for batch in itertools.islice(loader, 5)] == tokens[7:]
    assert loader.position == 12
    assert sum(stop - start for start, stop in corpus.ranges) == 5 * 3 * 97  # nothing was replayed
    loader.seek(3)
    assert next(loader).tokens_BT.tolist() == tokens[3]
    ahead = SequenceLoader(corpus, 96, 3, seed=2, prefetch=4)
    next(ahead)
    assert ahead.position == 1  # not what the thread has read
    ahead.close()
    assert next(ahead).tokens_BT.tolist() == tokens[1]
    ahead.close()


def test_a_resume_on_another_mesh_sees_every_token_exactly_once():
    corpus = MemoryCorpus((960, 300), documents=(0, 77))
    before = assemble(corpus, 1, (0, 48, 96), 3, batch=2)
    after = assemble(corpus, 2, (0, 24, 48, 72, 96), 2, batch=2, start_step=3)
    seen = Counter(token for tokens, *_ in before + after for row in tokens for token in row)
    assert seen == Counter(range(960))


def test_validation_is_fixed_and_weighs_rightly_on_any_mesh():
    corpus = MemoryCorpus(lengths=(1000, 300))

    def rows(batch, data_size, sequences=5):
        found, counted = [], 0
        for data_rank in range(data_size):
            held_out = ValidationSet(corpus, 50, batch, sequences=sequences, data_rank=data_rank, data_size=data_size)
            batches = list(held_out)
            assert len(batches) == len(held_out)
            counted = sum(part.num_targets for part in batches)
            real = [
                (t.tolist(), y.tolist())
                for part in batches
                for t, y in zip(part.tokens_BT, part.targets_BT, strict=True)
            ]
            found += [row for row in real if row[1] != [-100] * 50]
        assert counted == sum(target != -100 for row in found for target in row[1])
        return sorted(found)

    assert rows(1, 1) == rows(4, 1) == rows(4, 2) == rows(2, 2)
    assert len(rows(1, 1)) == 5
    assert len(rows(1, 1, sequences=99)) == 6  # no more than there are
    tokens = [token for row in rows(1, 1) for token in row[0]]
    assert min(tokens) >= 1_000_000 and len(set(tokens)) == len(tokens)


def test_mistakes_are_one_clear_line():
    corpus = MemoryCorpus()
    for problem, message in (
        (lambda: SequenceLoader(corpus, 1001, 1, seed=0), "data.context 1001 is longer than the train split .* 1000"),
        (lambda: ValidationSet(corpus, 301, 1, sequences=1), "validation split of 'memory', 300 tokens"),
        (lambda: SequenceLoader(corpus, 10, 3, seed=0, data_size=2), "data.batch 3 does not divide over 2 .*take 4"),
        (lambda: SequenceLoader(corpus, 10, 4, seed=0, data_size=2, data_rank=2), "data rank 2 is not one of 2"),
        (lambda: SequenceLoader(corpus, 10, 1, seed=0, bounds=(5, 11)), r"slice \[5, 11\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            problem()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValidationError):
        DataConfig(context=0)
    with pytest.raises(ValidationError):
        DataConfig(contxt=8)  # pyright: ignore[reportCallIssue]


def test_a_failing_read_surfaces_at_its_step():
    class Broken(MemoryCorpus):
        def read(self, split, start, stop):
            if len(self.ranges) == 3:
                raise CorpusError("shard 7 is missing")
            return super().read(split, start, stop)

    for prefetch in (0, 1, 3):
        loader = SequenceLoader(Broken(documents=(0,)), 1000, 1, seed=0, bounds=(0, 1), prefetch=prefetch)
        assert [next(loader).step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CorpusError, match="shard 7 is missing"):
            next(loader)
        assert loader.position == 3
        with pytest.raises(CorpusError, match="shard 7 is missing"):  # tried again, not passed over
            next(loader)
        loader.close()


def test_the_config_opens_what_it_names():
    config = DataConfig(corpus="ecoli", context=64, batch=2, validation_sequences=3)
    corpus = config.open()
    with config.training(corpus, seed=1, bounds=(0, 32)) as loader:
        assert next(loader).tokens_BT.shape == (2, 32)
    held_out = config.validation(corpus)
    assert (len(held_out), held_out.num_sequences) == (2, 3)
