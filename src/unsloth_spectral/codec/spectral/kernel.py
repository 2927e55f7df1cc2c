"""Quantizing and packing in one pass of the compiled kernel (native/encode.cpp), if it was built."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.packing import MAX_NBITS, PLANE_BYTES, num_tiles
from unsloth_spectral.native import abi, library
from unsloth_spectral.native.pointers import address, require


def serves(tensor: Tensor) -> bool:
    """True if the kernel can take ``tensor``."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and library.obstacle() is None


def encode_keys(
    coefficients: Tensor, widths: Sequence[Sequence[int]], clips: Sequence[float], variant: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes of ``coefficients [B, C, n]`` float32; and for each tile, ``[B, C, tiles]`` float32: the scale, the
    squared length of the coefficients, and the squared length of the codes around zero.

    ``widths`` are the bits of each head's components; planes have the order of ``packing.pack_quads``.

    Raises:
        InvalidArgumentError: the coefficients are no float32 tensor on the CPU, or the widths do not fit them.
    """
    batch, count, num_tokens = coefficients.shape
    flat, heads = tuple(chain.from_iterable(widths)), [len(head_widths) for head_widths in widths]
    require(len(flat) == count, "widths", f"one for each of {count} components", len(flat))
    require(all(1 <= nbits <= MAX_NBITS for nbits in flat), "widths", f"1 to {MAX_NBITS} bits each", flat)
    tiles, total = num_tiles(num_tokens), sum(flat)
    by_tile = (batch, count, tiles)
    coefficients = coefficients.contiguous()
    planes = torch.empty(batch, tiles, total, PLANE_BYTES, dtype=torch.uint8, device="cpu")
    scales, energies, squares = torch.empty(3, *by_tile, dtype=torch.float32, device="cpu").unbind()
    nbits, places, counts = (
        torch.tensor(numbers, dtype=torch.int32, device="cpu")
        for numbers in (flat, list(accumulate(flat, initial=0))[:-1], heads)
    )
    ratios = torch.tensor(clips, dtype=torch.float32, device="cpu")
    call = abi.KeyEncoding(
        coefficients=address("coefficients", coefficients, torch.float32, (batch, count, num_tokens)),
        widths=address("widths", nbits, torch.int32, (count,)),
        places=address("places", places, torch.int32, (count,)),
        planes=address("planes", planes, torch.uint8, (batch, tiles, total, PLANE_BYTES)),
        scales=address("scales", scales, torch.float32, by_tile),
        energies=address("energies", energies, torch.float32, by_tile),
        squares=address("squares", squares, torch.float32, by_tile),
        clips=address("clips", ratios, torch.float32, (len(clips),)),
        counts=address("counts", counts, torch.int32, (len(heads),)),
        batch=batch,
        num_components=count,
        num_tokens=num_tokens,
        num_planes=total,
        num_clips=len(clips),
        num_heads=len(heads),
        num_threads=torch.get_num_threads(),
    )
    library.function("spectral_encode_keys", variant)(ctypes.byref(call))
    return planes, scales, energies, squares


def encode_values(
    rotated: Tensor, nbits: int, step: float, variant: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes of Hadamard-rotated values ``rotated [B, H, D, n]``; and for each token, ``[B, H, n]`` float32: its
    squared length, its product with its codes around zero, and the squared length of these codes.

    Raises:
        InvalidArgumentError: ``rotated`` is no float32 tensor on the CPU, or ``nbits`` not 1 to 8.
    """
    batch, num_heads, head_dim, num_tokens = rotated.shape
    require(1 <= nbits <= MAX_NBITS, "the values' width", f"1 to {MAX_NBITS} bits", nbits)
    by_token = (batch, num_heads, num_tokens)
    by_plane = (batch, num_tiles(num_tokens), num_heads * head_dim * nbits, PLANE_BYTES)
    rotated = rotated.contiguous()
    planes = torch.empty(by_plane, dtype=torch.uint8, device="cpu")
    energies, overlaps, squares = torch.empty(3, *by_token, dtype=torch.float32, device="cpu").unbind()
    call = abi.ValueEncoding(
        values=address("rotated values", rotated, torch.float32, (batch, num_heads, head_dim, num_tokens)),
        planes=address("planes", planes, torch.uint8, by_plane),
        energies=address("energies", energies, torch.float32, by_token),
        overlaps=address("overlaps", overlaps, torch.float32, by_token),
        squares=address("squares", squares, torch.float32, by_token),
        batch=batch,
        num_heads=num_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        nbits=nbits,
        num_threads=torch.get_num_threads(),
        step=step,
    )
    library.function("spectral_encode_values", variant)(ctypes.byref(call))
    return planes, energies, overlaps, squares
