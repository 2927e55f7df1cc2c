"""Quantizing and packing in one pass of the compiled kernel (native/encode.cpp), where there is one."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from itertools import accumulate, chain

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.packing import MAX_NBITS, PLANE_BYTES, num_tiles
from unsloth_spectral.native import library
from unsloth_spectral.native.pointers import address, require


class _KeyEncoding(ctypes.Structure):
    _fields_ = [
        ("coefficients", c_void_p),
        ("widths", c_void_p),
        ("places", c_void_p),
        ("planes", c_void_p),
        ("scales", c_void_p),
        ("energies", c_void_p),
        ("squares", c_void_p),
        ("clips", c_void_p),
        ("counts", c_void_p),
        ("batch", c_int64),
        ("num_components", c_int64),
        ("num_tokens", c_int64),
        ("num_planes", c_int64),
        ("num_clips", c_int64),
        ("num_heads", c_int64),
        ("num_threads", c_int64),
    ]


class _ValueEncoding(ctypes.Structure):
    _fields_ = [
        ("turned", c_void_p),
        ("planes", c_void_p),
        ("energies", c_void_p),
        ("overlaps", c_void_p),
        ("squares", c_void_p),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
        ("num_tokens", c_int64),
        ("nbits", c_int64),
        ("num_threads", c_int64),
        ("step", c_float),
    ]


def serves(tensor: Tensor) -> bool:
    """Whether the kernel can take ``tensor``."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and library.obstacle() is None


def encode_keys(
    coefficients: Tensor, widths: Sequence[Sequence[int]], clips: Sequence[float], variant: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes of ``coefficients [B, C, n]`` float32; of each tile the scale, the squared length, and that of the codes
    around zero, all ``[B, C, tiles]`` float32.

    ``widths`` are those of each head's components; planes are as ``packing.pack_quads`` makes them.

    Raises:
        InvalidArgumentError: the coefficients are no float32 tensor on the CPU, or the widths not theirs.
    """
    batch, count, num_tokens = coefficients.shape
    flat, heads = tuple(chain.from_iterable(widths)), [len(own) for own in widths]
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
    call = _KeyEncoding(
        address("coefficients", coefficients, torch.float32, (batch, count, num_tokens)),
        address("widths", nbits, torch.int32, (count,)),
        address("places", places, torch.int32, (count,)),
        address("planes", planes, torch.uint8, (batch, tiles, total, PLANE_BYTES)),
        address("scales", scales, torch.float32, by_tile),
        address("energies", energies, torch.float32, by_tile),
        address("squares", squares, torch.float32, by_tile),
        address("clips", ratios, torch.float32, (len(clips),)),
        address("counts", counts, torch.int32, (len(heads),)),
        batch,
        count,
        num_tokens,
        total,
        len(clips),
        len(heads),
        torch.get_num_threads(),
    )
    library.function("spectral_encode_keys", variant)(ctypes.byref(call))
    return planes, scales, energies, squares


def encode_values(
    turned: Tensor, nbits: int, step: float, variant: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rotated values ``turned [B, H, D, n]`` the planes, and for each token, ``[B, H, n]`` float32: its squared
    length, its product with its codes around zero, and their squared length.

    Raises:
        InvalidArgumentError: ``turned`` is no float32 tensor on the CPU, or ``nbits`` not 1 to 8.
    """
    batch, num_heads, head_dim, num_tokens = turned.shape
    require(1 <= nbits <= MAX_NBITS, "the values' width", f"1 to {MAX_NBITS} bits", nbits)
    by_token = (batch, num_heads, num_tokens)
    by_plane = (batch, num_tiles(num_tokens), num_heads * head_dim * nbits, PLANE_BYTES)
    turned = turned.contiguous()
    planes = torch.empty(by_plane, dtype=torch.uint8, device="cpu")
    energies, overlaps, squares = torch.empty(3, *by_token, dtype=torch.float32, device="cpu").unbind()
    call = _ValueEncoding(
        address("turned values", turned, torch.float32, (batch, num_heads, head_dim, num_tokens)),
        address("planes", planes, torch.uint8, by_plane),
        address("energies", energies, torch.float32, by_token),
        address("overlaps", overlaps, torch.float32, by_token),
        address("squares", squares, torch.float32, by_token),
        batch,
        num_heads,
        head_dim,
        num_tokens,
        nbits,
        torch.get_num_threads(),
        step,
    )
    library.function("spectral_encode_values", variant)(ctypes.byref(call))
    return planes, energies, overlaps, squares
