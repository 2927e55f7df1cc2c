"""Bit planes against a plain version that writes one bit after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.spectral.packing import MAX_NBITS, pack, pack_quads, unpack, unpack_quads


def random_codes(widths: list[int], batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 1 << nbits, (batch, 1, tokens), generator=generator, dtype=torch.uint8) for nbits in widths
    ]
    return torch.cat(parts, 1) if parts else torch.empty(batch, 0, tokens, dtype=torch.uint8)


def naive_pack(codes: torch.Tensor, widths: list[int]) -> list[list[list[list[int]]]]:
    """``[batch, tile, plane, byte]``, one bit after another."""
    rows = []
    for row in codes.tolist():
        tiles = []
        for start in range(0, codes.shape[-1], 128):
            planes = []
            for component, nbits in zip(row, widths, strict=True):
                tile = component[start : start + 128]
                tile += [0] * (128 - len(tile))
                for bit in range(nbits):
                    bits = [code >> bit & 1 for code in tile]
                    planes.append([sum(b << i for i, b in enumerate(bits[at : at + 8])) for at in range(0, 128, 8)])
            tiles.append(planes)
        rows.append(tiles)
    return rows


def check(widths: list[int], batch: int, tokens: int, seed: int = 0) -> None:
    codes = random_codes(widths, batch, tokens, seed)
    planes = pack(codes, widths)
    tiles = -(-tokens // 128)
    assert planes.dtype == torch.uint8
    assert planes.shape == (batch, tiles, sum(widths), 16)
    assert planes.untyped_storage().nbytes() == batch * sum(widths) * tiles * 16
    assert planes.tolist() == naive_pack(codes, widths)
    assert torch.equal(unpack(planes, widths)[..., :tokens], codes)
    assert not unpack(planes, widths)[..., tokens:].any()


def naive_pack_quads(codes: torch.Tensor, heads: list[list[int]]) -> list[list[list[int]]]:
    """``[batch, tile, byte]``, one bit after another."""
    rows = []
    for row in codes.tolist():
        tiles = []
        for start in range(0, codes.shape[-1], 128):
            tile = [[*component[start : start + 128], *[0] * 128][:128] for component in row]
            bits, first = [], 0
            for head_widths in heads:
                for at in range(0, len(head_widths), 4):
                    widths = head_widths[at : at + 4]
                    members = tile[first + at : first + at + len(widths)]
                    shared = widths[-1] if len(widths) == 4 else 0
                    places = [(t, member) for t in range(128) for member in members]
                    for run in range(0, 512, 64):
                        bits += [m[t] >> bit & 1 for bit in range(shared) for t, m in places[run : run + 64]]
                    for nbits, member in zip(widths, members, strict=True):
                        bits += [code >> bit & 1 for bit in range(shared, nbits) for code in member]
                first += len(head_widths)
            tiles.append([sum(b << i for i, b in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)])
        rows.append(tiles)
    return rows


def check_quads(heads: list[list[int]], batch: int, tokens: int, seed: int = 0) -> None:
    widths = [nbits for head_widths in heads for nbits in head_widths]
    codes = random_codes(widths, batch, tokens, seed)
    planes = pack_quads(codes, heads)
    assert planes.dtype == torch.uint8
    assert planes.shape == (batch, -(-tokens // 128), sum(widths), 16)
    assert planes.flatten(2).tolist() == naive_pack_quads(codes, heads)
    assert torch.equal(unpack_quads(planes, heads)[..., :tokens], codes)
    assert not unpack_quads(planes, heads)[..., tokens:].any()


def test_quads_of_several_widths_and_parts_of_quads() -> None:
    check_quads([[8, 6, 6, 5, 4, 4, 4, 4, 3, 2, 2, 2, 1], [], [3, 3, 3, 3], [7, 1, 1]], 2, 300)


@pytest.mark.parametrize("nbits", range(1, MAX_NBITS + 1))
@pytest.mark.parametrize(("components", "batch", "tokens"), [(4, 1, 8), (9, 2, 136), (60, 1, 24), (4, 1, 1)])
def test_quads_of_one_width(nbits: int, components: int, batch: int, tokens: int) -> None:
    check_quads([[nbits] * components] * 2, batch, tokens)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    heads=st.lists(st.lists(st.integers(1, MAX_NBITS), max_size=16).map(lambda w: sorted(w, reverse=True)), max_size=4),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_random_quads(heads: list[list[int]], batch: int, tokens: int, seed: int) -> None:
    check_quads(heads, batch, tokens, seed)


@pytest.mark.parametrize("nbits", range(1, MAX_NBITS + 1))
@pytest.mark.parametrize(("components", "batch", "tokens"), [(1, 1, 8), (3, 2, 136), (60, 1, 24), (2, 1, 1)])
def test_one_width(nbits: int, components: int, batch: int, tokens: int) -> None:
    check([nbits] * components, batch, tokens)


def test_all_widths_at_once() -> None:
    check([8, 7, 6, 5, 4, 3, 2, 1], 2, 40)
    check([8, 8, 7, 3, 1, 1, 5, 4, 4, 2, 6, 6, 1], 1, 128)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    widths=st.lists(st.integers(1, MAX_NBITS), min_size=0, max_size=24),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_random_widths(widths: list[int], batch: int, tokens: int, seed: int) -> None:
    check(widths, batch, tokens, seed)


def test_no_component_at_all() -> None:
    planes = pack(torch.empty(2, 0, 128, dtype=torch.uint8), [])
    assert planes.shape == (2, 1, 0, 16)
    assert unpack(planes, []).shape == (2, 0, 128)
    assert unpack(planes, []).dtype == torch.uint8


def test_largest_codes_of_each_width_fill_their_planes() -> None:
    for nbits in range(1, MAX_NBITS + 1):
        codes = torch.zeros(1, 2, 128, dtype=torch.uint8)
        codes[:, 1] = (1 << nbits) - 1
        planes = pack(codes, [nbits] * 2)
        assert not planes[:, :, :nbits].any()
        assert (planes[:, :, nbits:] == 255).all()
        assert torch.equal(unpack(planes, [nbits] * 2), codes)


def test_slices_and_joins_of_tiles_are_those_of_the_codes() -> None:
    widths = [8, 4, 3, 3, 3, 1, 1]
    codes = random_codes(widths, 3, 512)
    planes = pack(codes, widths)
    assert torch.equal(unpack(planes[:, 1:3], widths), codes[..., 128:384])
    assert torch.equal(unpack(planes[[2, 0]], widths), codes[[2, 0]])
    joined = torch.cat([pack(codes[..., :256], widths), pack(codes[..., 256:], widths)], 1)
    assert torch.equal(joined, planes)
