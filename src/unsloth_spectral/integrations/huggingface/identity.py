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

# Of every configuration, or about text and training: they change no key and no value.
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
# Digests, and what a difference in each says.
_WEIGHTS = {
    "embedding": "its token embedding",
    "first_attention": "the first layer's attention weights, the key projection among them,",
    "sample": "a sample of all its weights",
}
_SAMPLES = 64  # of each weight

# Identities, each with the state of the model at that time.
_known: "WeakKeyDictionary[PreTrainedModel, tuple[Any, Identity]]" = WeakKeyDictionary()


def identify(model: PreTrainedModel) -> Identity:
    """``model`` as plain data for JSON: its dtype and configuration, and SHA-256 digests of its weights.

    Digests are of the token embedding, of the attention of the first layer (its key projection, fused or not), and of a
    sample of every weight together with the adapters that are active: a fine-tuned model is another one.

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
    changed = sorted(name for name, (there, here) in pairs.items() if there != here)
    if changed:
        there, here = pairs[changed[0]]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{changed[0]} is {there} there and {here} here{more}"
    return next((f"{said} differ{'s' * (name != 'first_attention')}" for name, said in _WEIGHTS.items()
                 if stored.get(name) != present[name]), None)  # fmt: skip


def _flat(there: Any, here: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Both sides' settings by their dotted names."""
    pairs: dict[str, tuple[Any, Any]] = {}
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            pairs.update(_flat(there.get(name), here.get(name), f"{prefix}.{name}" if prefix else name))
        return pairs
    return {prefix: (there, here)}


def _state(model: PreTrainedModel) -> Any:
    weights = [version(weight) for weight in (*model.parameters(), *model.buffers())]
    return weights, json.dumps(model.config.to_dict(), default=str), _adapters(model)


def _adapters(model: nn.Module) -> list[str]:
    """Which adapters act: PEFT's layers say so, and their weights stay where they are while they don't."""
    layers = [module for module in model.modules() if hasattr(module, "disable_adapters")]
    return sorted({f"{getattr(layer, 'active_adapters', None)} {layer.disable_adapters}" for layer in layers})


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, weight in stored_tensors(module):
        digest.update(described(weight).encode())
        for part in plain_tensors(weight):
            digest.update(raw_bytes(part.cpu().contiguous()))
    return digest.hexdigest()


def _sample(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(json.dumps(_adapters(model)).encode())
    picked = []
    for name, weight in stored_tensors(model):
        digest.update(f"{name} {described(weight)}".encode())
        if not weight.is_meta:
            picked += [sample(part, _SAMPLES).cpu() for part in plain_tensors(weight)]
    for part in picked:
        digest.update(raw_bytes(part.contiguous()))
    return digest.hexdigest()
