"""Streams of codes against a plain version that writes one bit after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.spectral.packing import MAX_NBITS, last_bytes, pack, unpack


def random_codes(widths: list[int], batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 1 << nbits, (batch, 1, tokens), generator=generator, dtype=torch.uint8) for nbits in widths
    ]
    return torch.cat(parts, 1) if parts else torch.empty(batch, 0, tokens, dtype=torch.uint8)


def random_carries(widths: list[int], batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, 256, (batch, len(widths)), generator=generator, dtype=torch.uint8)


def stream_bits(codes: list[int], nbits: int, tokens: int) -> list[int]:
    """All bits of a component, lowest first, filled up to whole tiles."""
    bits = [code >> bit & 1 for code in codes for bit in range(nbits)]
    return bits + [0] * (-tokens % 128 * nbits)


def naive_pack(codes: torch.Tensor, widths: list[int]) -> list[list[list[int]]]:
    """``[batch, tile, byte]``."""
    batch, _, tokens = codes.shape
    tiles = -(-tokens // 128)
    rows = []
    for b in range(batch):
        streams = [stream_bits(codes[b, c].tolist(), nbits, tokens) for c, nbits in enumerate(widths)]
        row = []
        for tile in range(tiles):
            bits = [
                bit
                for stream, nbits in zip(streams, widths, strict=True)
                for bit in stream[tile * 128 * nbits : (tile + 1) * 128 * nbits]
            ]
            row.append([sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)])
        rows.append(row)
    return rows


def naive_windows(codes: torch.Tensor, carries: torch.Tensor, widths: list[int]) -> list[list[list[int]]]:
    """``[batch, component, token]``: the last 8 bits up to each token's own."""
    batch, _, tokens = codes.shape
    result = []
    for b in range(batch):
        row = []
        for c, nbits in enumerate(widths):
            bits = [int(carries[b, c]) >> bit & 1 for bit in range(8)]
            bits += stream_bits(codes[b, c].tolist(), nbits, tokens)
            ends = [8 + (t + 1) * nbits for t in range(tokens)]
            row.append([sum(bit << i for i, bit in enumerate(bits[end - 8 : end])) for end in ends])
        result.append(row)
    return result


def check(widths: list[int], batch: int, tokens: int, seed: int = 0) -> None:
    codes, carries = random_codes(widths, batch, tokens, seed), random_carries(widths, batch, seed)
    streams = pack(codes, widths)
    tiles = -(-tokens // 128)
    assert streams.dtype == torch.uint8
    assert streams.shape == (batch, tiles, sum(widths), 16)
    assert streams.untyped_storage().nbytes() == batch * sum(widths) * tiles * 16
    assert streams.flatten(2).tolist() == naive_pack(codes, widths)
    windows = unpack(streams, carries, widths)
    assert windows.shape == (batch, len(widths), tiles * 128)
    assert windows[..., :tokens].tolist() == naive_windows(codes, carries, widths)


@pytest.mark.parametrize("nbits", range(1, MAX_NBITS + 1))
@pytest.mark.parametrize("tokens", [1, 7, 128, 130])
def test_one_width(nbits: int, tokens: int) -> None:
    check([nbits], 1, tokens)


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, MAX_NBITS), max_size=9),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_any_widths(widths: list[int], batch: int, tokens: int, seed: int) -> None:
    check(widths, batch, tokens, seed)


def test_no_component_takes_no_bytes() -> None:
    streams = pack(torch.empty(2, 0, 130, dtype=torch.uint8), [])
    assert streams.shape == (2, 2, 0, 16)
    assert unpack(streams, torch.empty(2, 0, dtype=torch.uint8), []).shape == (2, 0, 256)


def test_tiles_read_from_the_byte_before_them() -> None:
    """Any tiles by themselves, with their carries, have the windows that they have in the whole."""
    widths = [1, 2, 3, 4, 5, 8]
    codes, carries = random_codes(widths, 2, 700), random_carries(widths, 2)
    streams = pack(codes, widths)
    windows = unpack(streams, carries, widths)
    for first in range(6):
        for last in range(first + 1, 7):
            before = last_bytes(streams, carries, widths, 128 * first)
            part = unpack(streams[:, first:last], before, widths)
            assert torch.equal(part, windows[..., first * 128 : last * 128])
