"""A step of decoding as two operators of torch, which a compiled graph can contain: ``append`` and ``attend``.

What changes from step to step, counts and places of blocks, they read from tensors that keep their addresses: see
``cache.step_buffers``. So a graph neither depends on numbers of tokens nor waits for the device.
"""

import torch
from torch import Tensor

from unsloth_spectral.attention import cpu
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.native import library

torch.library.define(
    "unsloth_spectral::append",
    "(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) counts, Tensor new_keys, Tensor new_values) -> ()",
)
torch.library.define(
    "unsloth_spectral::attend",
    "(Tensor query, Tensor keys, Tensor values, Tensor counts, Tensor directory, Tensor? mask, Tensor? sink_logits, "
    "float scaling, float? softcap) -> Tensor",
)


def append(keys: Tensor, values: Tensor, counts: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """Write the newest tokens ``[B, H, n, head_dim]`` into the ring ``keys`` and ``values``, and count them.

    Raises:
        IndexError or RuntimeError: the ring has no room; nothing is counted.
    """
    torch.ops.unsloth_spectral.append(keys, values, counts, new_keys, new_values)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    directory: Tensor,
    mask: Tensor | None,
    options: ScoreOptions,
) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over the blocks of ``directory``, in the query's dtype.

    ``mask`` is ``[B or 1, 1, Q, n]``, bool or additive, in the order of the blocks, for at least as many tokens as
    there are; None hides nothing. Returns ``[B, Q, num_attention_heads, value head_dim]``.
    """
    output: Tensor = torch.ops.unsloth_spectral.attend(
        query, keys, values, counts, directory, mask, options.sink_logits, options.scaling, options.softcap
    )
    return output


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why steps with queries in ``dtype`` on ``device``, of ``head_dim``, cannot be compiled; None where they can."""
    return cpu.obstacle_of(device, dtype, head_dim) or library.obstacle()


@torch.library.register_fake("unsloth_spectral::append")  # type: ignore[untyped-decorator]
def _(keys: Tensor, values: Tensor, counts: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    return None


@torch.library.register_fake("unsloth_spectral::attend")  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    directory: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    batch, num_heads, query_length, _ = query.shape
    return query.new_empty(batch, query_length, num_heads, values.shape[-1])


def _append(keys: Tensor, values: Tensor, counts: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    # An index beyond the end raises, so that a full ring is refused and nothing is counted.
    places = counts[:1] + torch.arange(new_keys.shape[2], dtype=torch.int64, device="cpu")
    keys.index_copy_(2, places, new_keys.to(keys.dtype))
    values.index_copy_(2, places, new_values.to(values.dtype))
    counts += new_keys.shape[2]


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    directory: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    options = ScoreOptions(scaling=scaling, softcap=softcap, sink_logits=sink_logits)
    ring = ExactBlock(keys, values)
    output = cpu.attend_to_places(query, directory, ring, counts, mask, options).to(query.dtype)
    return output.transpose(1, 2).contiguous()


torch.library.impl("unsloth_spectral::append", "CPU", _append)
torch.library.impl("unsloth_spectral::attend", "CPU", _attend)
