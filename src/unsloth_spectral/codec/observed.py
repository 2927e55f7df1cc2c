"""What attention has seen of tokens about to be sealed: where they stand, and which queries look at them."""

from dataclasses import dataclass

from torch import Tensor

from unsloth_spectral.rope import Rotation


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Attributes:
    rotation: positions of the tokens to be sealed; None for a model without rotary embeddings.
    queries: ``[B, num_attention_heads, n, D]`` a sample, rotated and scaled as for the scores, zeros where a row has
        fewer than others; None where none were seen.
    distances: ``[B, n]`` int64 on the CPU, how many of the tokens to be sealed came before each query; 0 where it is
        none.
    padding: ``[B]`` int64 on the CPU, how many of the tokens to be sealed are padding at the start of each row; None
        where none are.
    """

    rotation: Rotation | None = None
    queries: Tensor | None = None
    distances: Tensor | None = None
    padding: Tensor | None = None
