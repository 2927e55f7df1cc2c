"""The residual of a layer's cache, its newest tokens: an exact buffer that grows in place."""

import torch
from torch import Tensor

from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.tensors import TensorFunction, storage_bytes
from unsloth_spectral.errors import InvalidArgumentError

# The buffer grows by this many tokens at a time, so that a decode step writes one token instead of copying the whole
# residual. Unused tokens are counted as stored.
_SPARE_TOKENS = 32


class ResidualBuffer:
    """Keys and values ``[B, H, num_tokens, head_dim]``, newest last, in the model's dtype.

    Args:
        keys, values: the tokens or, with ``counts``, room for them.
        counts: a tensor whose first number is that of the tokens, for a buffer that a compiled step appends to.
    """

    def __init__(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        self._keys, self._values, self._counts = keys, values, counts
        self._num_tokens = keys.shape[-2]

    @property
    def num_tokens(self) -> int:
        return self._num_tokens if self._counts is None else int(self._counts[0])

    def lies_in(self, keys: Tensor) -> bool:
        """True if the keys are in ``keys``, which a compiled step appends to."""
        return self._counts is not None and self._keys is keys

    @property
    def nbytes(self) -> int:
        return storage_bytes(self._keys, self._values)

    @property
    def block(self) -> ExactBlock:
        """The tokens as a block, without a copy; valid until the next change."""
        return self.slice(0, self.num_tokens)

    def slice(self, start: int, stop: int) -> ExactBlock:
        """Tokens ``start`` to ``stop`` as views."""
        return ExactBlock(self._keys, self._values).slice(start, stop)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the newest tokens."""
        start = self.num_tokens
        stop = start + keys.shape[-2]
        if self._counts is not None or stop > self._keys.shape[-2] or self._is_frozen():
            grown_keys, grown_values = self._grown(self._keys, stop), self._grown(self._values, stop)
            self._keys, self._values, self._counts, self._num_tokens = grown_keys, grown_values, None, start
        self._keys[..., start:stop, :] = keys
        self._values[..., start:stop, :] = values
        self._num_tokens = stop

    def copy(self, start: int, stop: int) -> "ResidualBuffer":
        """A buffer of tokens ``start`` to ``stop`` alone, so that the bytes of the others can be freed."""
        block = self.slice(start, stop).map_batch(torch.clone)
        return ResidualBuffer(block.keys, block.values)

    def map_batch(self, function: TensorFunction) -> "ResidualBuffer":
        """A buffer with ``function`` applied along the batch dimension."""
        mapped = self.block.map_batch(function)
        return ResidualBuffer(mapped.keys, mapped.values)

    def _grown(self, tensor: Tensor, num_tokens: int) -> Tensor:
        shape = (*tensor.shape[:-2], num_tokens + _SPARE_TOKENS, tensor.shape[-1])
        grown = tensor.new_empty(shape)
        grown[..., : self.num_tokens, :] = tensor[..., : self.num_tokens, :]
        return grown

    def _is_frozen(self) -> bool:
        # A tensor made under inference_mode may not be written to outside it.
        return self._keys.is_inference() and not torch.is_inference_mode_enabled()


def check_tokens(keys: Tensor, values: Tensor, config: CodecConfig, earlier: ExactBlock | None) -> None:
    """Check that new keys and values fit each other, ``config`` and the ``earlier`` tokens.

    Raises:
        InvalidArgumentError: they do not fit; the message has the shapes.
    """
    if keys.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
        raise InvalidArgumentError(
            "keys and values must both be (batch, num_key_value_heads, seq_len, head_dim), "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if earlier is None:
        config.check_head_dim(min(keys.shape[-1], values.shape[-1]))
        return
    for name, new, old in (("keys", keys, earlier.keys), ("values", values, earlier.values)):
        if (*new.shape[:2], new.shape[3]) != (*old.shape[:2], old.shape[3]):
            raise InvalidArgumentError(
                f"this cache holds {old.shape[0]} sequences of {old.shape[1]} heads with head_dim {old.shape[3]}, "
                f"got {name} of shape {tuple(new.shape)}: use a fresh cache for another batch or model"
            )
