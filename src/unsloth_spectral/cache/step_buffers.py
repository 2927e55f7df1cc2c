"""What a step of decoding reads and writes of one layer, at fixed addresses, so that a compiled graph stays valid."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.cache.queries import DECODE_STRIDE, DECODE_WINDOW
from unsloth_spectral.cache.residual import ResidualBuffer
from unsloth_spectral.codec.block import Block

STEP_UNIT = 32  # the ring has room for a multiple of so many tokens

_FEWEST_PLACES = 16  # of blocks, in a directory

# Returns where blocks of a shape (batch, heads, key and value dimensions) lie, ``[n, m]`` uint8, and tensors to keep
# that these places point to.
Places = Callable[[Sequence[Block], tuple[int, int, int, int]], tuple[Tensor, list[Tensor]]]


class StepBuffers:
    """A ring of the layer's newest tokens, counts, and a directory that says where its other tokens lie.

    A step changes the ring and the counts in place. Between steps, a sealing moves tokens out of the ring and writes
    the directory anew. All tensors keep their addresses until the batch or a need for more room changes their sizes.

    Attributes:
        places_of: describes where blocks lie.
        max_length: the most tokens that the layer may have, which is the length of masks.
        is_ready: whether a step may use these buffers: they hold what the layer holds.
        due: the number of tokens in the ring at which the layer has tokens to seal.
        keys, values: ``[B, H, capacity, head_dim]``, the newest tokens from place 0 on.
        counts: ``[2]`` int64: tokens in the ring, tokens in the layer.
        directory: ``[n, m]`` uint8, where the layer's other blocks lie, and zeros behind.
        sink_places: ``[B, S]`` int64, the columns of a mask for the first blocks' tokens, where these are copies of
            tokens stored elsewhere; None where they are not.
        queries: ``[B, num_attention_heads, 32, D]`` float16, the last of every four queries, scaled; None if none are
            needed.
        held: tensors that the directory points to and no block has.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    directory: Tensor

    def __init__(self, places_of: Places, max_length: int) -> None:
        self.places_of, self.max_length = places_of, max_length
        self.is_ready, self.due = False, 0
        self.is_made = False
        self.sink_places: Tensor | None = None
        self.queries: Tensor | None = None
        self.held: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepBuffers":
        # Empty: the directory would point into the original.
        return StepBuffers(self.places_of, self.max_length)

    @property
    def ring_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_made else 0

    @property
    def other_bytes(self) -> int:
        """Bytes beside those of the ring."""
        if not self.is_made:
            return 0
        optional = [tensor for tensor in (self.sink_places, self.queries) if tensor is not None]
        return sum(tensor.nbytes for tensor in (self.counts, self.directory, *optional, *self.held))

    def fit(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Make the ring, unless it serves tokens like these and has room for ``capacity``."""
        capacity = -(-capacity // STEP_UNIT) * STEP_UNIT
        if self.is_made and all(
            (*ring.shape[:2], ring.shape[3]) == (*side.shape[:2], side.shape[3])
            and (ring.dtype, ring.device) == (side.dtype, side.device)
            and ring.shape[2] >= capacity
            for ring, side in ((self.keys, keys), (self.values, values))
        ):
            return
        # A tensor made under inference_mode may not be written to outside it.
        with torch.inference_mode(False):
            rings = [
                fixed(torch.zeros((*side.shape[:2], capacity, side.shape[3]), dtype=side.dtype, device=side.device))
                for side in (keys, values)
            ]
            self.counts = fixed(torch.zeros(2, dtype=torch.int64, device=keys.device))
            self.directory = torch.zeros(0, 0, dtype=torch.uint8, device=keys.device)
        self.queries = None
        self.keys, self.values = rings
        self.is_made = True

    def fit_queries(self, num_heads: int | None) -> None:
        """Make room for the queries of ``num_heads``; None for no queries."""
        if num_heads is None:
            self.queries = None
        elif self.queries is None or self.queries.shape[1] != num_heads:
            shape = (len(self.keys), num_heads, DECODE_WINDOW // DECODE_STRIDE, self.keys.shape[-1])
            with torch.inference_mode(False):
                self.queries = fixed(torch.zeros(shape, dtype=torch.float16, device=self.keys.device))

    def note_query(self, query: Tensor) -> None:
        """Note the scaled ``query [B, num_attention_heads, 1, D]`` of the newest token, in place of the one of the
        token before if that is of the same four."""
        if self.queries is not None:
            place = (self.counts[1:] - 1) // DECODE_STRIDE % self.queries.shape[2]
            self.queries.index_copy_(2, place, query.to(self.queries.dtype))

    def last_queries(self, num_tokens: int, count: int, missing: int) -> tuple[Tensor, Tensor]:
        """The noted queries of the newest ``count`` of ``num_tokens`` tokens, and the ``[n]`` positions of theirs.

        As a ``QuerySampler`` notes them: none long before the next sealing, up to which ``missing`` tokens are to come.
        """
        assert self.queries is not None
        first = max(num_tokens - count, num_tokens + missing - DECODE_WINDOW)
        positions = torch.arange(min(first, num_tokens), num_tokens, dtype=torch.int64, device="cpu")
        positions = positions[positions % DECODE_STRIDE == DECODE_STRIDE - 1]
        places = positions // DECODE_STRIDE % self.queries.shape[2]
        return self.queries[:, :, places.to(self.queries.device)], positions

    def place_sinks(self, places: Tensor | None) -> None:
        """Take ``places`` as ``sink_places``."""
        if places is None or self.sink_places is None or self.sink_places.shape != places.shape:
            with torch.inference_mode(False):
                self.sink_places = None if places is None else fixed(places.clone())
        else:
            self.sink_places.copy_(places)

    def describe(self, blocks: Sequence[Block]) -> None:
        """Write where ``blocks``, all but the ring, lie."""
        batch, num_heads, _, key_dim = self.keys.shape
        places, held = self.places_of(blocks, (batch, num_heads, key_dim, self.values.shape[-1]))
        # One without places has the width of an entry too.
        if len(places) > len(self.directory) or not self.directory.numel():
            room = max(_FEWEST_PLACES, 2 * len(places))
            with torch.inference_mode(False):
                empty = torch.zeros((room, places.shape[1]), dtype=torch.uint8, device=self.directory.device)
            self.directory = fixed(empty)
        self.directory[: len(places)].copy_(places)
        self.directory[len(places) :].zero_()
        self.held = held

    def holds(self, residual: ResidualBuffer) -> bool:
        """True if the tokens of ``residual`` are those in the ring."""
        return self.is_made and residual.lies_in(self.keys)

    def hold(self, residual: ResidualBuffer, num_tokens: int) -> ResidualBuffer:
        """Copy the tokens of ``residual`` into the ring, of a layer of ``num_tokens``; returns them there."""
        block, count = residual.block, residual.num_tokens
        self.keys[..., :count, :] = block.keys
        self.values[..., :count, :] = block.values
        self.counts.copy_(torch.tensor([count, num_tokens], dtype=torch.int64, device="cpu"))
        return ResidualBuffer(self.keys, self.values, self.counts)


def fixed(tensor: Tensor) -> Tensor:
    """``tensor``, marked as one that keeps its address."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
