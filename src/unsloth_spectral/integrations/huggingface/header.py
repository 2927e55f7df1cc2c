"""The header of a snapshot (model, tokens, codec), and the check that it fits a model and a prompt."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral import __version__
from unsloth_spectral.cache.token_hash import check_tokens, token_hashes
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.registry import config_type_of
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.integrations.huggingface.identity import difference, identify
from unsloth_spectral.integrations.huggingface.media import media_difference, media_hashes, placeholders_in


def make_header(
    model: PreTrainedModel,
    config: CodecConfig,
    batch: int,
    num_tokens: int,
    input_ids: Tensor | None,
    model_inputs: Mapping[str, Any] | None,
) -> Field:
    """The header of a snapshot of ``num_tokens`` tokens in each of ``batch`` rows.

    Raises:
        InvalidArgumentError: ``input_ids`` are not as many rows, or fewer tokens, or hold tokens that stand for images
            and ``model_inputs`` are missing.
    """
    token_hash, hashes = None, media_hashes(model, {} if model_inputs is None else model_inputs)
    if input_ids is not None:
        check_tokens(input_ids)
        if input_ids.ndim != 2 or len(input_ids) != batch or input_ids.shape[1] < num_tokens:
            raise InvalidArgumentError(
                f"input_ids must be the {batch} rows of at least {num_tokens} tokens that this cache holds, got shape "
                f"{tuple(input_ids.shape)}: give all that was fed to the model, from the beginning"
            )
        placeholders = None if hashes else placeholders_in(model, input_ids[:, :num_tokens])
        if placeholders is not None:
            raise InvalidArgumentError(
                f"model_inputs must be given, as input_ids hold {placeholders}: pass model_inputs=inputs, all that the "
                "processor returned"
            )
        token_hash = token_hashes(input_ids, [num_tokens])[num_tokens]
    return {
        "library": __version__,
        "model": identify(model),
        "tokens": {"count": num_tokens, "batch": batch, "sha256": token_hash, "model_inputs": hashes},
        "codec": asdict(cast(Any, config)),
        "codec_name": config.codec,
    }


def config_in(header: Fields) -> CodecConfig:
    """The options of the cache.

    Raises:
        LoadError: they are not options of this version.
    """
    kind = config_type_of(header.text("codec_name"), header)
    try:
        config: CodecConfig = kind(**header.data("codec"))
        return config
    except (TypeError, InvalidArgumentError) as error:
        raise LoadError(f"the snapshot's codec is not one of this version ({error}): make it anew") from error


def check_header(
    header: Fields, model: PreTrainedModel, input_ids: Tensor | None, model_inputs: Mapping[str, Any] | None
) -> None:
    """Refuse a snapshot of another model, or whose tokens and other inputs are not the beginning of the given ones.

    Raises:
        InvalidArgumentError: ``input_ids`` or ``model_inputs`` are invalid, or ``model_inputs`` are missing.
        LoadError: something differs; the message says what.
    """
    if input_ids is not None:
        check_tokens(input_ids)
    differs = difference(header.data("model"), model)
    header.require(differs is None, f"been made of this model, but {differs}")
    tokens = header.sub("tokens")
    if input_ids is not None:
        _check_tokens_are(header, tokens, input_ids)
    hashes = tokens.sub("model_inputs") if tokens.has("model_inputs") else None
    if hashes is None or not hashes.names():
        if input_ids is not None:
            placeholders = placeholders_in(model, input_ids[:, : tokens.integer("count", 1)])
            header.require(
                placeholders is None,
                f"hashes of what its {placeholders} stand for: pass model_inputs to cache.save(path, input_ids, "
                "model_inputs)",
            )
    elif model_inputs is not None:
        differs = media_difference(hashes, tokens.integer("batch", 1), model, model_inputs)
        header.require(differs is None, f"been made of the same model_inputs, but {differs}")
    elif input_ids is not None:
        raise InvalidArgumentError(
            f"model_inputs must be given, as the snapshot was saved with {', '.join(hashes.names())}: pass "
            "model_inputs=inputs, all that the processor returned"
        )


def _check_tokens_are(header: Fields, tokens: Fields, input_ids: Tensor) -> None:
    count, batch = tokens.integer("count", 1), tokens.integer("batch", 1)
    header.require(tokens.has("sha256"), "a token hash to compare with: pass input_ids to cache.save(path, input_ids)")
    fits = input_ids.ndim == 2 and len(input_ids) == batch and input_ids.shape[1] >= count
    header.require(fits, f"no more tokens than input_ids {list(input_ids.shape)}, but has {batch} rows of {count}")
    same = token_hashes(input_ids, [count])[count] == tokens.text("sha256")
    header.require(same, f"the same first {count} tokens as input_ids, but they differ")
