"""The one line: ``patch_unsloth_attention(model)``, for Unsloth and plain Hugging Face models alike."""

from typing import Any

from transformers import PreTrainedModel

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.support import check_model
from unsloth_spectral.integrations.huggingface.switch import disable, enable

_WRAPPED = "_prepare_cache_for_generation"


def patch_unsloth_attention(
    model: PreTrainedModel, block_size: int = 512, k_rank_keys: int = 16, k_rank_values: int = 32
) -> None:
    """Give every ``model.generate(...)`` call from now on a fresh spectral cache, with no other change of code.

    A call that brings its own ``past_key_values``, or ``use_cache=False``, is left alone. Patching again only changes
    the options.

    Args:
        model: a decoder-only transformers model that uses the AttentionInterface.
        block_size: tokens sealed together.
        k_rank_keys, k_rank_values: singular vectors kept per block and head.

    Raises:
        InvalidArgumentError: an option is out of its range.
        UnsupportedModelError: the model cannot carry a spectral cache; names it and what is supported.
    """
    config = SpectralConfig(rank_keys=k_rank_keys, rank_values=k_rank_values, block_size=block_size)
    check_model(model, config)
    enable(model)
    # Looked up on the class: patching twice must wrap the model's own method, not the first wrapper.
    original = getattr(type(model), _WRAPPED)

    def prepare_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        own_cache = model_kwargs.get("past_key_values") is not None
        if not own_cache and generation_config.use_cache is not False:
            enable(model)
            cache = SpectralCache(model, config=config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return None
        return original(model, generation_config, model_kwargs, *args, **kwargs)

    setattr(model, _WRAPPED, prepare_cache)


def unpatch_unsloth_attention(model: PreTrainedModel) -> None:
    """Undo ``patch_unsloth_attention`` and what ``SpectralCache(model)`` switched; harmless on any other model."""
    vars(model).pop(_WRAPPED, None)
    disable(model)
