"""The positions of the exact tail against a plain list, and the sample of queries that attend to it."""

import random

import pytest
import torch

from unsloth_spectral.cache.positions import PositionLog
from unsloth_spectral.cache.queries import QuerySampler
from unsloth_spectral.codec.tensors import TokenShape, storage_bytes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten
from unsloth_spectral.rope import Rotation

PAIRS = 4
BYTES = 2 * (3 * 5 * 4 + 8)  # of a query in each of two rows, and of where it was asked


def rotation_of(*rows: list[int]) -> Rotation:
    angle = torch.tensor(rows)[..., None] * 10.0 ** -torch.arange(PAIRS)
    return Rotation.of(torch.polar(torch.ones_like(angle), angle), torch.arange(PAIRS), torch.arange(PAIRS) + PAIRS)


def nbytes(log: PositionLog) -> int:
    return storage_bytes(*log.tensors)


def near(rotation: Rotation, rows: list[list[int]]) -> bool:
    expected = rotation_of(*rows).table()
    table = rotation.table().expand(max(len(rotation.table()), len(rows)), -1, -1)
    return table.shape[1:] == expected.shape[1:] and bool((table - expected).abs().max() < 2e-2)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("padded", [False, True])
def test_random_histories_match_a_list(seed: int, padded: bool) -> None:
    rng = random.Random(seed)
    log, rows, position = PositionLog(), [[], []], 0
    for _ in range(30):
        kind = rng.choice(["append", "append", "append", "drop", "crop", "batch"])
        num_held = len(rows[0])
        if kind == "append":
            count = rng.choice([1, 1, 2, 30])
            new = [list(range(position + shift, position + shift + count)) for shift in (0, 5 * padded)]
            log.append(rotation_of(*new), count)
            rows = [row + extra for row, extra in zip(rows, new, strict=True)]
            position += count
        elif kind == "drop":
            count = rng.choice([0, num_held, rng.randint(0, num_held)])
            log.drop(count)
            rows = [row[count:] for row in rows]
        elif kind == "crop":
            num_kept = rng.choice([num_held, rng.randint(0, num_held), num_held + 3])
            log.crop(num_kept)
            position -= max(0, num_held - num_kept)
            rows = [row[:num_kept] for row in rows]
        elif padded:
            log.map_batch(lambda tensor: tensor[[1, 0]])
            rows = rows[::-1]
            if rows[0] and rows[0][0] > rows[1][0]:
                log.map_batch(lambda tensor: tensor[[1, 0]])
                rows = rows[::-1]
        num_held = len(rows[0])
        assert log.num_tokens == num_held
        assert log.range(0, num_held + 1) is None
        if num_held:
            start = rng.randint(0, num_held - 1)
            stop = rng.randint(start + 1, num_held)
            rotation = log.range(start, stop)
            assert rotation is not None
            assert rotation.num_tokens == stop - start
            assert near(rotation, [row[start:stop] for row in rows])
        else:
            assert nbytes(log) == 0


def test_many_single_tokens_stay_a_few_numbers() -> None:
    log = PositionLog()
    for position in range(500):
        log.append(rotation_of([position]), 1)
        log.range(0, 1)
    assert log.num_tokens == 500
    assert nbytes(log) <= (64 + 2) * 8 * PAIRS
    log.drop(128)
    rotation = log.range(0, 372)
    assert rotation is not None
    assert near(rotation, [list(range(128, 500))])


def test_an_empty_log() -> None:
    log = PositionLog()
    assert log.range(0, 0) is None
    log.drop(5)
    log.crop(0)
    log.map_batch(torch.clone)
    assert log.num_tokens == nbytes(log) == 0


def queries(length: int, first: int) -> torch.Tensor:
    """``[2, 3, length, 5]``, each filled with its position."""
    return torch.arange(first, first + length, dtype=torch.float32)[:, None].expand(2, 3, length, 5).clone()


def test_a_prefill_is_sampled_evenly() -> None:
    sampler = QuerySampler()
    sampler.note(queries(1000, 0), 1000, missing=0)
    sampled, distances = sampler.sample(4, 900)
    assert sampled is not None
    assert distances is not None
    places = sampled[0, 0, :, 0]
    assert sampled.shape == (2, 3, distances.shape[1], 5)
    assert 250 <= distances.shape[1] <= 256
    assert places[0] < 10
    assert places[-1] == 999
    assert (places.diff() <= 5).all()
    assert (places.diff() >= 3).all()
    # A query saw itself and all tokens before it, from token 4 on.
    assert torch.equal(distances[1], (places.long() + 1 - 4).clamp(max=900))
    assert sampler.nbytes == 256 * (2 * 3 * 5 * 4 + 8)  # both rows were asked at the same positions


def test_padding_is_not_asked() -> None:
    sampler = QuerySampler()
    asking = torch.arange(100) >= torch.tensor([[0], [40]])
    sampler.note(queries(100, 0), 100, missing=-5, asking=asking)
    sampled, distances = sampler.sample(0, 100)
    assert sampled is not None
    assert distances is not None
    for row, first in enumerate((0, 40)):
        assert sampled[row, 0, distances[row] > 0, 0].tolist() == list(range(first, 100))


def test_while_decoding_few_are_held() -> None:
    sampler = QuerySampler()
    for position in range(1000, 1600):
        sampler.note(queries(1, position), position + 1, missing=1600 - position - 1)
    sampled, distances = sampler.sample(1100, 500)
    assert sampled is not None
    assert distances is not None
    assert 30 <= distances.shape[1] <= 34
    assert sampled.dtype == torch.float32
    assert sampler.nbytes <= 34 * BYTES
    assert torch.allclose(sampled[0, 0, :, 0], distances + 1099.0, rtol=1e-3)
    assert distances.max() == 500
    assert distances.min() > 500 - 140


def test_queries_before_the_tokens_do_not_count() -> None:
    sampler = QuerySampler()
    assert sampler.sample(0, 10) == (None, None)
    sampler.note(queries(50, 0), 50, missing=0)
    assert sampler.sample(50, 10) == (None, None)
    sampled, distances = sampler.sample(48, 10)
    assert sampled is not None
    assert sampled[0, 0, :, 0].tolist() == [48, 49]
    assert distances.tolist() == [[1, 2]] * 2


def sampled(sampler: QuerySampler) -> list[int]:
    """Positions asked at."""
    queries, _ = sampler.sample(0, 10_000)
    return [] if queries is None else queries[0, 0, :, 0].int().tolist()


def test_of_tokens_that_come_together_every_fourth_is_held() -> None:
    """Whichever tokens are taken back; in assisted decoding these are mostly the newest."""
    sampler, num_held = QuerySampler(), 1000
    while num_held < 1200:
        sampler.note(queries(6, num_held), num_held + 6, missing=1220 - num_held - 6)
        num_held += 1 + num_held % 6
        sampler.crop(num_held)
    assert sampled(sampler) == list(range(1095, num_held, 4))


@pytest.mark.parametrize("kept", [0, 1, 40, 99, 100, 300])
def test_a_crop_drops_the_queries_of_what_is_gone(kept: int) -> None:
    sampler = QuerySampler()
    sampler.note(queries(100, 0), 100, missing=0)
    sampler.note(queries(1, 100), 101, missing=3)
    before = sampled(sampler)
    sampler.crop(kept)
    assert sampled(sampler) == [position for position in before if position < kept]
    assert sampler.nbytes <= BYTES * max(1, kept)


def test_queries_follow_the_batch() -> None:
    sampler = QuerySampler()
    sampler.map_batch(lambda tensor: tensor[[1]])
    sampler.note(torch.arange(2)[:, None, None, None].expand(2, 3, 8, 5).float(), 8, missing=4)
    sampler.note(torch.arange(2)[:, None, None, None].expand(2, 3, 4, 5).float(), 12, missing=0)
    sampler.map_batch(lambda tensor: tensor[[1, 0, 1]])
    queries, distances = sampler.sample(0, 12)
    assert queries is not None
    assert distances is not None
    assert queries.shape == (3, 3, 6, 5)
    assert queries[:, 0, :, 0].tolist() == [[row] * 6 for row in (1.0, 0.0, 1.0)]
    assert distances.tolist() == [[4, 8, 9, 10, 11, 12]] * 3


def test_a_sample_comes_back_as_it_was_stored() -> None:
    sampler, shape = QuerySampler(), TokenShape(2, 1, 5, 5, torch.float32, torch.float32)
    sampler.note(queries(8, 0), 8, missing=4)
    sampler.note(queries(4, 8), 12, missing=0)
    tree, tensors = flatten(sampler.to_fields())
    restored = QuerySampler.from_fields(Fields(tree, lambda number, _: tensors[number]), shape)
    for found, expected in zip(restored.sample(0, 12), sampler.sample(0, 12), strict=True):
        assert found is not None
        assert torch.equal(found, expected)
    tree = {**tree, "positions": tree["positions"][::-1]}
    with pytest.raises(LoadError, match="a position for each query"):
        QuerySampler.from_fields(Fields(tree, lambda number, _: tensors[number]), shape)
