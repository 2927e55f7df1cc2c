"""Blocks, exact and spectral: every way of reading them agrees with their reconstruction."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import block as module
from unsloth_spectral.codec.rank.block import RankBlock, seal
from unsloth_spectral.codec.rank.factors import RankFactors
from unsloth_spectral.errors import InvalidArgumentError

BATCH, HEADS, SIZE, NUM_BLOCKS, HEAD_DIM = 2, 3, 20, 4, 12
TOKENS = SIZE * NUM_BLOCKS
CONFIG = SpectralConfig(rank_keys=3, rank_values=5, block_size=SIZE)


def tokens(seed: int = 0, num_tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, num_tokens, HEAD_DIM)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


def sealed(seed: int = 0) -> RankBlock:
    return seal(*tokens(seed), CONFIG)


def exact() -> ExactBlock:
    return ExactBlock(*tokens())


def dense(blocks: list[Block]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [block.reconstruct() for block in blocks]
    return torch.cat([pair[0] for pair in pairs], -2), torch.cat([pair[1] for pair in pairs], -2)


def tensors(block: Block) -> list[torch.Tensor]:
    if isinstance(block, ExactBlock):
        return [block.keys, block.values]
    return [tensor for side in (block.keys, block.values) for tensor in side.tensors.values()]


both = pytest.mark.parametrize("make", [exact, sealed])


@both
def test_scores_and_combine_agree_with_the_reconstruction(
    make: Callable[[], Block], assert_close: Callable[..., None]
) -> None:
    block, generator = make(), torch.Generator().manual_seed(1)
    keys, values = block.reconstruct()
    query = torch.randn(BATCH, HEADS, 7, HEAD_DIM, generator=generator)
    weights = torch.rand(BATCH, HEADS, 7, TOKENS, generator=generator)
    assert_close(block.scores(query), query @ keys.mT, 1e-4)
    assert_close(block.combine(weights), weights @ values, 1e-4)
    assert keys.dtype == values.dtype == torch.float32


@both
def test_one_token_weighted_alone_is_that_token(make: Callable[[], Block], assert_close: Callable[..., None]) -> None:
    block = make()
    values = block.reconstruct()[1]
    weights = torch.eye(TOKENS).expand(BATCH, HEADS, TOKENS, TOKENS)
    assert_close(block.combine(weights), values, 1e-4)


@both
@pytest.mark.parametrize("length", [1, 13, SIZE, SIZE + 1, 2 * SIZE, 3 * SIZE, 1000])
def test_tiles_hold_all_tokens_in_order(
    make: Callable[[], Block], length: int, assert_close: Callable[..., None]
) -> None:
    block = make()
    tiles = list(block.tiles(length))
    for actual, expected in zip(dense(tiles), block.reconstruct(), strict=True):
        assert_close(actual, expected, 1e-6)
    assert all(tile.num_tokens <= max(length, SIZE) for tile in tiles)
    if length < TOKENS:
        assert len(tiles) > 1
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(block)}
    assert all(tensor.untyped_storage().data_ptr() in storages for tile in tiles for tensor in tensors(tile))


@both
def test_first_tokens_at_every_cut(make: Callable[[], Block], assert_close: Callable[..., None]) -> None:
    block = make()
    keys, values = block.reconstruct()
    for count in range(1, TOKENS + 1):
        pieces = block.first_tokens(count)
        assert sum(piece.num_tokens for piece in pieces) == count
        kept_keys, kept_values = dense(pieces)
        assert_close(kept_keys, keys[..., :count, :], 1e-6)
        assert_close(kept_values, values[..., :count, :], 1e-6)
        assert all(piece.num_key_value_heads == HEADS for piece in pieces)


@both
@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, TOKENS - 1, TOKENS])
def test_first_tokens_pin_no_larger_storage(make: Callable[[], Block], count: int) -> None:
    block = make()
    for piece in block.first_tokens(count):
        used = sum(tensor.numel() * tensor.element_size() for tensor in tensors(piece))
        assert piece.nbytes == used
    mine = {tensor.untyped_storage().data_ptr() for tensor in tensors(block)}
    theirs = {t.untyped_storage().data_ptr() for piece in block.first_tokens(count) for t in tensors(piece)}
    assert not mine & theirs


def test_a_view_is_seen_to_pin_the_storage_of_the_whole() -> None:
    block = sealed()
    tile = next(block.tiles(SIZE))
    assert tile.num_tokens == SIZE
    assert tile.nbytes == block.nbytes
    assert ExactBlock(*(tensor[..., :1, :] for tensor in tokens())).nbytes == exact().nbytes


def test_first_tokens_count_no_fallback_twice() -> None:
    block = sealed()
    keys = RankFactors(**block.keys.tensors, num_fallbacks=2)
    marked = RankBlock(keys, block.values, block.dtype)
    assert marked.num_fallbacks == 2
    pieces = marked.first_tokens(SIZE + 1)
    assert sum(piece.num_fallbacks for piece in pieces if isinstance(piece, RankBlock)) <= 2


def test_what_a_sealed_block_says_of_itself() -> None:
    block = sealed()
    assert (block.num_key_value_heads, block.num_blocks, block.block_length, block.num_tokens) == (3, 4, 20, 80)
    assert (block.keys.rank, block.values.rank) == (3, 5)
    assert block.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors(block))
    assert block.nbytes < exact().nbytes
    assert block.is_finite
    assert block.keys.relative_error.shape == (BATCH, HEADS, NUM_BLOCKS)


def test_sealing_many_blocks_at_once_equals_sealing_them_one_by_one(assert_close: Callable[..., None]) -> None:
    keys, values = tokens()
    one_by_one = [
        seal(keys[..., start : start + SIZE, :], values[..., start : start + SIZE, :], CONFIG)
        for start in range(0, TOKENS, SIZE)
    ]
    for actual, expected in zip(dense(list(one_by_one)), sealed().reconstruct(), strict=True):
        assert_close(actual, expected, 0.02)


def test_stack_copies_codes_and_encodes_nothing(
    monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    first, second = sealed(0), sealed(1)
    monkeypatch.setattr(module.factors, "encode", None)
    stacked = first.stack(second)
    assert stacked.num_blocks == 2 * NUM_BLOCKS
    for actual, expected in zip(dense([first, second]), stacked.reconstruct(), strict=True):
        assert_close(actual, expected, 1e-6)
    assert torch.equal(stacked.keys.codes[:, :, :NUM_BLOCKS], first.keys.codes)
    assert torch.equal(stacked.values.codes[:, :, NUM_BLOCKS:], second.values.codes)
    assert stacked.nbytes == first.nbytes + second.nbytes


@both
def test_blocks_are_frozen(make: Callable[[], Block]) -> None:
    block = make()
    for field in dataclasses.fields(block):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(block, field.name, None)
    # slots: no attribute can be added either (CPython 3.10 and 3.11 raise TypeError for it).
    with pytest.raises((AttributeError, TypeError)):
        block.extra = 1


def test_reading_changes_nothing() -> None:
    block = sealed()
    before = [tensor.clone() for tensor in tensors(block)]
    block.scores(torch.ones(BATCH, HEADS, 2, HEAD_DIM))
    block.combine(torch.ones(BATCH, HEADS, 2, TOKENS))
    for tile in block.tiles(30):
        tile.reconstruct()[0].add_(1)
    block.first_tokens(33)[0].keys.codes.zero_()
    block.stack(block).keys.codes.zero_()
    for now, then in zip(tensors(block), before, strict=True):
        assert torch.equal(now, then)


@both
def test_map_batch_acts_on_every_tensor(make: Callable[[], Block], assert_close: Callable[..., None]) -> None:
    block = make()
    rows = torch.tensor([1, 0, 1])
    mapped = block.map_batch(lambda tensor: tensor[rows])
    for actual, expected in zip(mapped.reconstruct(), block.reconstruct(), strict=True):
        assert_close(actual, expected[rows], 1e-6)
    assert all(tensor.shape[0] == 3 for tensor in tensors(mapped))
    assert block.reconstruct()[0].shape[0] == BATCH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_reconstruction_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    block = seal(*tokens(dtype=dtype), CONFIG)
    keys, values = block.reconstruct()
    assert keys.dtype == values.dtype == dtype
    assert block.keys.codes.dtype == torch.int8
    for piece in [*block.tiles(30), *block.first_tokens(33), block.stack(block), block.map_batch(torch.clone)]:
        assert piece.reconstruct()[0].dtype == dtype


def test_seal_refuses_a_rank_above_the_head_dim() -> None:
    with pytest.raises(InvalidArgumentError):
        seal(*tokens(), SpectralConfig(rank_keys=HEAD_DIM + 1, rank_values=2, block_size=SIZE))


def test_keys_and_values_may_have_different_widths(assert_close: Callable[..., None]) -> None:
    keys, values = tokens()
    block = seal(keys, values[..., :7], CONFIG)
    assert block.reconstruct()[1].shape == (BATCH, HEADS, TOKENS, 7)
    weights = torch.rand(BATCH, HEADS, 3, TOKENS, generator=torch.Generator().manual_seed(0))
    assert_close(block.combine(weights), weights @ block.reconstruct()[1], 1e-4)
