"""Quantizing and packing in one pass of the compiled kernel (native/encode.cpp), where there is one."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from itertools import accumulate, chain

import torch
from torch import Tensor

from unsloth_spectral.codec.packing import PLANE_BYTES, num_tiles
from unsloth_spectral.native import library


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
    """
    batch, count, num_tokens = coefficients.shape
    coefficients = coefficients.contiguous()
    flat = tuple(chain.from_iterable(widths))
    assert len(flat) == count
    tiles, total = num_tiles(num_tokens), sum(flat)
    planes = torch.empty(batch, tiles, total, PLANE_BYTES, dtype=torch.uint8)
    scales, energies, squares = torch.empty(3, batch, count, tiles).unbind()
    heads = [len(own) for own in widths]
    numbers = torch.tensor([*flat, *accumulate(flat, initial=0), *heads], dtype=torch.int32)
    ratios = torch.tensor(clips)
    call = _KeyEncoding(
        coefficients.data_ptr(),
        numbers.data_ptr(),
        numbers[count:].data_ptr(),
        planes.data_ptr(),
        scales.data_ptr(),
        energies.data_ptr(),
        squares.data_ptr(),
        ratios.data_ptr(),
        numbers[2 * count + 1 :].data_ptr(),
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
    length, its product with its codes around zero, and their squared length."""
    batch, num_heads, head_dim, num_tokens = turned.shape
    turned = turned.contiguous()
    planes = torch.empty(batch, num_tiles(num_tokens), num_heads * head_dim * nbits, PLANE_BYTES, dtype=torch.uint8)
    energies, overlaps, squares = torch.empty(3, batch, num_heads, num_tokens)
    call = _ValueEncoding(
        turned.data_ptr(),
        planes.data_ptr(),
        energies.data_ptr(),
        overlaps.data_ptr(),
        squares.data_ptr(),
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
