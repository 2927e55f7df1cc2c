"""The one line: ``patch_unsloth_attention(model)``, for Unsloth and plain Hugging Face models alike."""

from torch import nn

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.integrations.huggingface.support import unwrapped
from unsloth_spectral.integrations.options import config_of
from unsloth_spectral.integrations.patching import patch, unpatch


def patch_unsloth_attention(
    model: nn.Module,
    block_size: int | None = None,
    k_rank_keys: int | None = None,
    k_rank_values: int | None = None,
    *,
    preset: str | None = None,
    config: CodecConfig | None = None,
) -> None:
    """Give every later ``model.generate(...)`` call a fresh spectral cache, without another change of code.

    A call with its own cache, with a ``cache_implementation`` or with ``use_cache=False`` is not changed. (Unsloth's
    models name a ``cache_implementation`` in every call; it is overruled.) Patching again only changes the options;
    within a scope, that scope's. With a rank the rank codec runs, otherwise the spectral codec, ``"balanced"`` by
    default.

    A model that Unsloth has loaded generates on transformers' code, off Unsloth's fast path, and trains as before. If a
    step of ``generate`` still does not reach the cache, it raises ``CacheBypassedError``, which names the path and the
    fix. So does ``generate_batch``, which uses no cache.

    Args:
        model: a decoder-only transformers model, Unsloth's or PEFT's wrapper around it, patched before or after
            ``get_peft_model``.
        block_size: tokens sealed together, 512 if not given.
        k_rank_keys, k_rank_values: singular vectors kept per block and head; 16 and 32 if only the other is given.
        preset: ``"quality"``, ``"balanced"``, ``"small"`` or ``"tiny"``.
        config: all options, in place of the others.

    Raises:
        InvalidArgumentError: an option is out of its range, or given together with another that excludes it.
        UnsupportedModelError: the model cannot carry a spectral cache; the message says what is supported.
    """
    ranks = {"rank_keys": k_rank_keys, "rank_values": k_rank_values}
    patch(unwrapped(model), config_of(config, preset=preset, block_size=block_size, **ranks))


def unpatch_unsloth_attention(model: nn.Module) -> None:
    """Undo ``patch_unsloth_attention`` and the switch by ``SpectralCache(model)``; harmless on any other model.

    Running calls and scopes of other threads are not affected. Within a scope, it undoes that scope alone.
    """
    unpatch(unwrapped(model))
