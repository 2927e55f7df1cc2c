"""Replacements for the methods of a switched model that would bypass its spectral cache."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.forward_check import bypassed
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_in


def prepare_inputs(
    model: PreTrainedModel, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``prepare_inputs_for_generation``, which keeps a spectral cache that the original drops.

    Phi-3 and its relatives rotate keys by other factors once a text exceeds ``original_max_position_embeddings``.
    transformers then drops the cache and reads the text again; here that pass refills the same cache.

    Raises:
        CacheBypassedError: the cache is dropped, but part of the text is not available to be read again.
    """
    cache = cache_in(kwargs)
    if hasattr(cache, "prepare_step"):
        # Without a length, the whole text is given, of which the cache may hold a part; it counts what it receives.
        cache.prepare_step(kwargs.get("next_sequence_length") or 1)
    inputs = original(input_ids, *args, **kwargs)
    if not hasattr(cache, "begin_pass") or cache_in(inputs) is cache or not kwargs.get("use_cache", True):
        return inputs
    if cache_in(inputs) is not None:
        bypassed(model, original, cache, "took another cache for")
        return inputs
    num_held, num_given, mask = cache.get_seq_length(), input_ids.shape[1], kwargs.get("attention_mask")
    # A mask covers the whole text. Without one, generate gives the number of new tokens only if it has the whole text.
    is_whole = num_held == 0 or kwargs.get("next_sequence_length") is not None
    if isinstance(mask, Tensor):
        is_whole = num_given >= mask.shape[-1]
    if is_whole and _num_read(inputs) < num_given:
        # The code of Phi-4-multimodal, and of Phi-3 in the first supported releases, continues with the newest only.
        inputs = original(input_ids, *args, **{**kwargs, "next_sequence_length": None})
    if not is_whole or _num_read(inputs) < num_given:
        raise CacheBypassedError(
            f"{type(model).__name__}: transformers drops the {num_held} tokens of the cache to read the text again, "
            f"but has only {_num_read(inputs)} newer tokens: give generate the whole text, without prefill_chunk_size"
        )
    cache.reset()
    return {**inputs, **cache_argument(cache)}


def _num_read(inputs: dict[str, Any]) -> int:
    embeddings, ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
    tokens = ids if embeddings is None else embeddings
    return 0 if tokens is None else int(tokens.shape[1])


def refuse_batching(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    """``generate_batch`` and the method beneath it.

    Raises:
        CacheBypassedError: always.
    """
    raise CacheBypassedError(
        f"{type(model).__name__}: {original.__name__} keeps keys and values in pages of its own, not in a cache: call "
        "generate, or call unpatch_unsloth_attention(model) first"
    )
