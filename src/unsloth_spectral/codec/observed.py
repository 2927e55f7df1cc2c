"""Positions of the tokens to seal, and a sample of the queries that attended to them."""

from dataclasses import dataclass

from torch import Tensor

from unsloth_spectral.rope import Rotation


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Attributes:
    rotation: positions of the tokens to be sealed; None for a model without rotary embeddings.
    queries: ``[B, num_attention_heads, n, D]``, a sample, rotated and scaled as for the scores; zeros fill up rows with
        fewer queries; None if there is no query.
    distances: ``[B, n]`` int64 on the CPU, how many of the tokens to be sealed came before each query; 0 for the
        filling.
    padding: ``[B]`` int64 on the CPU, how many of the tokens to be sealed are padding at the start of each row; None
        if none are.
    """

    rotation: Rotation | None = None
    queries: Tensor | None = None
    distances: Tensor | None = None
    padding: Tensor | None = None
