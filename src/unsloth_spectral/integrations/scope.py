"""``with spectral(model):``, the patch for a scope."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.integrations.huggingface.support import check_model, unwrapped
from unsloth_spectral.integrations.options import config_of
from unsloth_spectral.integrations.patching import scoped


@contextmanager
def spectral(
    model: PreTrainedModel, *, preset: str | None = None, config: CodecConfig | None = None
) -> Iterator[PreTrainedModel]:
    """Within the scope every ``model.generate(...)`` gets a fresh spectral cache; afterwards the model is as before.

    Scopes nest, and a scope within ``patch_unsloth_attention`` restores that patch. Threads and tasks may each open
    scopes with their own options on one model; a thread without a scope follows the scope opened last. A cache made in
    the scope is read by the model's spectral attention function, so it cannot be used after the scope.

    Args:
        model: a decoder-only transformers model; also the value of the ``with`` statement.
        preset: ``"quality"``, ``"balanced"`` (the default), ``"small"`` or ``"tiny"``, in place of a ``config``.
        config: bits or ranks, block size and exact tiers.

    Raises:
        InvalidArgumentError: an option is out of its range, or both are given.
        UnsupportedModelError: the model cannot carry a spectral cache; the message says what is supported.
    """
    chosen = config_of(config, preset=preset)
    inner = unwrapped(model)
    check_model(inner, chosen)
    with scoped(inner, chosen):
        yield model
