"""The exact tail grows in place, returns exactly the tokens appended to it, and frees memory."""

import copy

import pytest
import torch

from unsloth_spectral.cache.residual import _SPARE_TOKENS, ResidualBuffer


def pair(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, num_tokens, 8, generator=generator).to(dtype)
    return keys, torch.randn(2, 3, num_tokens, 8, generator=generator).to(dtype)


def test_appending_is_concatenation() -> None:
    parts = [pair(n, seed) for seed, n in enumerate([5, 1, 1, 40, 0, 33, 1])]
    buffer = ResidualBuffer(*parts[0])
    for part in parts[1:]:
        buffer.append(*part)
    for actual, expected in zip((buffer.block.keys, buffer.block.values), zip(*parts, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(expected, -2))
    assert buffer.num_tokens == 81


def test_decoding_writes_in_place_most_of_the_time() -> None:
    buffer = ResidualBuffer(*pair(5))
    places = set()
    for step in range(2 * _SPARE_TOKENS):
        buffer.append(*pair(1, step))
        places.add(buffer.block.keys.untyped_storage().data_ptr())
    assert len(places) <= 4


def test_the_first_tokens_of_the_caller_are_never_written_to() -> None:
    keys, values = pair(5)
    storage = torch.zeros(2, 3, 50, 8)
    storage[..., :5, :] = keys
    buffer = ResidualBuffer(storage[..., :5, :], values)
    before = storage.clone()
    buffer.append(*pair(3, 1))
    buffer.append(*pair(3, 2))
    assert torch.equal(storage, before)
    assert torch.equal(buffer.block.keys[..., :5, :], keys)


def test_spare_room_is_counted_and_bounded() -> None:
    buffer = ResidualBuffer(*pair(5))
    per_token = 2 * 2 * 3 * 8 * 4
    assert buffer.nbytes == 5 * per_token
    buffer.append(*pair(1))
    assert buffer.nbytes == (6 + _SPARE_TOKENS) * per_token
    for step in range(200):
        buffer.append(*pair(1, step))
        assert buffer.num_tokens * per_token <= buffer.nbytes <= (buffer.num_tokens + _SPARE_TOKENS) * per_token


def test_copy_gives_bytes_back_and_shares_nothing() -> None:
    buffer = ResidualBuffer(*pair(100))
    copied = buffer.copy(90, 100)
    assert copied.num_tokens == 10
    assert copied.nbytes == 10 * buffer.nbytes // 100
    assert torch.equal(copied.block.keys, buffer.block.keys[..., 90:, :])
    copied.block.keys.zero_()
    assert buffer.block.keys[..., 90:, :].abs().min() > 0
    empty = buffer.copy(100, 100)
    assert (empty.num_tokens, empty.nbytes) == (0, 0)
    empty.append(*pair(2, 1))
    assert torch.equal(empty.block.values, pair(2, 1)[1])


def test_slices_are_views() -> None:
    buffer = ResidualBuffer(*pair(10))
    part = buffer.slice(3, 7)
    assert part.num_tokens == 4
    assert part.keys.untyped_storage().data_ptr() == buffer.block.keys.untyped_storage().data_ptr()


def test_map_batch_leaves_the_original_alone() -> None:
    buffer = ResidualBuffer(*pair(10))
    buffer.append(*pair(1, 1))
    swapped = buffer.map_batch(lambda tensor: tensor[[1, 0, 1]])
    assert torch.equal(swapped.block.keys, buffer.block.keys[[1, 0, 1]])
    swapped.append(*(tensor[[0, 1, 0]] for tensor in pair(2, 2)))
    assert (swapped.num_tokens, buffer.num_tokens) == (13, 11)
    assert torch.isfinite(swapped.block.keys).all()


def test_a_mapping_that_copies_nothing_does_not_tie_two_buffers() -> None:
    buffer = ResidualBuffer(*pair(10))
    buffer.append(*pair(1, 1))
    same = buffer.map_batch(lambda tensor: tensor)
    same.append(*pair(1, 2))
    buffer.append(*pair(1, 3))
    assert torch.equal(same.block.keys[..., -1:, :], pair(1, 2)[0])
    assert torch.equal(buffer.block.keys[..., -1:, :], pair(1, 3)[0])


def test_deepcopies_are_independent() -> None:
    buffer = ResidualBuffer(*pair(10))
    buffer.append(*pair(1, 1))
    twin = copy.deepcopy(buffer)
    twin.append(*pair(1, 2))
    buffer.append(*pair(1, 3))
    assert torch.equal(twin.block.keys[..., -1:, :], pair(1, 2)[0])
    assert torch.equal(buffer.block.keys[..., -1:, :], pair(1, 3)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    buffer = ResidualBuffer(*pair(3, dtype=dtype))
    buffer.append(*pair(2, 1, dtype=dtype))
    assert buffer.block.keys.dtype == buffer.block.values.dtype == dtype


def test_tokens_made_under_inference_mode_can_be_added_to_outside_it() -> None:
    with torch.inference_mode():
        buffer = ResidualBuffer(*pair(3))
        buffer.append(*pair(1, 1))
    buffer.append(*pair(1, 2))
    with torch.inference_mode():
        buffer.append(*pair(1, 3))
    buffer.append(*pair(40, 4))
    expected = torch.cat([pair(3)[0], *(pair(n, seed)[0] for n, seed in ((1, 1), (1, 2), (1, 3), (40, 4)))], -2)
    assert torch.equal(buffer.block.keys, expected)


def test_widths_of_keys_and_values_may_differ() -> None:
    keys, values = pair(4)
    buffer = ResidualBuffer(keys, values[..., :5])
    buffer.append(keys, values[..., :5])
    assert buffer.block.values.shape == (2, 3, 8, 5)
