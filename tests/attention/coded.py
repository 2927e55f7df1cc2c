"""Exact and coded blocks of any shape for tests of attention; the codec makes the coded ones."""

import math
from dataclasses import replace

import torch

from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.model_basis import BasisRows, ModelBasis
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.statistics import KeyStatistics
from unsloth_spectral.rope import Rotation, own_anchors, rotate, spans_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(
    batch: int, heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ExactBlock:
    keys, values = random(2, batch, heads, num_tokens, head_dim, seed=seed).to(dtype)
    return ExactBlock(keys, values)


def rotation_of(
    num_tokens: int, pairs: int, seed: int, rows: int = 1, scale: float = 1.0, interleaved: bool = False
) -> Rotation:
    """Positions that run on from a different one in each of ``rows``, with angle steps from 1 to 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.logspace(0, -4, pairs, dtype=torch.float64)
    starts = torch.randint(0, 3000, (rows, 1, 1), generator=generator)
    # Three tokens determine the step.
    angles = (starts + torch.arange(max(3, num_tokens))[:, None]) * steps
    table = torch.polar(torch.full_like(angles, scale), angles).to(torch.complex64)
    dims = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    return Rotation.of(table, *dims).slice(0, num_tokens)


def coded_block(
    batch: int,
    heads: int,
    head_dim: int,
    num_tokens: int,
    frame: str = "anchored",
    value_nbits: int = 2,
    seed: int = 0,
    widths: torch.Tensor | None = None,
    pairs: int | None = None,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
) -> SpectralBlock:
    """Keys with a falling spectrum and, before rotation, a large mean, ``frame`` "anchored", "rotated" (no pair has
    anchors), "unrotated" (each token is its own) or "none" (no rotation)."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, head_dim + 1) ** -0.7
    mixing = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator)).Q
    keys = (torch.randn(batch, heads, num_tokens, head_dim, generator=generator) * 3 * spectrum) @ mixing
    keys = keys + 2 * torch.randn(heads, 1, head_dim, generator=generator)
    values = torch.randn(batch, heads, num_tokens, head_dim, generator=generator)
    values = values * torch.exp(torch.randn(batch, heads, num_tokens, 1, generator=generator))
    rotation = None
    if frame != "none":
        rotation = rotation_of(num_tokens, pairs or head_dim // 2, seed, rows, interleaved=interleaved)
        keys = rotate(keys, rotation.table()[:, None], rotation)
    spans = own_anchors(rotation) if frame == "unrotated" else spans_of(rotation)
    if frame == "rotated":
        spans = (0,) * len(spans)
    run = KeyStatistics.of(keys, torch.eye(head_dim).expand(1, heads, -1, -1), rotation, spans)
    if widths is None:
        widths = torch.randint(0, 9, (heads, head_dim), generator=generator)
    coded, _ = key_codec.encode(run, key_codec.plan(run.basis(), widths, math.nan))
    return SpectralBlock(coded, value_codec.encode(values, value_nbits), dtype)


def in_model_basis(block: SpectralBlock) -> SpectralBlock:
    """A block of one row with its vectors as rows of a model's basis, in any places."""
    keys, dim = block.keys, block.keys.vectors.shape[-1]
    vectors = torch.randint(-127, 128, (len(keys.widths), dim, dim), dtype=torch.int8)
    places, first = [], 0
    for head, row in enumerate(keys.widths):
        places.append(tuple(torch.randperm(dim, generator=torch.Generator().manual_seed(head))[: len(row)].tolist()))
        vectors[head, list(places[-1])] = keys.vectors[0, first : first + len(row)].cpu()
        first += len(row)
    scales = torch.ones(len(keys.widths), dim, 1)
    basis = ModelBasis.of(vectors, scales, scales[..., 0])
    return replace(block, keys=replace(keys, vectors=keys.vectors[:, :0], rows=BasisRows(basis, tuple(places))))
