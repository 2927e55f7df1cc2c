"""A made-up model whose keys have known bases and means, and chunks of its texts."""

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.rotations import rotation_at, steps_of
from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.rope import anchors_of, rotate, spans_of

THETA = 10_000.0


def _spread(dim: int) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float32) ** -0.8


def known_profile(layers: int, heads: int, dim: int, seed: int = 0) -> ModelProfile:
    """A profile whose bases are orthonormal and whose layers and heads all matter alike."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(layers, heads, dim, dim, generator=generator)).Q
    variances = _spread(dim).square().expand(heads, -1).contiguous()
    means = 2 * torch.randn(layers, heads * dim, generator=generator)
    return ModelProfile(
        value_sensitivities=(1.0,) * layers,
        key_sensitivities=((1.0,) * heads,) * layers,
        key_variances=(tuple(variances.flatten().tolist()),) * layers,
        bases=tuple(ModelBasis.rounded(rows, variances) for rows in axes),
        key_means=tuple(tuple(row) for row in means.tolist()),
    )


def chunk_of(profile: ModelProfile, tokens: int, number: int, theta: float | None = THETA, seed: int = 1) -> Tensor:
    """The chunk that ``number`` others come before, ``[2, layers, tokens, heads * dim]`` float32."""
    generator = torch.Generator().manual_seed(seed + number)
    rows = torch.stack([basis.on(torch.device("cpu")).rows for basis in profile.bases])
    layers, heads, dim = rows.shape[:3]
    keys = torch.randn(layers, heads, tokens, dim, generator=generator) * _spread(dim) @ rows
    mean = torch.tensor(profile.key_means).view(layers, heads, 1, dim)
    mean = mean + 0.2 * torch.randn(mean.shape, generator=generator)
    if theta is None:
        keys = keys + mean
    else:
        rotation = rotation_at(profile.rope_steps or steps_of(dim, theta), tokens, number * tokens)
        keys = rotate(keys, anchors_of(rotation, spans_of(rotation)), rotation)
        keys = keys + rotate(mean.expand_as(keys), rotation.table(), rotation)
    values = torch.randn(layers, heads, tokens, dim, generator=generator)
    return torch.stack([keys, values]).transpose(2, 3).flatten(3)
