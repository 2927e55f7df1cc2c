"""One sealing: the oldest exact tokens become blocks, run by run; tokens that cannot be sealed stay exact."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.codec.block import Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.codec import LayerCodec
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.log import warn_once


@dataclass(frozen=True, slots=True, eq=False)
class Sealing:
    """Attributes:
    codec: the layer's codec.
    tokens: the tokens to seal, padding zeroed.
    real: ``[B, num_tokens]`` bool, False for padding; None if there is no padding.
    observe: returns the positions and queries of tokens ``start`` to ``stop`` of these.
    unit: tokens that are checked together for being finite; ``tokens`` are a multiple of it.
    block_size: tokens that are sealed together when sealing all together fails.
    cold: the blocks before these tokens, oldest first; ``run`` adds to it.
    """

    codec: LayerCodec
    tokens: ExactBlock
    real: Tensor | None
    observe: Callable[[int, int], Observed]
    unit: int
    block_size: int
    cold: list[Block]

    def run(self) -> list[Block]:
        """Add the tokens to ``cold``, as blocks or to the last one; returns the blocks that they became."""
        blocks = []
        for block, num_tokens in self._blocks():
            self._add(block, num_tokens)
            blocks.append(block)
        return blocks

    def _add(self, block: Block, num_tokens: int) -> None:
        """Add ``block``, of the next ``num_tokens`` tokens and perhaps the last block's."""
        cold = self.cold
        if block.num_tokens > num_tokens:
            assert block.num_tokens == cold[-1].num_tokens + num_tokens, "a block of other tokens"
            cold[-1] = block
            return
        joined = self.codec.join(cold[-1], block) if cold else None
        if joined is None:
            cold.append(block)
        else:
            cold[-1] = joined

    def _blocks(self) -> Iterator[tuple[Block, int]]:
        """Blocks, oldest first, and how many of the tokens each has; the caller adds each before it asks for the
        next."""
        finite = _finite_blocks(self.tokens, self.unit)
        first = 0
        for last in range(1, len(finite) + 1):
            if last < len(finite) and finite[last] == finite[first]:
                continue
            start, stop = first * self.unit, last * self.unit
            yield from self._run(start, stop) if finite[first] else [self._exact(start, stop)]
            first = last

    def _run(self, start: int, stop: int) -> Iterator[tuple[Block, int]]:
        """Seal finite tokens together or, if that fails, block by block."""
        sealed = self._try(start, stop)
        if sealed is not None:
            yield sealed, stop - start
        elif stop - start <= self.block_size:
            yield self._exact(start, stop)
        else:
            for first in range(start, stop, self.block_size):
                yield from self._run(first, min(first + self.block_size, stop))

    def _try(self, start: int, stop: int) -> SealedBlock | None:
        real = None if self.real is None else self.real[:, start:stop]
        try:
            last = self.cold[-1] if self.cold else None
            sealed = self.codec.seal(self.tokens.slice(start, stop), real, self.observe(start, stop), last)
        except InvalidArgumentError:
            raise
        except (RuntimeError, MemoryError) as error:  # a LinAlgError, or no memory for the factorization
            warn_once("%d tokens could not be factorized together: %s", stop - start, error)
            return None
        if sealed is not None and not sealed.is_finite:  # finite tokens whose squares overflow
            warn_once("the factors of %d tokens overflowed", stop - start)
            return None
        return sealed

    def _exact(self, start: int, stop: int) -> tuple[Block, int]:
        return self.tokens.slice(start, stop).map_batch(torch.clone), stop - start


def without_padding(tokens: ExactBlock, real: Tensor) -> ExactBlock:
    """The tokens with padding zeroed: it is never attended to, so it should cost no rank."""
    return tokens.map_batch(lambda tensor: torch.where(real[:, None, :, None], tensor, torch.zeros_like(tensor)))


def _finite_blocks(tokens: ExactBlock, size: int) -> list[bool]:
    """For each block of ``size`` tokens, whether all of its keys and values in all rows and heads are finite."""
    # A NaN or infinity makes the sum not finite, and summing is far cheaper than testing each number. If the sum of
    # finite numbers overflows, the exact test below decides.
    if math.isfinite(tokens.keys.sum(dtype=torch.float32) + tokens.values.sum(dtype=torch.float32)):
        return [True] * (tokens.num_tokens // size)
    finite = tokens.keys.sum(-1, dtype=torch.float32).isfinite() & tokens.values.sum(-1, dtype=torch.float32).isfinite()
    per_block: list[bool] = finite.all(0).all(0).unflatten(0, (-1, size)).all(1).tolist()
    return per_block
