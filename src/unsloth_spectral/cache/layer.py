"""One layer's cache in three tiers: exact sinks, sealed cold blocks, exact residual."""

import time
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.autocast import no_autocast
from unsloth_spectral.cache.heap import released
from unsloth_spectral.cache.layer_stats import SharedBytes, count
from unsloth_spectral.cache.residual import ResidualBuffer, check_tokens
from unsloth_spectral.cache.sealing import Sealing, without_padding
from unsloth_spectral.cache.sink_tokens import SinkTokens
from unsloth_spectral.cache.stats import LayerStats
from unsloth_spectral.cache.step_buffers import STEP_UNIT, StepBuffers
from unsloth_spectral.cache.tiers import Tiers, padding_within
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.codec import CodecConfig, LayerCodec
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.registry import codec_of, make_codec
from unsloth_spectral.codec.tensors import TensorFunction
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import Rotation


class SpectralLayer:
    """Keys and values of one attention layer. Knows nothing of models; attention reads it through ``blocks``.

    Tokens arrive by ``append`` and stay exact until ``seal``. Sealing is a separate call because a prefill
    is attended to exactly before it is compressed.

    An interrupted call leaves the layer as it was: new contents are built aside and assigned at once.

    Args:
        config: the options.
        codec: seals the tokens.
        step: for a layer that compiled steps append to: the buffers that they use.
    """

    def __init__(self, config: CodecConfig, codec: LayerCodec | None = None, step: StepBuffers | None = None) -> None:
        self.config, self.step = config, step
        # A single layer has the whole budget.
        self._codec = make_codec(config, 1).layer(0) if codec is None else codec
        self._tiers = Tiers()
        self._num_attention_heads: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The buffers of a copy are empty, so what they alone have is noted first.
        self._note_steps()
        return vars(self)

    def reset(self) -> None:
        """Forget all tokens."""
        self._unsettle()
        self._codec.reset()
        self._tiers = Tiers()

    @property
    def uses_queries(self) -> bool:
        """True if the codec uses what ``observe`` notes."""
        return codec_of(self.config).uses_queries

    # Reading

    @property
    def is_empty(self) -> bool:
        return self._tiers.residual is None

    @property
    def is_sealed(self) -> bool:
        """True if any token has left the residual, so that ``blocks`` holds more than one dense block."""
        return self._tiers.sinks is not None or bool(self._tiers.cold)

    @property
    def batch_size(self) -> int:
        """Number of rows; 0 if the layer is empty."""
        return 0 if self._tiers.residual is None else self._tiers.residual.block.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        return 0 if self._tiers.residual is None else self._tiers.num_before_residual + self._tiers.residual.num_tokens

    @property
    def blocks(self) -> list[Block]:
        """All tokens, in the order in which ``arrange_mask`` puts the columns of a mask."""
        if self._tiers.residual is None:
            return []
        first: list[Block] = [] if self._tiers.sinks is None else [self._tiers.sinks.block]
        last: list[Block] = [self._tiers.residual.block] if self._tiers.residual.num_tokens else []
        return [*first, *self._tiers.cold, *last]

    def arrange_mask(self, mask: Tensor | None) -> Tensor | None:
        """Bring the columns of ``mask [B or 1, 1, Q, num_tokens]`` (bool or additive) into the order of ``blocks``."""
        return mask if self._tiers.sinks is None else self._tiers.sinks.arrange_mask(mask, self.num_tokens)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values ``[B, H, num_tokens, head_dim]`` in order of position.

        Raises:
            InvalidArgumentError: the layer is empty.
        """
        if self._tiers.residual is None:
            raise InvalidArgumentError("an empty cache layer has nothing to reconstruct: append tokens first")
        with no_autocast(self._tiers.residual.block.keys.device):
            pairs = [block.reconstruct() for block in [*self._tiers.cold, self._tiers.residual.block]]
        tokens = ExactBlock(torch.cat([pair[0] for pair in pairs], -2), torch.cat([pair[1] for pair in pairs], -2))
        return (tokens if self._tiers.sinks is None else self._tiers.sinks.put_back(tokens)).reconstruct()

    # Writing

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the newest tokens, ``[B, H, n, head_dim]``, exact.

        Raises:
            InvalidArgumentError: the shapes do not fit each other, the tokens in the layer, or the configured ranks.
        """
        check_tokens(keys, values, self.config, None if self._tiers.residual is None else self._tiers.residual.block)
        keys, values = keys.detach(), values.detach()
        self._note_steps()
        self._unsettle()
        if self._tiers.residual is None:
            # By reference: a prefill is read once by its own attention and then sealed.
            self._tiers.residual = ResidualBuffer(keys, values)
        else:
            self._tiers.residual.append(keys, values)
        self._tiers.newest = keys.shape[-2]

    @property
    def awaits_rows(self) -> bool:
        """True if a row may consist of padding alone so far: a later query may still see its tokens."""
        return not self.is_sealed or self._tiers.padding is not None

    def note_padding(self, padding: Tensor) -> None:
        """Note the padding ``[B]`` of a forward pass: how many tokens at the start of each row no query sees; more than
        the row has if none is seen.

        A token that an earlier query has seen is not padding, so padding never grows.
        """
        if self.awaits_rows:
            before, padding = self._tiers.padding, padding.cpu()
            self._tiers.padding = padding if before is None else torch.minimum(before, padding)

    def observe(
        self, query: Tensor, rotation: Rotation | None, scaling: float = 1.0, asking: Tensor | None = None
    ) -> None:
        """Note the queries and positions of the newest tokens, after ``append``: for a codec that ``uses_queries``.

        Scores are products of the keys with ``query [B, num_attention_heads, Q, D]`` times ``scaling``; ``rotation``
        has the positions of the ``Q`` newest tokens, None for a model without rotary embeddings; ``asking [B, Q]``
        bool, on the CPU, is False for the queries of padding.
        """
        tiers = self._tiers
        if not self.uses_queries or tiers.residual is None:
            return
        new, self._num_attention_heads = query.shape[2], query.shape[1]
        missing = tiers.residual.num_tokens - new - tiers.positions.num_tokens
        if self.step is None:
            tiers.positions.append(None, missing)
        else:
            tiers.positions.go_on(missing)
        tiers.positions.append(rotation, new)
        # Of a whole block, in case the codec finds that it differs from the tokens before.
        if self._codec.wants_queries or new >= self.config.block_size:
            tiers.queries.note(query, self.num_tokens, self._num_missing, scaling, asking)

    @torch.no_grad()
    def seal(self, padding: Tensor | None = None) -> None:
        """Seal every whole block older than the residual. Each block is encoded once and never again. Then a compiled
        step may use the layer's buffers, if it has any.

        A prefill is sealed in multiples of the codec's first unit; tokens that came one by one wait for a later one.

        Args:
            padding: ``[B]`` integers, tokens at the start of each row that no query saw; None: as ``note_padding``
                noted it. Each row's own first tokens are its sinks, and padding is zeroed so that it takes no rank.
        """
        if self._tiers.residual is not None and not self._num_missing:
            self._note_steps()
            self._seal(padding)
        self._settle()

    def _seal(self, padding: Tensor | None) -> None:
        config, tiers, residual = self.config, self._tiers, self._tiers.residual
        assert residual is not None
        first_time = not self.is_sealed
        noted = tiers.padding if padding is None else padding.cpu()
        padding = self._padding_of_residual(noted)
        before, sinks = tiers.num_before_residual, tiers.sinks
        if first_time and config.num_sink_tokens:
            sinks = SinkTokens.of(residual.block, config.num_sink_tokens, padding)
        elif sinks is not None and padding is not None and noted is not None:
            sinks = sinks.renewed(residual.block, before, noted)
        start = sinks.num_leading if first_time and sinks is not None else 0
        unit = self._unit(first_time)
        started = time.perf_counter()
        stop = start + (residual.num_tokens - start - config.residual_length) // unit * unit
        old, real = residual.slice(start, stop), None
        if padding is not None:
            real = (torch.arange(start, stop, dtype=torch.int64, device="cpu") >= padding[:, None]).to(old.keys.device)
            old = without_padding(old, real)

        def observe(first: int, last: int) -> Observed:
            rotation = tiers.positions.range(start + first, start + last)
            queries, distances = tiers.queries.sample(before + start + first, last - first)
            hidden = None if padding is None else (padding - start - first).clamp(0, last - first)
            return Observed(rotation, queries, distances, hidden)

        cold = list(tiers.cold)
        with no_autocast(old.keys.device):
            blocks = Sealing(self._codec, old, real, observe, unit, config.block_size, cold).run()
        rest, positions = residual.copy(stop, residual.num_tokens), copy(tiers.positions)
        positions.drop(stop)
        tally = tiers.tally.add(blocks, config.block_size, time.perf_counter() - started)
        # The sinks are final once the first tokens of every row are sealed.
        has_late_rows = noted is not None and bool((noted >= before + stop).any())
        self._unsettle()
        self._tiers = Tiers(
            sinks, cold, rest, noted if has_late_rows else None, positions, newest=tiers.newest, tally=tally
        )
        released(old.keys.nbytes + old.values.nbytes)

    def crop(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens. Sealed blocks are cut, not encoded again.

        Raises:
            InvalidArgumentError: ``num_tokens`` is negative, or more than the layer has.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise InvalidArgumentError(f"crop keeps between 0 and the {self.num_tokens} tokens held, got {num_tokens}")
        if num_tokens == self.num_tokens or self._tiers.residual is None:
            return
        if num_tokens == 0:
            self.reset()
            return
        self._note_steps()
        self._unsettle()
        if self._tiers.sinks is not None and num_tokens < self._tiers.sinks.block.num_tokens:
            keys, values = self.reconstruct()
            residual = ResidualBuffer(keys[..., :num_tokens, :].clone(), values[..., :num_tokens, :].clone())
            self._codec.reset()
            padding, places = self._tiers.padding, self._tiers.sinks.positions
            if padding is None:
                padding = (
                    torch.zeros(len(keys), dtype=torch.int64, device="cpu") if places is None else places[:, 0].cpu()
                )
            self._tiers = Tiers(residual=residual, padding=padding_within(padding, num_tokens))
            return
        cropped = self._tiers.crop(num_tokens)
        if num_tokens < self._tiers.num_before_residual:
            self._codec.forget()
        self._tiers = cropped

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` (index, repeat, move) along the batch dimension of all tensors."""
        if self.is_empty:
            return
        self._note_steps()
        self._unsettle()
        function = _once_each(function)
        mapped = self._tiers.map_batch(function)
        try:
            self._codec.map_batch(function)
            self._tiers = mapped
        except BaseException:
            self._codec.forget()  # its state may be of the old rows or of the new ones
            raise

    # Storing

    def to_fields(self) -> dict[str, Field]:
        """The contents of this layer, which must not be empty, without the budget that layers share."""
        self._note_steps()
        return {
            "tokens": self._tiers.to_fields(),
            "sealer": self._codec.to_fields(),
            "num_attention_heads": self._num_attention_heads,
        }

    def restore(self, fields: Fields) -> None:
        """Restore the contents that ``to_fields`` of a layer with the same config returned.

        Raises:
            LoadError: a field is missing, or does not fit the others.
        """
        tiers = Tiers.from_fields(fields.sub("tokens"))
        self._codec.restore(fields.sub("sealer"), tiers.shape)
        num_attention_heads = fields.integer("num_attention_heads", 1) if fields.has("num_attention_heads") else None
        self._unsettle()
        self._tiers, self._num_attention_heads = tiers, num_attention_heads

    # Counting

    def stats(self, shared: SharedBytes | None = None) -> LayerStats:
        """Tokens, bytes, ranks and errors of this layer; without the bytes already counted in ``shared``."""
        tiers, step = self._tiers, self.step
        is_in_ring = tiers.residual is not None and step is not None and step.holds(tiers.residual)
        # A ring that waits for the residual is room alone.
        room = 0 if step is None or is_in_ring else step.ring_bytes
        if tiers.residual is None:
            room += 0 if step is None else step.other_bytes
            return LayerStats(kind="spectral", num_tokens=0, residual_bytes=room, room_bytes=room)
        shared = SharedBytes() if shared is None else shared
        noted = tiers.queries.nbytes + (0 if tiers.padding is None else shared.of([tiers.padding]))
        noted += 0 if step is None else step.other_bytes
        counted = count(
            tiers.sinks, tiers.cold, tiers.residual, tiers.positions, self._codec.nbytes, noted, tiers.tally, shared
        )
        return replace(counted, residual_bytes=counted.residual_bytes + room, room_bytes=counted.room_bytes + room)

    # Compiled steps

    def _unsettle(self) -> None:
        """No step may use the buffers until the layer settles again."""
        if self.step is not None:
            self.step.is_ready = False

    def _settle(self) -> None:
        """Bring the residual and the places of all blocks into the buffers that a step uses."""
        step, tiers = self.step, self._tiers
        if step is None or step.is_ready or tiers.residual is None:
            return
        if tiers.padding is not None and bool((tiers.padding >= self.num_tokens).any()):
            return  # the mask of a later pass says where these rows begin
        block, num_exact = tiers.residual.block, tiers.residual.num_tokens
        missing = self._num_missing
        if not missing:
            return
        usual = self.config.residual_length + self.config.num_sink_tokens
        step.fit(block.keys, block.values, max(num_exact + missing, usual + STEP_UNIT))
        step.due = num_exact + missing
        wants_queries = self.uses_queries and self._codec.wants_queries
        step.fit_queries(self._num_attention_heads if wants_queries else None)
        step.place_sinks(None if tiers.sinks is None else tiers.sinks.positions)
        if not step.holds(tiers.residual):
            tiers.residual = step.hold(tiers.residual, self.num_tokens)
        first: list[Block] = [] if tiers.sinks is None else [tiers.sinks.block]
        step.describe([*first, *tiers.cold])
        tiers.newest = 1  # from here on
        step.is_ready = True

    def _note_steps(self) -> None:
        """Note the positions and queries of the tokens that steps have appended to the ring."""
        step, tiers = self.step, self._tiers
        if step is None or tiers.residual is None or not self.uses_queries:
            return
        missing = tiers.residual.num_tokens - tiers.positions.num_tokens
        if missing <= 0:
            return
        tiers.positions.go_on(missing)
        if step.queries is not None:
            tiers.queries.note_each(*step.last_queries(self.num_tokens, missing, self._num_missing))

    # Inside

    def _padding_of_residual(self, noted: Tensor | None) -> Tensor | None:
        """How many tokens of the residual are padding, ``[B]`` on the CPU; None if none are and no row has yet to
        begin."""
        if noted is None or self._tiers.residual is None:
            return None
        padding = noted - self._tiers.num_before_residual
        is_any = padding > 0 if not self.is_sealed else padding >= 0
        return padding.clamp(0, self._tiers.residual.num_tokens) if bool(is_any.any()) else None

    def _unit(self, is_first: bool) -> int:
        """The tokens to seal are a multiple of this."""
        return self._codec.unit(is_first, sum(block.num_tokens for block in self._tiers.cold))

    @property
    def _num_missing(self) -> int:
        """Tokens still to come before the next sealing; 0 if it is due."""
        if self._tiers.residual is None:
            return 0
        num_exact = self.config.residual_length + (0 if self.is_sealed else self.config.num_sink_tokens)
        old, unit = self._tiers.residual.num_tokens - num_exact, self._unit(True)
        # A prefill is recognised by many tokens that come at once, in one piece or several.
        is_prefill = not self.is_sealed and self._tiers.newest >= unit
        return 0 if is_prefill and old >= unit else max(0, self._unit(False) - old)


def _once_each(function: TensorFunction) -> TensorFunction:
    """``function``, called once per tensor, so that a tensor shared before is shared afterwards."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def mapped(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            # The tensor is stored too, so that no other one gets its id.
            done[id(tensor)] = tensor, function(tensor)
        return done[id(tensor)][1]

    return mapped
