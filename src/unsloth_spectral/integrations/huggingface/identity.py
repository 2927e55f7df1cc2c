"""The identity of a model: everything its keys and values depend on, so that no other model reads its cache."""

import hashlib
import json
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.integrations.huggingface.weights import (
    described,
    plain_tensors,
    sample,
    stored_tensors,
    version,
)

Identity: TypeAlias = dict[str, Any]

# Settings of every configuration, and settings of text and training: they change no key and no value.
_IRRELEVANT = (set(PreTrainedConfig().to_dict()) - {"model_type"}) | {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "use_cache",
}
# Digests, with the words for a difference in each.
_WEIGHTS = {
    "embedding": "its token embedding",
    "first_attention": "the first layer's attention weights, the key projection among them,",
    "sample": "a sample of all its weights",
}
_SAMPLES = 64  # elements of each weight

# Cached identities, each with the state of the model at that time.
_known: "WeakKeyDictionary[PreTrainedModel, tuple[Any, Identity]]" = WeakKeyDictionary()


def identify(model: PreTrainedModel) -> Identity:
    """``model`` as plain data for JSON: its dtype and configuration, and SHA-256 digests of its weights.

    There are digests of the token embedding, of the first layer's attention (its key projection, fused or not), and of
    a sample of every weight together with the active adapters. So a fine-tuned model has another identity.

    Raises:
        UnsupportedModelError: weights are offloaded, or of a class that cannot be read.
    """
    state = _state(model)
    if model in _known and _known[model][0] == state:
        return _known[model][1]
    config = model.config.get_text_config(decoder=True).to_dict()
    relevant = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    first = next(module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int))
    identity = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": json.loads(json.dumps(relevant, default=str)),
    }
    try:
        identity["embedding"] = _digest(model.get_input_embeddings())
        identity["first_attention"] = _digest(first)
        identity["sample"] = _sample(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be recognised, so nothing can be saved for it: {error}"
        ) from error
    _known[model] = state, identity
    return identity


def difference(stored: Identity, model: PreTrainedModel) -> str | None:
    """The first difference between ``model`` and the ``stored`` identity, in a few words; None where they are equal."""
    present = identify(model)
    pairs = {**_flat(stored.get("config"), present["config"]), "dtype": (stored.get("dtype"), present["dtype"])}
    changed = sorted(name for name, (stored_value, value) in pairs.items() if stored_value != value)
    if changed:
        stored_value, value = pairs[changed[0]]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{changed[0]} is {stored_value} there and {value} here{more}"
    return next((f"{words} differ{'s' * (name != 'first_attention')}" for name, words in _WEIGHTS.items()
                 if stored.get(name) != present[name]), None)  # fmt: skip


def _flat(stored: Any, present: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Pairs of stored and present settings by their dotted names."""
    pairs: dict[str, tuple[Any, Any]] = {}
    if isinstance(stored, dict) and isinstance(present, dict):
        for name in {**stored, **present}:
            pairs.update(_flat(stored.get(name), present.get(name), f"{prefix}.{name}" if prefix else name))
        return pairs
    return {prefix: (stored, present)}


def _state(model: PreTrainedModel) -> Any:
    weights = [version(weight) for weight in (*model.parameters(), *model.buffers())]
    return weights, json.dumps(model.config.to_dict(), default=str), _adapters(model)


def _adapters(model: nn.Module) -> list[str]:
    """The active adapters by PEFT's layers, whose weights stay in place while an adapter is inactive."""
    layers = [module for module in model.modules() if hasattr(module, "disable_adapters")]
    return sorted({f"{getattr(layer, 'active_adapters', None)} {layer.disable_adapters}" for layer in layers})


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, weight in stored_tensors(module):
        digest.update(described(weight).encode())
        for tensor in plain_tensors(weight):
            digest.update(raw_bytes(tensor.cpu().contiguous()))
    return digest.hexdigest()


def _sample(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(json.dumps(_adapters(model)).encode())
    samples = []
    for name, weight in stored_tensors(model):
        digest.update(f"{name} {described(weight)}".encode())
        if not weight.is_meta:
            samples += [sample(tensor, _SAMPLES).cpu() for tensor in plain_tensors(weight)]
    for elements in samples:
        digest.update(raw_bytes(elements.contiguous()))
    return digest.hexdigest()
