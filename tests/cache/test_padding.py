"""Left-padded batches: every row keeps its own sinks, padding takes no rank, and masks find their columns."""

import copy
import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.attention import direct, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.sink_tokens import SinkTokens
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank.block import RankBlock

HEADS, HEAD_DIM, SIZE, SINKS, RESIDUAL, TOKENS = 3, 8, 16, 4, 5, 100
CONFIG = SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, SINKS, RESIDUAL)
LOSSY = SpectralConfig(2, 2, SIZE, SINKS, RESIDUAL)
PADDING = torch.tensor([0, 3, 50, 70])
NEAR = 0.03


def pair(num_tokens: int = TOKENS, seed: int = 0, batch: int = len(PADDING)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, num_tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def padded(config: SpectralConfig = CONFIG, padding: torch.Tensor = PADDING, extra: int = 0) -> SpectralLayer:
    """A sealed layer of ``pair()``, and of ``pair(extra, 1)`` behind it, one token at a time."""
    layer = SpectralLayer(config)
    layer.append(*pair(batch=len(padding)))
    layer.seal(padding)
    for position in range(extra):
        layer.append(*(tensor[..., position : position + 1, :] for tensor in pair(extra, 1, len(padding))))
        layer.seal()
    return layer


def everything(extra: int = 0) -> list[torch.Tensor]:
    return [torch.cat(parts, -2) for parts in zip(pair(), pair(extra, 1), strict=True)]


def causal(padding: torch.Tensor, query_length: int, kv_length: int) -> torch.Tensor:
    """The mask transformers makes: causal, and no padding is seen."""
    columns = torch.arange(kv_length)
    seen = columns[None, :] <= torch.arange(kv_length - query_length, kv_length)[:, None]
    return (seen[None] & (columns >= padding[:, None])[:, None])[:, None]


def check_attention(layer: SpectralLayer, padding: torch.Tensor, assert_close: Callable[..., None]) -> None:
    """Over blocks and arranged mask as over the dense tokens in order and the mask as it came."""
    dense = [ExactBlock(*layer.reconstruct())]
    query = torch.randn(len(padding), 2 * HEADS, 3, HEAD_DIM, generator=torch.Generator().manual_seed(9))
    mask = causal(padding, 3, layer.num_tokens)
    expected = naive.attend(query, dense, mask, ScoreOptions(1.0))
    sees = mask.any(-1, keepdim=True)
    for nothing in (None, -torch.inf, torch.finfo(torch.float32).min):
        mask_in_form = mask if nothing is None else torch.where(mask, 0.0, nothing)
        arranged = layer.arrange_mask(mask_in_form)
        assert arranged.dtype == mask_in_form.dtype
        assert arranged.shape[-1] == sum(block.num_tokens for block in layer.blocks)
        output = direct.attend(query, layer.blocks, arranged, ScoreOptions(1.0))
        if nothing is not None and nothing > -torch.inf:
            output = torch.where(sees, output, 0.0)  # with a finite mask a row that sees nothing is anything
        assert_close(output, expected, 1e-4)


@pytest.mark.parametrize("extra", [0, 40])
def test_every_row_keeps_its_own_first_tokens_exact(extra: int) -> None:
    layer = padded(LOSSY, extra=extra)
    assert layer.stats().sealed_tokens > 0
    for rebuilt, expected in zip(layer.reconstruct(), everything(extra), strict=True):
        for row, first in enumerate(PADDING.tolist()):
            assert torch.equal(rebuilt[row, :, first : first + SINKS], expected[row, :, first : first + SINKS]), row
        assert not torch.equal(rebuilt[0], expected[0])


def test_positions_are_counted_from_the_first_token_padding_included(assert_close: Callable[..., None]) -> None:
    layer = padded(extra=40)
    assert layer.num_tokens == TOKENS + 40
    for rebuilt, expected in zip(layer.reconstruct(), everything(40), strict=True):
        for row, first in enumerate(PADDING.tolist()):
            assert_close(rebuilt[row, :, first:], expected[row, :, first:], NEAR)


def test_padding_takes_no_rank() -> None:
    keys, values = pair()
    padding = torch.tensor([0, 40, 40, 40])
    for tensor in (keys, values):
        tensor[1:, :, 32:40] *= 1e4  # would drown the tokens of its block
    layer = SpectralLayer(CONFIG)
    layer.append(keys, values)
    layer.seal(padding)
    for rebuilt, expected in zip(layer.reconstruct(), (keys, values), strict=True):
        assert torch.equal(rebuilt[1, :, 16:40], torch.zeros(HEADS, 24, HEAD_DIM))
        assert (rebuilt[1, :, 40:] - expected[1, :, 40:]).abs().max() < 0.1


def test_numbers_that_are_not_finite_in_the_padding_keep_no_block_exact() -> None:
    keys, values = pair()
    keys[2, :, :50] = float("nan")
    values[3, :, 10] = float("inf")
    layer = SpectralLayer(CONFIG)
    layer.append(keys, values)
    layer.seal(PADDING)
    assert layer.stats().exact_blocks == 0
    assert layer.stats().sealed_tokens == 80


@pytest.mark.parametrize("config", [CONFIG, LOSSY])
@pytest.mark.parametrize("extra", [0, 1, 40])
def test_attention_finds_its_columns(config: SpectralConfig, extra: int, assert_close: Callable[..., None]) -> None:
    check_attention(padded(config, extra=extra), PADDING, assert_close)


def test_originals_of_the_sinks_are_seen_once(assert_close: Callable[..., None]) -> None:
    layer = padded()
    arranged = layer.arrange_mask(causal(PADDING, 1, TOKENS))
    assert arranged.sum(-1).flatten().tolist() == [TOKENS - first for first in PADDING.tolist()]
    for row, first in enumerate(PADDING.tolist()):
        assert arranged[row, 0, 0, :SINKS].all()
        assert not arranged[row, 0, 0, SINKS + first : SINKS + first + SINKS].any()


def test_no_mask_means_every_token_once() -> None:
    layer = padded()
    arranged = layer.arrange_mask(None)
    assert arranged.dtype == torch.bool
    assert arranged.shape == (len(PADDING), 1, 1, TOKENS + SINKS)
    assert arranged.sum(-1).flatten().tolist() == [TOKENS] * len(PADDING)
    one_row = layer.arrange_mask(torch.ones(1, 1, 2, TOKENS, dtype=torch.bool))
    assert one_row.shape == (len(PADDING), 1, 2, TOKENS + SINKS)


@pytest.mark.parametrize("hidden", [TOKENS - 1, TOKENS - 2, TOKENS])
def test_a_row_padded_almost_to_its_end(hidden: int, assert_close: Callable[..., None]) -> None:
    padding = torch.tensor([0, hidden])
    layer = padded(CONFIG, padding)
    assert layer.num_tokens == TOKENS
    rebuilt, expected = layer.reconstruct()[0], pair(batch=2)[0]
    assert torch.equal(rebuilt[1, :, -SINKS:], expected[1, :, -SINKS:])
    check_attention(layer, padding, assert_close)


def test_rows_can_be_chosen_and_repeated(assert_close: Callable[..., None]) -> None:
    layer = padded(extra=3)
    rows = torch.tensor([3, 3, 0, 2, 1])
    layer.map_batch(lambda tensor: tensor[rows])
    check_attention(layer, PADDING[rows], assert_close)
    for rebuilt, expected in zip(layer.reconstruct(), everything(3), strict=True):
        for row, source in enumerate(rows.tolist()):
            first = PADDING[source]
            assert torch.equal(rebuilt[row, :, first : first + SINKS], expected[source, :, first : first + SINKS])


@pytest.mark.parametrize("kept", [102, 99, 95, 80, 79, 75, 74, 73, 60, 10, 3])
def test_crop_at_every_depth(kept: int, assert_close: Callable[..., None], allocated_bytes: Callable[..., int]) -> None:
    layer = padded(extra=3)
    layer.crop(kept)
    assert layer.num_tokens == kept
    assert layer.stats().stored_bytes == allocated_bytes(layer)
    for rebuilt, expected in zip(layer.reconstruct(), everything(3), strict=True):
        for row, first in enumerate(PADDING.tolist()):
            if first < kept:
                assert_close(rebuilt[row, :, first:], expected[row, :, first:kept], NEAR)
    check_attention(layer, PADDING, assert_close)


@pytest.mark.parametrize("removed", [1, 2, 3, 4, 5])
def test_crop_of_tokens_that_are_sinks_of_a_short_row(removed: int, assert_close: Callable[..., None]) -> None:
    # A short prompt beside a long one: its sinks lie in the residual.
    padding = torch.tensor([0, TOKENS - 5])
    layer = padded(CONFIG, padding)
    layer.crop(TOKENS - removed)
    assert layer.num_tokens == TOKENS - removed
    for rebuilt, expected in zip(layer.reconstruct(), pair(batch=2), strict=True):
        assert_close(rebuilt[0], expected[0, :, :-removed], NEAR)
        assert torch.equal(rebuilt[1, :, TOKENS - 5 :], expected[1, :, TOKENS - 5 : -removed])
    check_attention(layer, padding, assert_close)


def test_no_sinks_at_all(assert_close: Callable[..., None]) -> None:
    config = SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, num_sink_tokens=0, residual_length=RESIDUAL)
    layer = padded(config, extra=20)
    assert layer.stats().sink_bytes == 0
    mask = causal(PADDING, 3, layer.num_tokens)
    assert layer.arrange_mask(mask) is mask
    check_attention(layer, PADDING, assert_close)


def test_padding_counts_at_the_first_sealing_only(assert_close: Callable[..., None]) -> None:
    layer = SpectralLayer(CONFIG)
    layer.append(*(tensor[..., :20, :] for tensor in pair()))
    layer.seal(torch.tensor([0, 3, 5, 7]))
    assert not layer.is_sealed
    layer.append(*(tensor[..., 20:, :] for tensor in pair()))
    layer.seal(PADDING)
    for row, first in enumerate(PADDING.tolist()):
        assert torch.equal(layer.reconstruct()[0][row, :, first : first + 4], pair()[0][row, :, first : first + 4])
    layer.append(*pair(20, 1))
    layer.seal(torch.tensor([9, 9, 9, 9]))
    check_attention(layer, PADDING, assert_close)


def test_bytes_of_sinks_and_positions_are_counted(allocated_bytes: Callable[..., int]) -> None:
    layer = padded(extra=7)
    stats = layer.stats()
    assert stats.sink_bytes == len(PADDING) * SINKS * (2 * HEADS * HEAD_DIM * 4 + 8)
    assert stats.stored_bytes == allocated_bytes(layer)
    assert stats.sealed_tokens == 96
    assert isinstance(layer.blocks[1], RankBlock)


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_match_a_dense_cache(seed: int, assert_close: Callable[..., None]) -> None:
    rng = random.Random(seed)
    layer = SpectralLayer(SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, rng.choice([0, 1, SINKS]), rng.choice([0, 5, 30])))
    padding = torch.tensor([0, *(rng.randint(0, 59) for _ in range(2))])
    keys, values = pair(60, 1000 + seed, 3)
    layer.append(keys, values)
    for step in range(15):
        kind = rng.choice(["append", "append", "seal", "seal", "crop", "batch"])
        if kind == "append":
            new = pair(rng.choice([1, 1, 20, 50]), 100 * seed + step, len(padding))
            layer.append(*new)
            keys, values = torch.cat([keys, new[0]], -2), torch.cat([values, new[1]], -2)
        elif kind == "seal":
            if layer.awaits_rows:
                layer.note_padding(padding)
            layer.seal()
        elif kind == "crop":
            num_kept = rng.randint(max(1, keys.shape[-2] - rng.choice([2, 30, 100])), keys.shape[-2])
            layer.crop(num_kept)
            keys, values, padding = keys[..., :num_kept, :], values[..., :num_kept, :], padding.clamp(max=num_kept)
        else:
            rows = torch.tensor([rng.randrange(len(padding)) for _ in range(3)])
            layer.map_batch(lambda tensor, rows=rows: tensor[rows])
            keys, values, padding = keys[rows], values[rows], padding[rows]
        assert layer.num_tokens == keys.shape[-2]
        for rebuilt, expected in zip(layer.reconstruct(), (keys, values), strict=True):
            for row, first in enumerate(padding.tolist()):
                assert ((rebuilt[row, :, first:] - expected[row, :, first:]).abs() < 0.15).all()
        if layer.num_tokens >= 3:
            check_attention(layer, padding, assert_close)


def test_padding_noted_before_counts_at_the_first_sealing(
    assert_close: Callable[..., None], allocated_bytes: Callable[..., int]
) -> None:
    layer, expected = SpectralLayer(LOSSY), padded(LOSSY)
    layer.append(*pair())
    layer.note_padding(PADDING)
    layer.seal()
    assert all(torch.equal(a, b) for a, b in zip(layer.reconstruct(), expected.reconstruct(), strict=True))
    check_attention(layer, PADDING, assert_close)
    assert layer.stats() == dataclasses.replace(expected.stats(), seal_seconds=layer.stats().seal_seconds)
    assert layer.stats().stored_bytes == allocated_bytes(layer)


def test_noted_padding_follows_its_rows() -> None:
    layer = SpectralLayer(LOSSY)
    layer.append(*pair())
    layer.note_padding(PADDING)
    rows = torch.tensor([3, 0])
    layer.map_batch(lambda tensor: tensor[rows])
    layer.seal()
    for rebuilt, expected in zip(layer.reconstruct(), pair(), strict=True):
        for row, source in enumerate(rows.tolist()):
            first = PADDING[source]
            assert torch.equal(rebuilt[row, :, first : first + SINKS], expected[source, :, first : first + SINKS])


def test_noted_padding_is_forgotten_with_the_tokens() -> None:
    layer = SpectralLayer(LOSSY)
    layer.append(*pair())
    layer.note_padding(PADDING)
    layer.reset()
    layer.append(*pair())
    layer.seal()
    assert torch.equal(layer.reconstruct()[0][3, :, :SINKS], pair()[0][3, :, :SINKS])


def test_deepcopies_of_padded_layers_share_nothing(assert_close: Callable[..., None]) -> None:
    layer = padded()
    twin = copy.deepcopy(layer)
    layer.map_batch(lambda tensor: tensor[:1])
    layer.crop(3)
    check_attention(twin, PADDING, assert_close)


def test_sinks_without_padding_are_copies() -> None:
    keys, values = pair(20)
    sinks = SinkTokens.of(ExactBlock(keys, values), 4, None)
    assert sinks.positions is None
    assert sinks.num_leading == 4
    assert sinks.nbytes == 2 * keys[..., :4, :].numel() * 4
    keys.zero_()
    assert sinks.block.keys.abs().min() > 0
