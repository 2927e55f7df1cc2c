"""One layer's cache in three tiers: exact sinks, sealed cold blocks, exact residual (DESIGN section 2)."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from unsloth_spectral.cache.buffer import TokenBuffer
from unsloth_spectral.cache.positions import PositionLog
from unsloth_spectral.cache.sampler import QuerySampler
from unsloth_spectral.cache.sinks import Sinks
from unsloth_spectral.cache.stats import LayerStats
from unsloth_spectral.codec.block import Block, ExactBlock, SpectralBlock
from unsloth_spectral.codec.coded import CodedBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.sealer import SealedBlock, Sealer, make_sealers
from unsloth_spectral.codec.tensors import TensorFunction
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.rope import Rotation

logger = logging.getLogger("unsloth_spectral")


class SpectralLayer:
    """Keys and values of one attention layer. Knows nothing of models; attention reads it through ``blocks``.

    Tokens arrive by ``append`` and stay exact until ``seal``. Sealing is a call of its own because a prefill is to be
    attended to exactly before it is compressed.
    """

    def __init__(self, config: SpectralConfig, sealer: Sealer | None = None) -> None:
        self.config = config
        # A layer alone shares its budget with no other.
        self._sealer = make_sealers(config, 1)[0] if sealer is None else sealer
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._sinks: Sinks | None = None
        self._cold: list[Block] = []
        self._residual: TokenBuffer | None = None
        self._padding: Tensor | None = None
        self._positions = PositionLog()
        self._queries = QuerySampler()
        self._sealer.reset()
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

    def observe(self, query: Tensor, rotation: Rotation | None) -> None:
        """Note what attention saw of the newest tokens, once they are appended: for the spectral codec.

        ``query [B, num_attention_heads, Q, D]`` is scaled as for the scores; ``rotation`` holds the positions of the
        ``Q`` newest tokens, None for a model without rotary embeddings.
        """
        if self.config.codec != "spectral" or self._residual is None:
            return
        new = query.shape[2]
        self._positions.append(None, self._residual.num_tokens - new - self._positions.num_tokens)
        self._positions.append(rotation, new)
        missing = self._first_due - self._residual.num_tokens
        padding = None if self._padding is None or self.is_sealed else self._padding
        self._queries.note(query, self.num_tokens, missing, 0 if padding is None else int(padding.max()))

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
        if residual is None or residual.num_tokens < self._first_due:
            return
        padding = self._padding if padding is None else padding
        sinks = self._sinks
        if first_time and config.num_sink_tokens:
            sinks = Sinks.of(residual.block, config.num_sink_tokens, padding)
        start = sinks.num_leading if first_time and sinks is not None else 0
        unit = self._sealer.unit(first_time)
        num_tokens = (residual.num_tokens - start - config.residual_length) // unit * unit
        if num_tokens < config.block_size:
            return
        started = time.perf_counter()
        stop = start + num_tokens
        old, real = residual.slice(start, stop), None
        if first_time and padding is not None:
            real = torch.arange(start, stop, device=padding.device) >= padding[:, None]
            old = _without_padding(old, real)
        cold = list(self._cold)
        num_exact = num_fallbacks = 0
        for block in self._encode(old, real, start):
            if isinstance(block, SpectralBlock):
                num_fallbacks += block.num_fallbacks
            elif isinstance(block, ExactBlock):
                num_exact += -(-block.num_tokens // config.block_size)
            self._join(cold, block)
        # Assigned together, at the end: whatever interrupts the work above leaves the layer as it was.
        self._sinks, self._cold, self._residual = sinks, cold, residual.copy(stop, residual.num_tokens)
        self._positions.drop(stop)
        self._queries.reset()
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
        self._positions.crop(max(0, kept_residual))
        self._queries.reset()
        self._sealer.forget()
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
        self._positions.map_batch(function)
        self._queries.reset()
        self._sealer.forget()
        self._padding = None if self._padding is None else function(self._padding)
        self._sinks, self._cold, self._residual = sinks, cold, self._residual.map_batch(function)

    # Counting

    def stats(self) -> LayerStats:
        """Tokens, bytes, ranks and errors of this layer."""
        if self._residual is None:
            return LayerStats(kind="spectral", num_tokens=0)
        ranked = [block for block in self._cold if isinstance(block, SpectralBlock)]
        coded = [block for block in self._cold if isinstance(block, CodedBlock)]
        sealed: list[SealedBlock] = [*ranked, *coded]
        tail = self._residual.block
        per_token = tail.keys.shape[0] * tail.keys.shape[1] * (tail.keys.shape[-1] + tail.values.shape[-1])
        num_sealed = sum(block.num_tokens for block in sealed)
        cold_bytes = sum(block.nbytes for block in self._cold) + self._sealer.nbytes
        return LayerStats(
            kind="spectral",
            num_tokens=self.num_tokens,
            sealed_tokens=num_sealed,
            sink_bytes=0 if self._sinks is None else self._sinks.nbytes,
            cold_bytes=cold_bytes,
            residual_bytes=self._residual.nbytes + self._positions.nbytes + self._queries.nbytes,
            dense_bytes=self.num_tokens * per_token * tail.keys.element_size(),
            elements=self.num_tokens * per_token,
            cold_elements=sum(block.num_tokens for block in self._cold) * per_token,
            rank_keys=ranked[0].keys.rank if ranked else None,
            rank_values=ranked[0].values.rank if ranked else None,
            bits_keys=coded[0].keys.num_bits / (tail.keys.shape[1] * tail.keys.shape[-1]) if coded else None,
            bits_values=float(coded[0].values.nbits) if coded else None,
            error_keys=_mean([block.keys.relative_error for block in sealed]),
            error_values=_mean([block.values.relative_error for block in sealed]),
            exact_blocks=self._exact_blocks,
            svd_fallbacks=self._svd_fallbacks,
            seal_seconds=self._seal_seconds,
        )

    # Inside

    @property
    def _num_before_residual(self) -> int:
        leading = 0 if self._sinks is None else self._sinks.num_leading
        return leading + sum(block.num_tokens for block in self._cold)

    @property
    def _first_due(self) -> int:
        """Tokens in the exact tail at which the next sealing is due."""
        sinks = 0 if self.is_sealed else self.config.num_sink_tokens
        return sinks + self.config.residual_length + self.config.block_size

    def _encode(self, old: ExactBlock, real: Tensor | None, start: int) -> Iterator[Block]:
        """Seal ``old``, which begins at token ``start`` of the tail, in runs; what cannot be sealed stays exact."""
        size = self._sealer.unit(not self.is_sealed)
        finite = _finite_blocks(old, size)
        first = 0
        for last in range(1, len(finite) + 1):
            if last < len(finite) and finite[last] == finite[first]:
                continue
            run = slice(first * size, last * size)
            tokens = old.slice(run.start, run.stop)
            yield from self._encode_run(old, real, start, run) if finite[first] else [tokens.map_batch(torch.clone)]
            first = last

    def _encode_run(self, old: ExactBlock, real: Tensor | None, start: int, run: slice) -> Iterator[Block]:
        """Seal a run of finite tokens together, or, where that fails, block by block."""
        tokens, size = old.slice(run.start, run.stop), self.config.block_size
        sealed = self._try_seal(tokens, None if real is None else real[:, run], start + run.start)
        if sealed is not None:
            yield sealed
        elif tokens.num_tokens <= size:
            yield tokens.map_batch(torch.clone)
        else:
            for first in range(run.start, run.stop, size):
                yield from self._encode_run(old, real, start, slice(first, min(first + size, run.stop)))

    def _try_seal(self, tokens: ExactBlock, real: Tensor | None, start: int) -> SealedBlock | None:
        num_tokens = tokens.num_tokens
        try:
            rotation = self._positions.range(start, start + num_tokens)
            before = self._num_before_residual + start
            sealed = self._sealer.seal(tokens, real, Observed(rotation, *self._queries.sample(before, num_tokens)))
        except InvalidArgumentError:
            raise
        except RuntimeError as error:  # a LinAlgError, or no memory for the factorization
            logger.warning("%d tokens could not be factorized together: %s", num_tokens, error)
            return None
        if sealed is not None and not sealed.is_finite:  # finite tokens whose squares overflow
            logger.warning("the factors of %d tokens overflowed", num_tokens)
            return None
        return sealed

    def _join(self, cold: list[Block], block: Block) -> None:
        """Append ``block`` to ``cold``, as part of the last one where the codec can join them."""
        joined = self._sealer.join(cold[-1], block) if cold else None
        if joined is None:
            cold.append(block)
        else:
            cold[-1] = joined

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


def _finite_blocks(tokens: ExactBlock, size: int) -> list[bool]:
    """For each block of ``size`` tokens, whether all of its keys and values in all rows and heads are finite."""
    # A NaN or infinity makes a sum so too, and summing is far cheaper than testing each number; where the sum of finite
    # ones overflows the closer look below decides.
    if math.isfinite(tokens.keys.sum(dtype=torch.float32) + tokens.values.sum(dtype=torch.float32)):
        return [True] * (tokens.num_tokens // size)
    finite = tokens.keys.sum(-1, dtype=torch.float32).isfinite() & tokens.values.sum(-1, dtype=torch.float32).isfinite()
    per_block: list[bool] = finite.all(0).all(0).unflatten(0, (-1, size)).all(1).tolist()
    return per_block


def _without_padding(tokens: ExactBlock, real: Tensor) -> ExactBlock:
    """The tokens with those in the padding zeroed: they are never attended to, so they should cost no rank."""
    return tokens.map_batch(lambda tensor: torch.where(real[:, None, :, None], tensor, torch.zeros_like(tensor)))


def _mean(errors: list[Tensor]) -> float | None:
    return float(torch.cat([error.float().flatten() for error in errors]).mean()) if errors else None
