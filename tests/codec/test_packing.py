"""Bit planes against a plain version that writes one bit after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.packing import MAX_NBITS, pack, unpack


def random_codes(counts: list[int], batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Codes of the widths that ``counts`` say, in the order of ``pack``: by falling width."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 1 << nbits, (batch, counts[nbits], tokens), generator=generator, dtype=torch.uint8)
        for nbits in range(MAX_NBITS, 0, -1)
    ]
    return torch.cat(parts, 1)


def naive_pack(codes: torch.Tensor, counts: list[int]) -> list[list[list[int]]]:
    rows = []
    for row in codes.tolist():
        planes, start = [], 0
        for nbits in range(MAX_NBITS, 0, -1):
            for component in row[start : start + counts[nbits]]:
                for bit in range(nbits):
                    bits = [code >> bit & 1 for code in component]
                    planes.append(
                        [sum(b << i for i, b in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
                    )
            start += counts[nbits]
        rows.append(planes)
    return rows


def check(counts: list[int], batch: int, tokens: int, seed: int = 0) -> None:
    codes = random_codes(counts, batch, tokens, seed)
    planes = pack(codes, counts)
    bits = sum(nbits * count for nbits, count in enumerate(counts))
    assert planes.dtype == torch.uint8
    assert planes.shape == (batch, bits, tokens // 8)
    assert planes.untyped_storage().nbytes() == batch * bits * tokens // 8
    assert planes.tolist() == naive_pack(codes, counts)
    assert torch.equal(unpack(planes, counts), codes)


@pytest.mark.parametrize("nbits", range(1, MAX_NBITS + 1))
@pytest.mark.parametrize(("components", "batch", "tokens"), [(1, 1, 8), (3, 2, 136), (60, 1, 24)])
def test_one_width(nbits: int, components: int, batch: int, tokens: int) -> None:
    check([components if width == nbits else 0 for width in range(MAX_NBITS + 1)], batch, tokens)


def test_all_widths_at_once() -> None:
    check([0, 1, 2, 3, 4, 5, 6, 7, 8], 2, 40)
    check([9, 8, 7, 6, 5, 4, 3, 2, 1], 1, 128)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 4), min_size=MAX_NBITS + 1, max_size=MAX_NBITS + 1),
    batch=st.integers(1, 3),
    octets=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_random_counts(counts: list[int], batch: int, octets: int, seed: int) -> None:
    check(counts, batch, 8 * octets, seed)


def test_no_components_at_all() -> None:
    counts = [7] + [0] * MAX_NBITS
    planes = pack(torch.empty(2, 0, 128, dtype=torch.uint8), counts)
    assert planes.shape == (2, 0, 16)
    assert unpack(planes, counts).shape == (2, 0, 128)
    assert unpack(planes, counts).dtype == torch.uint8


def test_extreme_codes() -> None:
    for nbits in range(1, MAX_NBITS + 1):
        counts = [int(width == nbits) * 2 for width in range(MAX_NBITS + 1)]
        codes = torch.zeros(1, 2, 16, dtype=torch.uint8)
        codes[:, 1] = (1 << nbits) - 1
        planes = pack(codes, counts)
        assert not planes[:, :nbits].any()
        assert (planes[:, nbits:] == 255).all()
        assert torch.equal(unpack(planes, counts), codes)


def test_parts_of_the_tokens_and_of_the_rows_unpack_alone() -> None:
    counts = [0, 2, 0, 3, 1, 0, 0, 0, 1]
    codes = random_codes(counts, 3, 64)
    planes = pack(codes, counts)
    assert torch.equal(unpack(planes[..., 2:5], counts), codes[..., 16:40])
    assert torch.equal(unpack(planes[[2, 0]], counts), codes[[2, 0]])
    joined = torch.cat([pack(codes[..., :24], counts), pack(codes[..., 24:], counts)], -1)
    assert torch.equal(joined, planes)
