"""The attention function that models call by name while they are switched."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from unsloth_spectral.attention import dispatch, steps
from unsloth_spectral.attention.scores import ScoreOptions, causal_mask
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.sink_tokens import copies_first
from unsloth_spectral.cache.step_buffers import StepBuffers
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.errors import SpectralError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall
from unsloth_spectral.integrations.huggingface.handle import CompressedStates
from unsloth_spectral.integrations.huggingface.rotary import rotation_of
from unsloth_spectral.integrations.huggingface.visible import visible_through


def attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over tensors or over a spectral layer, with transformers' signature.

    ``query`` is ``(batch, num_attention_heads, query_length, head_dim)``; ``key`` and ``value`` are tensors or the
    handles of a spectral layer, which is sealed afterwards: a prefill is attended to exactly, then compressed. The mask
    is bool, ``(batch, 1, query_length, kv_length)``, or None for causal. Returns ``(batch, query_length,
    num_attention_heads, head_dim)``.

    Raises:
        UnsupportedModelError: the model asks for a position bias.
        SpectralError: attention weights are requested, or attention dropout in a case that torch's SDPA cannot serve.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a position bias to its scores, which a spectral cache does not"
        )
    options = ScoreOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )
    if not isinstance(key, CompressedStates):
        return _attend_dense(module, query, ExactBlock(key, value), attention_mask, options, dropout, kwargs), None
    if kwargs.get("output_attentions"):
        raise SpectralError(
            "output_attentions=True asks for attention weights, which a spectral cache does not make: call "
            'unpatch_unsloth_attention(model) and model.set_attn_implementation("eager") for them'
        )
    if key.step is not None:
        return _attend_in_step(query, key, key.step, attention_mask, options), None
    return _attend_layer(module, query, key, attention_mask, options, kwargs), None


def _attend_in_step(
    query: Tensor, key: CompressedStates, step: StepBuffers, mask: Tensor | None, options: ScoreOptions
) -> Tensor:
    """Attention of one query in each row, by operators that a compiled graph can contain."""
    if mask is not None and mask.shape[-1] < step.max_length:
        # The operator takes a column for every token that there may be.
        hidden = False if mask.dtype == torch.bool else -torch.inf
        mask = torch.nn.functional.pad(mask, (0, step.max_length - mask.shape[-1]), value=hidden)
    if step.sink_places is not None:
        if mask is None:
            mask = torch.ones(len(query), 1, 1, step.max_length, dtype=torch.bool, device=query.device)
        mask = copies_first(mask, step.sink_places)
    if not key.was_read:
        step.note_query(query.detach() * options.scaling)
        key.was_read = True
    output = steps.attend(query, step.keys, step.values, step.counts, step.directory, mask, options)
    if key.seal_after and not torch.compiler.is_compiling():
        key.layer.seal()
    return output


# It also runs uncompiled within a compiled forward: a graph would fix values that change from token to token, and use
# the kernel's pointers after their tensors are freed.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_layer(
    module: nn.Module,
    query: Tensor,
    key: CompressedStates,
    attention_mask: Tensor | None,
    options: ScoreOptions,
    kwargs: dict[str, Any],
) -> Tensor:
    layer = key.layer
    if not key.was_read:
        _observe(key.call, query, attention_mask, options, layer)
        key.was_read = True
    query_length = query.shape[2]
    if attention_mask is None and query_length > 1 and (layer.is_sealed or query_length < layer.num_tokens):
        # If there are fewer queries than keys, torch's SDPA assumes the first tokens' queries, not the newest.
        attention_mask = causal_mask(query_length, layer.num_tokens, query.device)
    if layer.is_sealed:
        output = _attend_blocks(query, layer.blocks, layer.arrange_mask(attention_mask), options)
    else:
        # All tokens are exact and in one block: with the model's own arithmetic, short contexts give unchanged results.
        dense = ExactBlock(*layer.blocks[0].reconstruct())
        output = _attend_dense(module, query, dense, attention_mask, options, 0.0, kwargs)
    if key.seal_after:
        layer.seal()
    return output


def _observe(
    call: AttentionCall | None, query: Tensor, mask: Tensor | None, options: ScoreOptions, layer: SpectralLayer
) -> None:
    """Tell ``layer`` the padding, positions and queries of its newest tokens."""
    padding, asking, length = None, None, query.shape[2]
    # While decoding, the mask adds nothing once the text of every row has begun.
    if length > 1 or layer.awaits_rows:
        visible = visible_through(mask, len(query))
        layer.note_padding(visible.first)
        padding = (visible.first - (layer.num_tokens - length)).clamp(0, length)
        padding, asking = padding if bool(padding.any()) else None, visible.asking
    if layer.uses_queries:
        rotation = rotation_of(call, query.shape[-1], padding)
        layer.observe(query.detach(), rotation, options.scaling, asking)


def _attend_dense(
    module: nn.Module,
    query: Tensor,
    dense: ExactBlock,
    mask: Tensor | None,
    options: ScoreOptions,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    if options.softcap is None and options.sink_logits is None:
        return sdpa_attention_forward(
            module, query, dense.keys, dense.values, mask, dropout=dropout, scaling=options.scaling, **kwargs
        )[0]
    if dropout:
        raise SpectralError(
            f"{type(module).__name__} wants attention dropout ({dropout}) together with a soft cap or sink logits, "
            "which the spectral attention function does not offer: call unpatch_unsloth_attention(model) before "
            "training"
        )
    if mask is None and query.shape[2] > 1:
        mask = causal_mask(query.shape[2], dense.num_tokens, query.device)
    return _attend_blocks(query, [dense], mask, options)


def _attend_blocks(query: Tensor, blocks: list[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    return dispatch.attend(query, blocks, mask, options).transpose(1, 2).contiguous()
