"""A row of a batch is sealed as it is alone, whatever the lengths of the others: short, blank or late to begin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectral_layers import BLOCK, GROUPS, HEAD_DIM, HEADS, NEAR, check_bytes, config_of, new_tokens, random

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.queries import QuerySampler
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.metric import metric_of
from unsloth_spectral.rope import spans_of

LONG, SINKS, RESIDUAL = 700, 4, 16
NEVER = torch.iinfo(torch.int64).max
RANK = SpectralConfig(HEAD_DIM, HEAD_DIM, BLOCK, SINKS, RESIDUAL)


def queries_of(rows: int, count: int, seed: int = 2) -> torch.Tensor:
    """Queries of each row weight different directions."""
    looks = torch.stack([torch.logspace(0, -2, HEAD_DIM).roll(row) for row in range(rows)])[:, None, None]
    return random(rows, HEADS * GROUPS, count, HEAD_DIM, seed=seed) * looks


class Chunk:
    """The next tokens of a batch, padded on the left, as a forward pass shows them to a layer."""

    def __init__(self, start: int, count: int, padding: torch.Tensor, queries: torch.Tensor) -> None:
        self.keys, self.values, self.rotation = new_tokens(start, count, len(padding), seed=start)
        self.start, self.stop = start, start + count
        self.real = torch.arange(start, self.stop) >= padding[:, None]
        self.keys[~self.real[:, None].expand(-1, HEADS, -1)] = 9.0  # what a model makes of padding
        self.seen_from = torch.where(padding < self.stop, padding, NEVER)
        self.queries = queries

    def pick(self, rows: list[int]) -> "Chunk":
        chunk = object.__new__(Chunk)
        chunk.__dict__ = {**vars(self)}
        for name in ("keys", "values", "real", "seen_from", "queries"):
            setattr(chunk, name, getattr(self, name)[rows])
        return chunk

    def feed(self, layer: SpectralLayer) -> None:
        layer.append(self.keys.clone(), self.values.clone())
        layer.note_padding(self.seen_from)
        layer.observe(self.queries, self.rotation, 0.25, self.real)
        layer.seal()


def coded(layer: SpectralLayer) -> list[SpectralBlock]:
    return [block for block in layer.blocks if isinstance(block, SpectralBlock)]


def check_rows(layer: SpectralLayer, chunks: list[Chunk], near: float = NEAR) -> None:
    """Every token that is not padding is in its place, and the first ones of each row are exact."""
    real = torch.cat([chunk.real for chunk in chunks], 1)
    for name, rebuilt in zip(("keys", "values"), layer.reconstruct(), strict=True):
        original = torch.cat([getattr(chunk, name) for chunk in chunks], 2)
        for row, is_real in enumerate(real):
            if is_real.any():
                tokens, expected = rebuilt[row][:, is_real], original[row][:, is_real]
                assert float((tokens - expected).norm() / expected.norm()) < near, row
                assert torch.equal(tokens[:, :SINKS], expected[:, :SINKS]), "sinks"


@pytest.mark.parametrize("length", [50, 256, 700])
def test_a_row_is_sampled_as_it_is_alone(length: int) -> None:
    queries, asking = random(3, 2, LONG, 5), torch.arange(LONG) >= LONG - torch.tensor([[LONG], [length], [0]])
    together, alone = QuerySampler(), QuerySampler()
    together.note(queries, LONG, missing=0, asking=asking)
    alone.note(queries[1:2, :, LONG - length :], LONG, missing=0)
    all_picked, all_distances = together.sample(0, LONG)
    picked, distances = alone.sample(0, LONG)
    assert all_picked is not None
    assert all_distances is not None
    is_query = all_distances > 0
    assert torch.equal(all_picked[1][:, is_query[1]], picked[0])
    assert torch.equal(all_distances[1][is_query[1]], distances[0])
    assert int(is_query[0].sum()) == 256
    assert not is_query[2].any()
    assert not all_picked.mT[~is_query[:, None, None].expand_as(all_picked.mT)].any()


def test_while_decoding_a_row_that_sees_nothing_is_not_asked() -> None:
    sampler = QuerySampler()
    for position in range(900, 1000):
        sampler.note(random(2, 2, 1, 5), position + 1, missing=999 - position, asking=torch.tensor([[True], [False]]))
    _, distances = sampler.sample(0, 1000)
    assert distances is not None
    assert (distances[0] > 0).all()
    assert not distances[1].any()


@pytest.mark.parametrize("length", [9, 100, 500])
def test_the_metric_of_a_row_is_the_one_it_has_alone(length: int, assert_close: Callable[..., None]) -> None:
    hidden, rotation, queries = 512 - length, new_tokens(0, 512, 1, 0)[2], queries_of(2, 256)
    spans = spans_of(rotation)
    queries[1, :, length:] = 0
    distances = torch.stack([2 * torch.arange(256) + 1, torch.where(torch.arange(256) < length, 512, 0)])
    together = metric_of(Observed(rotation, queries, distances, torch.tensor([0, hidden])), HEADS, HEAD_DIM, spans)
    first = metric_of(Observed(rotation, queries[:1], distances[:1]), HEADS, HEAD_DIM, spans)
    count = min(length, 256)
    row_observed = Observed(rotation.slice(hidden, 512), queries[1:, :, :count], torch.full((1, count), length))
    assert_close(together[:1], first, 1e-5)
    assert_close(together[1:], metric_of(row_observed, HEADS, HEAD_DIM, spans), 1e-5)


def test_a_row_without_queries_gets_an_even_metric_in_the_unit_of_the_others() -> None:
    queries, distances = queries_of(2, 64), torch.full((2, 64), 64)
    queries[1], distances[1] = 0, 0
    metric = metric_of(Observed(None, queries, distances), HEADS, HEAD_DIM, ())
    assert torch.allclose(*metric.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-4)
    assert torch.allclose(metric[1], metric[1, :, 0, 0][:, None, None] * torch.eye(HEAD_DIM))


@pytest.mark.parametrize("others", [[9], [0], [0, 9, 30]], ids=["short", "blank", "several"])
def test_a_long_row_gets_the_codes_it_gets_alone(others: list[int]) -> None:
    padding = torch.tensor([0, *(LONG - length for length in others)])
    chunk = Chunk(0, LONG, padding, queries_of(len(padding), LONG))
    layers = []
    for rows in (list(range(len(padding))), [0]):
        layer = SpectralLayer(config_of(bits_per_element=2.5, num_sink_tokens=0, residual_length=60))
        chunk.pick(rows).feed(layer)
        layers.append(coded(layer)[0])
    together, alone = layers
    assert together.keys.widths == alone.keys.widths
    assert together.values.nbits == alone.values.nbits
    assert torch.equal(together.keys.streams[:1], alone.keys.streams)
    assert torch.equal(together.values.streams[:1], alone.values.streams)


def test_rows_of_all_lengths_are_read_as_well_as_alone() -> None:
    lengths = [LONG, 500, 300, 9, 0]
    padding = LONG - torch.tensor(lengths)
    chunk = Chunk(0, LONG, padding, queries_of(len(lengths), LONG))

    def errors(rows: list[int]) -> list[float]:
        """Error of the scores of each row's own queries over its own tokens."""
        layer = SpectralLayer(config_of(bits_per_element=3))
        picked = chunk.pick(rows)
        picked.feed(layer)
        queries = picked.queries.unflatten(1, (HEADS, GROUPS)).flatten(2, 3)
        scores, exact = (queries @ keys.mT for keys in (layer.reconstruct()[0], picked.keys))
        shown = [(part - whole)[..., real] for part, whole, real in zip(scores, exact, picked.real, strict=True)]
        return [float(lost.square().mean().sqrt()) for lost in shown]

    together = errors([0, 1, 2, 3, 4])
    for row in range(3):
        assert together[row] < 1.3 * errors([row])[0], row


@pytest.mark.parametrize("config", [config_of(), RANK], ids=["spectral", "rank"])
@pytest.mark.parametrize("late", [300, 340, 395, 400, 401, 650, 1100, 2000])
def test_a_row_that_begins_in_a_later_chunk(
    config: SpectralConfig, late: int, allocated_bytes: Callable[[Any], int]
) -> None:
    """Eight rows, seven of them long: the bases of the seven must not decide for the other."""
    padding, layer, chunks = torch.tensor([0] * 7 + [late]), SpectralLayer(config), []
    for start in (0, 400, 800):
        chunks.append(Chunk(start, 400, padding, queries_of(8, 400, seed=start)))
        chunks[-1].feed(layer)
        check_rows(layer, chunks)
    for start in range(1200, 1350):
        seen = torch.minimum(padding, torch.tensor(start))
        chunks.append(Chunk(start, 1, seen, queries_of(8, 1, seed=start)))
        chunks[-1].feed(layer)
    assert not layer.awaits_rows
    check_rows(layer, chunks, NEAR if late < 1200 else 1.0)
    if config.codec == "spectral":
        check_bytes(layer, allocated_bytes)
    assert layer.stats().exact_blocks == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_padding_alone(rows: int) -> None:
    layer, padding = SpectralLayer(config_of()), torch.full((rows,), 300)
    chunks = [Chunk(0, 300, padding, queries_of(rows, 300))]
    chunks[0].feed(layer)
    assert layer.stats().sealed_tokens > 0
    for start in range(300, 600, 50):
        chunks.append(Chunk(start, 50, padding, queries_of(rows, 50, seed=start)))
        chunks[-1].feed(layer)
    assert layer.stats().exact_blocks == 0
    check_rows(layer, chunks)


def test_padding_only_shrinks() -> None:
    layer = SpectralLayer(RANK)
    keys, values, _ = new_tokens(0, 100, 4, 0)
    layer.append(keys, values)
    for seen in ([NEVER, NEVER, 30, 0], [NEVER, 60, 90, 80]):
        layer.note_padding(torch.tensor(seen))
    more = new_tokens(100, 100, 4, 1)[:2]
    layer.append(*more)
    layer.note_padding(torch.tensor([150, 170, 180, 190]))
    layer.seal()
    whole = torch.cat([keys, more[0]], 2)
    for row, first in enumerate((150, 60, 30, 0)):
        assert torch.equal(layer.reconstruct()[0][row, :, first : first + SINKS], whole[row, :, first : first + SINKS])
        error = (layer.reconstruct()[0][row, :, first:] - whole[row, :, first:]).norm()
        assert float(error / whole[row, :, first:].norm()) < NEAR


@pytest.mark.parametrize("kept", [0, 2, 100, 350, 420])
def test_a_crop_while_a_row_waits(kept: int) -> None:
    padding, layer = torch.tensor([0, 500]), SpectralLayer(RANK)
    Chunk(0, 450, padding, queries_of(2, 450)).feed(layer)
    layer.crop(kept)
    chunk = Chunk(kept, 300, torch.tensor([0, kept + 20]), queries_of(2, 300))
    chunk.feed(layer)
    rebuilt = layer.reconstruct()[0][..., kept:, :]
    for row, first in enumerate((0, 20)):
        expected = chunk.keys[row, :, first:]
        assert float((rebuilt[row, :, first:] - expected).norm() / expected.norm()) < NEAR


def test_a_row_of_which_nothing_was_seen_before_a_crop_still_waits() -> None:
    padding, layer = torch.tensor([400, 2]), SpectralLayer(config_of(num_sink_tokens=0))
    Chunk(0, 20, padding, queries_of(2, 20)).feed(layer)
    layer.crop(1)
    Chunk(1, 383, padding, queries_of(2, 383)).feed(layer)
    assert layer.stats().sealed_tokens
    for rebuilt in layer.reconstruct():
        assert not rebuilt[0, :, : layer.stats().sealed_tokens].any(), "padding is sealed as zeros"


def test_exact_blocks_keep_their_padding_zeroed_in_later_chunks() -> None:
    padding, layer = torch.tensor([0, 900]), SpectralLayer(config_of())
    for start in (0, 400, 800):
        chunk = Chunk(start, 400, padding, queries_of(2, 400, seed=start))
        chunk.keys[1, :, : max(0, min(400, 900 - start))] = float("nan")
        chunk.feed(layer)
    assert not any(isinstance(block, ExactBlock) for block in layer.blocks[1:-1])


def test_queries_of_padding_do_not_shape_the_codes() -> None:
    rebuilt = []
    for size in (0.0, 100.0):
        layer, queries = SpectralLayer(config_of(bits_per_element=2)), queries_of(2, LONG)
        queries[1, :, :200] = size * random(HEADS * GROUPS, 200, HEAD_DIM, seed=5)
        Chunk(0, LONG, torch.tensor([0, 200]), queries).feed(layer)
        assert layer.stats().sealed_tokens
        rebuilt.append(layer.reconstruct())
    assert torch.equal(rebuilt[0][0], rebuilt[1][0])
