"""Blocks that cannot be encoded stay exact and are counted; an interruption leaves the layer as it was."""

import logging
from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import block as block_module
from unsloth_spectral.codec.rank.block import RankBlock

HEAD_DIM, SIZE, SINKS, RESIDUAL, TOKENS = 8, 16, 4, 5, 110
CONFIG = SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, SINKS, RESIDUAL)
NUM_BLOCKS = (TOKENS - SINKS - RESIDUAL) // SIZE


def pair(num_tokens: int = TOKENS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def spoilt(values: dict[int, float], in_values: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with one entry replaced in each of the given blocks."""
    keys, others = pair()
    for index, value in values.items():
        (others if in_values else keys)[1, 2, SINKS + index * SIZE + 3, 4] = value
    return keys, others


def sealed(keys: torch.Tensor, values: torch.Tensor) -> SpectralLayer:
    layer = SpectralLayer(CONFIG)
    layer.append(keys, values)
    layer.seal()
    return layer


def kinds(layer: SpectralLayer) -> list[tuple[type, int]]:
    """Kind and length of the cold blocks."""
    return [(type(block), block.num_tokens) for block in layer.blocks[1:-1]]


def check_kept(layer: SpectralLayer, tokens: tuple[torch.Tensor, ...], exact: set[int]) -> None:
    """The blocks of ``exact`` equal the input bit for bit, the others are close to it, none is missing."""
    assert layer.num_tokens == TOKENS
    for rebuilt, expected in zip(layer.reconstruct(), tokens, strict=True):
        for index in range(NUM_BLOCKS):
            part = slice(SINKS + index * SIZE, SINKS + (index + 1) * SIZE)
            if index in exact:
                assert torch.equal(rebuilt[..., part, :].nan_to_num(7.5), expected[..., part, :].nan_to_num(7.5))
            else:
                assert (rebuilt[..., part, :] - expected[..., part, :]).abs().max() < 0.1
        assert torch.equal(rebuilt[..., :SINKS, :], expected[..., :SINKS, :])
        assert torch.equal(rebuilt[..., SINKS + NUM_BLOCKS * SIZE :, :], expected[..., SINKS + NUM_BLOCKS * SIZE :, :])
    stats = layer.stats()
    assert stats.exact_blocks == len(exact)
    assert stats.sealed_tokens == (NUM_BLOCKS - len(exact)) * SIZE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("in_values", [False, True])
@pytest.mark.parametrize("where", [{0}, {2}, {NUM_BLOCKS - 1}, {1, 2, 4}, {0, 5}, set(range(NUM_BLOCKS))])
def test_only_the_block_with_a_number_that_is_not_finite_stays_exact(
    bad: float, in_values: bool, where: set[int], allocated_bytes: Callable[..., int]
) -> None:
    tokens = spoilt(dict.fromkeys(where, bad), in_values)
    layer = sealed(*tokens)
    check_kept(layer, tokens, exact=where)
    assert layer.stats().stored_bytes == allocated_bytes(layer)


def test_sealing_goes_on_behind_an_exact_block() -> None:
    layer = sealed(*spoilt({NUM_BLOCKS - 1: float("nan")}))
    assert kinds(layer) == [(RankBlock, (NUM_BLOCKS - 1) * SIZE), (ExactBlock, SIZE)]
    layer.append(*pair(2 * SIZE, 1))
    layer.seal()
    assert kinds(layer) == [(RankBlock, (NUM_BLOCKS - 1) * SIZE), (ExactBlock, SIZE), (RankBlock, 2 * SIZE)]
    assert layer.stats().exact_blocks == 1


def test_bad_numbers_in_sinks_or_residual_keep_no_block_exact() -> None:
    keys, values = pair()
    keys[..., 1, :] = float("nan")
    values[..., -1, :] = float("inf")
    layer = sealed(keys, values)
    assert layer.stats().exact_blocks == 0
    assert layer.stats().sealed_tokens == NUM_BLOCKS * SIZE
    assert layer.reconstruct()[0][..., 1, :].isnan().all()


def test_finite_numbers_whose_squares_overflow_stay_exact(caplog: pytest.LogCaptureFixture) -> None:
    tokens = spoilt({2: 1e30})
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        layer = sealed(*tokens)
    assert layer.num_tokens == TOKENS
    assert layer.stats().exact_blocks >= 1
    assert "overflow" in caplog.text
    part = slice(SINKS + 2 * SIZE, SINKS + 3 * SIZE)
    assert torch.equal(layer.reconstruct()[0][..., part, :], tokens[0][..., part, :])


def test_an_overflow_in_one_block_does_not_keep_the_others_exact() -> None:
    tokens = spoilt({2: 1e30})
    check_kept(sealed(*tokens), tokens, exact={2})


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), MemoryError("no room"), torch.linalg.LinAlgError("did not converge")]
)
def test_a_failing_factorization_keeps_tokens_exact_counted_and_logged(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(block: torch.Tensor, rank: int) -> None:
        raise error

    tokens = pair()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "unsloth_spectral"):
        patch.setattr(block_module.factors, "encode", fail)
        layer = sealed(*tokens)
    check_kept(layer, tokens, exact=set(range(NUM_BLOCKS)))
    assert str(error) in caplog.text
    assert all(torch.equal(rebuilt, expected) for rebuilt, expected in zip(layer.reconstruct(), tokens, strict=True))
    layer.append(*pair(SIZE, 1))
    layer.seal()
    assert layer.stats().sealed_tokens == SIZE
    assert layer.stats().exact_blocks == NUM_BLOCKS


def test_a_factorization_that_fails_for_one_block_does_not_keep_the_others_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = block_module.factors.encode

    def fail_on_mark(block: torch.Tensor, rank: int):
        if (block == 123.0).any():
            raise torch.linalg.LinAlgError("did not converge")
        return encode(block, rank)

    monkeypatch.setattr(block_module.factors, "encode", fail_on_mark)
    tokens = spoilt({1: 123.0})
    check_kept(sealed(*tokens), tokens, exact={1})


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("first_time", [True, False])
def test_an_interrupted_seal_leaves_the_layer_as_it_was(
    interruption: type[BaseException], call: int, first_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SpectralLayer(CONFIG)
    layer.append(*pair())
    if not first_time:
        layer.seal()
        layer.append(*pair(3 * SIZE, 1))
    before, stats = layer.reconstruct(), layer.stats()
    blocks = [(type(block), block.num_tokens) for block in layer.blocks]
    encode, calls = block_module.factors.encode, []

    def interrupt(block: torch.Tensor, rank: int):
        calls.append(rank)
        if len(calls) == call:
            raise interruption
        return encode(block, rank)

    with monkeypatch.context() as patch:
        patch.setattr(block_module.factors, "encode", interrupt)
        with pytest.raises(interruption):
            layer.seal()
    assert len(calls) == call
    assert layer.stats() == stats
    assert [(type(block), block.num_tokens) for block in layer.blocks] == blocks
    assert all(torch.equal(rebuilt, expected) for rebuilt, expected in zip(layer.reconstruct(), before, strict=True))
    layer.seal()
    assert layer.stats().sealed_tokens > stats.sealed_tokens
    assert layer.num_tokens == stats.num_tokens


def test_an_interruption_between_two_runs_of_blocks_keeps_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SpectralLayer(CONFIG)
    layer.append(*pair())
    layer.seal()
    more = pair(5 * SIZE, 1)
    more[0][0, 0, 2 * SIZE, 0] = float("nan")  # splits the new blocks into two runs that are encoded apart
    layer.append(*more)
    stats, encode, calls = layer.stats(), block_module.factors.encode, []

    def interrupt(block: torch.Tensor, rank: int):
        calls.append(rank)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(block, rank)

    monkeypatch.setattr(block_module.factors, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer.seal()
    assert layer.stats() == stats
    layer.seal()
    assert layer.num_tokens == TOKENS + 5 * SIZE
    assert layer.stats().sealed_tokens == (NUM_BLOCKS + 4) * SIZE


def test_a_failing_map_leaves_the_layer_as_it_was() -> None:
    layer = sealed(*pair())
    before, calls = layer.reconstruct(), []

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 9:
            raise IndexError("no such row")
        return tensor[:1]

    with pytest.raises(IndexError):
        layer.map_batch(fail)
    assert all(torch.equal(rebuilt, expected) for rebuilt, expected in zip(layer.reconstruct(), before, strict=True))


def test_cropping_inside_an_exact_block_keeps_it_exact() -> None:
    tokens = spoilt({1: float("nan")})
    layer = sealed(*tokens)
    layer.crop(SINKS + SIZE + 5)
    assert [*kinds(layer), (type(layer.blocks[-1]), layer.blocks[-1].num_tokens)] == [
        (RankBlock, SIZE),
        (ExactBlock, 5),
    ]
    part = slice(SINKS + SIZE, SINKS + SIZE + 5)
    rebuilt = layer.reconstruct()[0][..., part, :]
    assert torch.equal(rebuilt.nan_to_num(7.5), tokens[0][..., part, :].nan_to_num(7.5))
