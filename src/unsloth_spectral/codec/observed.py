"""What attention has seen of tokens about to be sealed: where they stand, and which queries look at them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.codec.basis import query_metric
from unsloth_spectral.rope import Rotation, rotate

_KEYS_PER_QUERY = 4
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Attributes:
    rotation: positions of the tokens to be sealed; None for a model without rotary embeddings.
    queries: ``[B, num_attention_heads, n, D]`` a sample, rotated and scaled as for the scores; None where none were
        seen.
    distances: ``[n]`` int64, how many of the tokens to be sealed came before each query.
    """

    rotation: Rotation | None = None
    queries: Tensor | None = None
    distances: Tensor | None = None

    def metric(self, num_key_value_heads: int, head_dim: int, is_rotated: bool) -> Tensor:
        """``W = E[R(n)^T q q^T R(n)]`` over sampled queries and key positions ``n`` before them; ``E[q q^T]`` for
        rotated keys. ``[B or 1, H, D, D]`` float32, the identity where no query was seen."""
        if self.queries is None or self.distances is None:
            return torch.eye(head_dim, dtype=torch.float32, device="cpu").expand(1, num_key_value_heads, -1, -1)
        grouped = self.queries.float().unflatten(1, (num_key_value_heads, -1))
        if is_rotated or self.rotation is None:
            return query_metric(grouped.flatten(2, 3))
        # Few numbers: drawn on the CPU, so that every device and run draws the same.
        generator = torch.Generator().manual_seed(_SEED)
        table, turned = self.rotation.table(), []
        for _ in range(_KEYS_PER_QUERY):
            share = torch.rand(len(self.distances), generator=generator, dtype=torch.float32, device="cpu")
            keys = (share.to(table.device) * self.distances.to(table.device)).long().clamp(max=table.shape[1] - 1)
            turned.append(rotate(grouped, table[:, keys][:, None, None].conj(), self.rotation))
        return query_metric(torch.cat(turned, dim=3).flatten(2, 3), grouped.shape[2] * grouped.shape[3])
