"""One layer's cache in three tiers: exact sinks, sealed cold blocks, exact residual (DESIGN section 2)."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from unsloth_spectral.cache.buffer import TokenBuffer
from unsloth_spectral.cache.sinks import Sinks
from unsloth_spectral.cache.stats import LayerStats
from unsloth_spectral.codec.block import Block, ExactBlock, SpectralBlock, seal
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.tensors import TensorFunction
from unsloth_spectral.errors import InvalidArgumentError

logger = logging.getLogger("unsloth_spectral")


class SpectralLayer:
    """Keys and values of one attention layer. Knows nothing of models; attention reads it through ``blocks``.

    Tokens arrive by ``append`` and stay exact until ``seal``. Sealing is a call of its own because a prefill is to be
    attended to exactly before it is compressed.
    """

    def __init__(self, config: SpectralConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._sinks: Sinks | None = None
        self._cold: list[Block] = []
        self._residual: TokenBuffer | None = None
        self._padding: Tensor | None = None
        self._exact_blocks = 0
        self._svd_fallbacks = 0
        self._seal_seconds = 0.0

    # Reading

    @property
    def is_empty(self) -> bool:
        return self._residual is None

    @property
    def is_sealed(self) -> bool:
        """Whether any token has left the exact tail, so that ``blocks`` holds more than one dense piece."""
        return self._sinks is not None or bool(self._cold)

    @property
    def num_tokens(self) -> int:
        return 0 if self._residual is None else self._num_before_residual + self._residual.num_tokens

    @property
    def blocks(self) -> list[Block]:
        """All tokens, in the order in which ``arrange_mask`` puts the columns of a mask."""
        if self._residual is None:
            return []
        first: list[Block] = [] if self._sinks is None else [self._sinks.block]
        last: list[Block] = [self._residual.block] if self._residual.num_tokens else []
        return [*first, *self._cold, *last]

    def arrange_mask(self, mask: Tensor | None) -> Tensor | None:
        """Bring the columns of ``mask [B or 1, 1, Q, num_tokens]`` (bool or additive) into the order of ``blocks``."""
        return mask if self._sinks is None else self._sinks.arrange_mask(mask, self.num_tokens)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values ``[B, H, num_tokens, head_dim]`` in order of position.

        Raises:
            InvalidArgumentError: the layer is empty.
        """
        if self._residual is None:
            raise InvalidArgumentError("an empty cache layer has nothing to reconstruct: append tokens first")
        pairs = [block.reconstruct() for block in [*self._cold, self._residual.block]]
        tokens = ExactBlock(torch.cat([pair[0] for pair in pairs], -2), torch.cat([pair[1] for pair in pairs], -2))
        return (tokens if self._sinks is None else self._sinks.put_back(tokens)).reconstruct()

    # Writing

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the newest tokens, ``[B, H, n, head_dim]``, exact.

        Raises:
            InvalidArgumentError: shapes do not fit each other, the tokens held, or the ranks asked for.
        """
        self._check_tokens(keys, values)
        keys, values = keys.detach(), values.detach()
        if self._residual is None:
            # Kept by reference: a prefill is read once by its own attention and then sealed.
            self._residual = TokenBuffer(keys, values)
        else:
            self._residual.append(keys, values)

    def note_padding(self, padding: Tensor | None) -> None:
        """Remember the padding for a first sealing that comes later, when no mask is at hand."""
        self._padding = padding

    @torch.no_grad()
    def seal(self, padding: Tensor | None = None) -> None:
        """Seal every whole block older than the residual. Each block is encoded once and never again.

        Args:
            padding: ``[B]`` integers, masked tokens at the start of each row; None where no row has any, or as
                ``note_padding`` was told. Used at the first sealing: rows keep their own first tokens as sinks, and
                padding is zeroed so that it takes no rank.
        """
        config, residual = self.config, self._residual
        first_time = not self.is_sealed
        if residual is None or (first_time and residual.num_tokens < config.num_sink_tokens):
            return
        padding = self._padding if padding is None else padding
        sinks = self._sinks
        if first_time and config.num_sink_tokens:
            sinks = Sinks.of(residual.block, config.num_sink_tokens, padding)
        start = sinks.num_leading if first_time and sinks is not None else 0
        num_blocks = (residual.num_tokens - start - config.residual_length) // config.block_size
        if num_blocks < 1:
            return
        started = time.perf_counter()
        stop = start + num_blocks * config.block_size
        old = residual.slice(start, stop)
        if first_time and padding is not None:
            old = _without_padding(old, padding)
        cold = list(self._cold)
        num_exact = num_fallbacks = 0
        for block in self._encode(old):
            if isinstance(block, SpectralBlock):
                num_fallbacks += block.num_fallbacks
            else:
                num_exact += block.num_tokens // config.block_size
            _join(cold, block)
        # Assigned together, at the end: whatever interrupts the work above leaves the layer as it was.
        self._sinks, self._cold, self._residual = sinks, cold, residual.copy(stop, residual.num_tokens)
        self._padding = None  # used up: the sinks hold the positions from now on
        self._exact_blocks += num_exact
        self._svd_fallbacks += num_fallbacks
        self._seal_seconds += time.perf_counter() - started

    def crop(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens. Sealed blocks are cut, not encoded again.

        Raises:
            InvalidArgumentError: more tokens are asked for than are held, or fewer than none.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise InvalidArgumentError(f"crop keeps between 0 and the {self.num_tokens} tokens held, got {num_tokens}")
        if num_tokens == self.num_tokens or self._residual is None:
            return
        if num_tokens == 0:
            self.reset()
            return
        if self._sinks is not None and num_tokens < self._sinks.block.num_tokens:
            keys, values = self.reconstruct()
            self.reset()
            self.append(keys[..., :num_tokens, :].clone(), values[..., :num_tokens, :].clone())
            return
        kept_residual = num_tokens - self._num_before_residual
        self._sinks = None if self._sinks is None else self._sinks.crop(num_tokens)
        if kept_residual >= 0:
            self._residual = self._residual.copy(0, kept_residual)
        else:
            cold: list[Block] = []
            room = num_tokens - (0 if self._sinks is None else self._sinks.num_leading)
            for block in self._cold:
                if room > 0:
                    cold.extend([block] if room >= block.num_tokens else block.first_tokens(room))
                room -= block.num_tokens
            self._cold, self._residual = cold, self._residual.copy(0, 0)

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` (index, repeat, move) along the batch dimension of everything held."""
        if self._residual is None:
            return
        sinks = None if self._sinks is None else self._sinks.map_batch(function)
        cold = [block.map_batch(function) for block in self._cold]
        self._padding = None if self._padding is None else function(self._padding)
        self._sinks, self._cold, self._residual = sinks, cold, self._residual.map_batch(function)

    # Counting

    def stats(self) -> LayerStats:
        """Tokens, bytes, ranks and errors of this layer."""
        if self._residual is None:
            return LayerStats(kind="spectral", num_tokens=0)
        spectral = [block for block in self._cold if isinstance(block, SpectralBlock)]
        tail = self._residual.block
        per_token = tail.keys.shape[0] * tail.keys.shape[1] * (tail.keys.shape[-1] + tail.values.shape[-1])
        return LayerStats(
            kind="spectral",
            num_tokens=self.num_tokens,
            sealed_tokens=sum(block.num_tokens for block in spectral),
            sink_bytes=0 if self._sinks is None else self._sinks.nbytes,
            cold_bytes=sum(block.nbytes for block in self._cold),
            residual_bytes=self._residual.nbytes,
            dense_bytes=self.num_tokens * per_token * tail.keys.element_size(),
            elements=self.num_tokens * per_token,
            rank_keys=spectral[0].keys.rank if spectral else None,
            rank_values=spectral[0].values.rank if spectral else None,
            error_keys=_mean([block.keys.relative_error for block in spectral]),
            error_values=_mean([block.values.relative_error for block in spectral]),
            exact_blocks=self._exact_blocks,
            svd_fallbacks=self._svd_fallbacks,
            seal_seconds=self._seal_seconds,
        )

    # Inside

    @property
    def _num_before_residual(self) -> int:
        leading = 0 if self._sinks is None else self._sinks.num_leading
        return leading + sum(block.num_tokens for block in self._cold)

    def _encode(self, old: ExactBlock) -> Iterator[Block]:
        """Seal ``old``, a whole number of blocks, in runs; blocks that cannot be encoded stay exact."""
        size = self.config.block_size
        finite = _finite_blocks(old, size)
        start = 0
        for stop in range(1, len(finite) + 1):
            if stop < len(finite) and finite[stop] == finite[start]:
                continue
            run = old.slice(start * size, stop * size)
            yield from self._encode_run(run) if finite[start] else [run.map_batch(torch.clone)]
            start = stop

    def _encode_run(self, run: ExactBlock) -> Iterator[Block]:
        """Seal finite blocks together, or, where that fails, each on its own."""
        sealed = self._try_seal(run.keys, run.values)
        if sealed is not None:
            yield sealed
        elif run.num_tokens == self.config.block_size:
            yield run.map_batch(torch.clone)
        else:
            for start in range(0, run.num_tokens, self.config.block_size):
                yield from self._encode_run(run.slice(start, start + self.config.block_size))

    def _try_seal(self, keys: Tensor, values: Tensor) -> SpectralBlock | None:
        try:
            sealed = seal(keys, values, self.config)
        except InvalidArgumentError:
            raise
        except RuntimeError as error:  # a LinAlgError, or no memory for the factorization
            logger.warning("%d tokens could not be factorized together: %s", keys.shape[-2], error)
            return None
        if not sealed.is_finite:  # finite tokens whose squares overflow
            logger.warning("the factors of %d tokens overflowed", keys.shape[-2])
            return None
        return sealed

    def _check_tokens(self, keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
            raise InvalidArgumentError(
                "keys and values must both be (batch, num_key_value_heads, seq_len, head_dim), "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if self._residual is None:
            self.config.check_head_dim(min(keys.shape[-1], values.shape[-1]))
            return
        held = self._residual.block
        for name, new, old in (("keys", keys, held.keys), ("values", values, held.values)):
            if (*new.shape[:2], new.shape[3]) != (*old.shape[:2], old.shape[3]):
                raise InvalidArgumentError(
                    f"this cache holds {old.shape[0]} sequences of {old.shape[1]} heads with head_dim {old.shape[3]}, "
                    f"got {name} of shape {tuple(new.shape)}: use a fresh cache for another batch or model"
                )


def _join(cold: list[Block], block: Block) -> None:
    """Append ``block`` to ``cold``, stacked onto the last one where both are spectral and of one length."""
    last = cold[-1] if cold else None
    if isinstance(last, SpectralBlock) and isinstance(block, SpectralBlock) and last.block_length == block.block_length:
        cold[-1] = last.stack(block)
    else:
        cold.append(block)


def _finite_blocks(tokens: ExactBlock, size: int) -> list[bool]:
    """For each block of ``size`` tokens, whether all of its keys and values in all rows and heads are finite."""
    # A NaN or infinity makes a sum so too, and summing is far cheaper than testing each number; where the sum of finite
    # ones overflows the closer look below decides.
    if math.isfinite(tokens.keys.sum(dtype=torch.float32) + tokens.values.sum(dtype=torch.float32)):
        return [True] * (tokens.num_tokens // size)
    finite = tokens.keys.sum(-1, dtype=torch.float32).isfinite() & tokens.values.sum(-1, dtype=torch.float32).isfinite()
    per_block: list[bool] = finite.all(0).all(0).unflatten(0, (-1, size)).all(1).tolist()
    return per_block


def _without_padding(tokens: ExactBlock, padding: Tensor) -> ExactBlock:
    """The tokens with those in the padding zeroed: they are never attended to, so they should cost no rank."""
    real = torch.arange(tokens.num_tokens, device=padding.device) >= padding[:, None]
    return tokens.map_batch(lambda tensor: torch.where(real[:, None, :, None], tensor, torch.zeros_like(tensor)))


def _mean(errors: list[Tensor]) -> float | None:
    return float(torch.cat([error.flatten() for error in errors]).mean()) if errors else None
