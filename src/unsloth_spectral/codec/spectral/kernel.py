"""Searching, fitting scales and packing in one pass of the compiled kernel (native/encode.cpp), where there is one.

Tensors on another device are coded on the CPU: the search is thousands of dependent steps.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral import trellis
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, ROW_BYTES, num_tiles
from unsloth_spectral.native import abi, library
from unsloth_spectral.native.pointers import address, require


class Encoded(NamedTuple):
    """Streams, what they go on from, and sums that the scales and the errors follow from.

    Attributes:
        streams: ``[B, tiles, rows, 16]`` uint8, see ``packing``.
        carries: uint8, one for each stream, see ``packing``.
        energies: squared lengths of what is coded, float32: of each group of 128 of a component's coefficients,
            ``[B, C, tiles]``, or of each token's values, ``[B, H, n]``.
        overlaps: its products with the reconstructions, likewise.
        squares: squared lengths of the reconstructions, likewise.
    """

    streams: Tensor
    carries: Tensor
    energies: Tensor
    overlaps: Tensor
    squares: Tensor


def is_available() -> bool:
    """True if there is a kernel on this machine."""
    return library.obstacle() is None


def encode_keys(
    coefficients: Tensor,
    widths: Sequence[int],
    clips: Sequence[float],
    carries: Tensor | None = None,
    variant: str | None = None,
    inverses: Tensor | None = None,
) -> Encoded:
    """Code ``coefficients [B, C, n]`` float32 with ``widths [C]`` bits, going on from ``carries [B, C]`` uint8, which
    are free if not given.

    Coefficients of the first group are multiplied by ``inverses [B, C]`` float32, if given, in place of what suits
    them.

    Raises:
        InvalidArgumentError: the coefficients are not float32, or the widths or carries not theirs.
    """
    batch, count, num_tokens = coefficients.shape
    require(len(widths) == count, "widths", f"one for each of {count} components", len(widths))
    require(all(1 <= nbits <= MAX_NBITS for nbits in widths), "widths", f"1 to {MAX_NBITS} bits each", tuple(widths))
    device, coefficients = coefficients.device, coefficients.cpu().contiguous()
    tiles, num_rows = num_tiles(num_tokens), sum(widths)
    by_tile = (batch, count, tiles)
    streams = torch.empty(batch, tiles, num_rows, ROW_BYTES, dtype=torch.uint8, device="cpu")
    energies, overlaps, squares = torch.empty(3, *by_tile, dtype=torch.float32, device="cpu").unbind()
    is_free = carries is None
    carries = _carries(carries, (batch, count))
    nbits, rows = _rows(tuple(widths))
    inverses = None if inverses is None else inverses.cpu().contiguous()
    ratios = _ratios(tuple(clips))
    call = abi.KeyEncoding(
        coefficients=address("coefficients", coefficients, torch.float32, (batch, count, num_tokens)),
        widths=address("widths", nbits, torch.int32, (count,)),
        rows=address("rows", rows, torch.int32, (count,)),
        streams=address("streams", streams, torch.uint8, (batch, tiles, num_rows, ROW_BYTES)),
        carries=address("carries", carries, torch.uint8, (batch, count)),
        energies=address("energies", energies, torch.float32, by_tile),
        overlaps=address("overlaps", overlaps, torch.float32, by_tile),
        squares=address("squares", squares, torch.float32, by_tile),
        clips=address("clips", ratios, torch.float32, (len(clips),)),
        inverses=None if inverses is None else address("inverses", inverses, torch.float32, (batch, count)),
        batch=batch,
        num_components=count,
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_clips=len(clips),
        num_threads=torch.get_num_threads(),
        is_free=is_free,
        trellis=_trellis().structure,
    )
    library.function("spectral_encode_keys", variant)(ctypes.byref(call))
    return Encoded(*(tensor.to(device) for tensor in (streams, carries, energies, overlaps, squares)))


def encode_values(rotated: Tensor, nbits: int, carries: Tensor | None = None, variant: str | None = None) -> Encoded:
    """Code Hadamard-rotated values ``rotated [B, H, D, n]`` float32, going on from ``carries [B, H, D]`` uint8, which
    are free if not given.

    Raises:
        InvalidArgumentError: ``rotated`` is not float32, ``nbits`` not 1 to 8, or the carries not theirs.
    """
    batch, num_heads, head_dim, num_tokens = rotated.shape
    require(1 <= nbits <= MAX_NBITS, "the values' width", f"1 to {MAX_NBITS} bits", nbits)
    device, rotated = rotated.device, rotated.cpu().contiguous()
    by_token = (batch, num_heads, num_tokens)
    by_row = (batch, num_tiles(num_tokens), num_heads * head_dim * nbits, ROW_BYTES)
    streams = torch.empty(by_row, dtype=torch.uint8, device="cpu")
    energies, overlaps, squares = torch.empty(3, *by_token, dtype=torch.float32, device="cpu").unbind()
    is_free = carries is None
    carries = _carries(carries, (batch, num_heads, head_dim))
    call = abi.ValueEncoding(
        values=address("rotated values", rotated, torch.float32, (batch, num_heads, head_dim, num_tokens)),
        streams=address("streams", streams, torch.uint8, by_row),
        carries=address("carries", carries, torch.uint8, (batch, num_heads, head_dim)),
        energies=address("energies", energies, torch.float32, by_token),
        overlaps=address("overlaps", overlaps, torch.float32, by_token),
        squares=address("squares", squares, torch.float32, by_token),
        batch=batch,
        num_heads=num_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        nbits=nbits,
        num_threads=torch.get_num_threads(),
        is_free=is_free,
        trellis=_trellis().structure,
    )
    library.function("spectral_encode_values", variant)(ctypes.byref(call))
    return Encoded(*(tensor.to(device) for tensor in (streams, carries, energies, overlaps, squares)))


@lru_cache(maxsize=256)
def _rows(widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The widths, and each component's first row of a tile's streams, ``[C]`` int32."""
    nbits, ends = torch.tensor([widths, [*accumulate(widths)]], dtype=torch.int32, device="cpu").unbind()
    return nbits, ends - nbits


@lru_cache
def _ratios(clips: tuple[float, ...]) -> Tensor:
    return torch.tensor(clips, dtype=torch.float32, device="cpu")


def _carries(carries: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """On the CPU, and not the caller's: the kernel writes them where they are free."""
    if carries is None:
        return torch.zeros(shape, dtype=torch.uint8, device="cpu")
    return carries.to("cpu", copy=True, memory_format=torch.contiguous_format)


class _Trellis(NamedTuple):
    """The tables' structure, and the tensors that it points to."""

    structure: abi.Trellis
    tensors: tuple[Tensor, ...]


@lru_cache
def _trellis() -> _Trellis:
    entries = trellis.tables().entries
    units = torch.tensor(trellis.tables().units, dtype=torch.float32, device="cpu")
    widths = range(1, trellis.MAX_TRELLIS_NBITS + 1)
    reaches = torch.tensor(trellis.REACHES, dtype=torch.float32, device="cpu")
    distances = torch.stack([trellis.distances_to(entries[nbits - 1], nbits) for nbits in widths])
    structure = abi.Trellis(
        entries=address("entries", entries, torch.float32, (MAX_NBITS, trellis.STATES)),
        units=address("units", units, torch.float32, (MAX_NBITS,)),
        reaches=address("reaches", reaches, torch.float32, (len(widths),)),
        distances=address(
            "distances", distances, torch.int16, (len(widths), 2 * trellis.LARGEST_INPUT + 1, trellis.STATES)
        ),
    )
    return _Trellis(structure, (entries, units, reaches, distances))
