"""Snapshots for the command line: write one of a document, describe one."""

import os
from typing import Any

from torch import Tensor

from unsloth_spectral.cache import snapshot
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.tasks.asking import check_positions
from unsloth_spectral.integrations.huggingface import SpectralCache
from unsloth_spectral.integrations.huggingface.header import config_in
from unsloth_spectral.integrations.huggingface.prefill import feed
from unsloth_spectral.integrations.models import LoadedModel


def prefill_document(
    loaded: LoadedModel, document: str, most: int, config: CodecConfig, on_progress: OnProgress | None = None
) -> tuple[SpectralCache, Tensor]:
    """Cache the first ``most`` tokens of ``document``; returns the cache and those tokens, ``[1, n]``.

    The cache does not keep the model alive: keep ``loaded`` until the cache is saved.

    Raises:
        InvalidArgumentError: the model has no room for so many tokens.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """
    tokenizer: Any = loaded.tokenizer
    input_ids: Tensor = tokenizer(document, return_tensors="pt", verbose=False).input_ids[:, :most]
    check_positions(loaded, input_ids.shape[1])
    cache = SpectralCache(loaded.model, config=config)
    with layers_reported(loaded.model, "reading the document", on_progress):
        feed(loaded.model, input_ids, cache)
    return cache, input_ids


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tokens, codec, model and bytes of the snapshot at ``path``, ready for JSON.

    Raises:
        LoadError: there is no snapshot, or its record was altered.
    """
    opened = snapshot.read(path, check_tensors=False)
    tokens, model = opened.header.sub("tokens"), opened.header.data("model")
    return {
        "path": str(path),
        "file_bytes": os.path.getsize(os.path.expanduser(path)),
        "tensor_bytes": opened.tensor_bytes,
        "num_tensors": opened.num_tensors,
        "format": snapshot.VERSION,
        "written_by": opened.header.text("library"),
        "tokens": tokens.integer("count", 1),
        "sequences": tokens.integer("batch", 1),
        "token_sha256": tokens.text("sha256") if tokens.has("sha256") else None,
        "codec": config_in(opened.header).title,
        "has_profile": opened.fields.has("profile"),
        "model": model.get("model"),
        "dtype": model.get("dtype"),
        "embedding_sha256": model.get("embedding"),
        "first_attention_sha256": model.get("first_attention"),
        "config": model.get("config"),
    }
