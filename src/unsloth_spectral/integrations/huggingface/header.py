"""What a snapshot is of: the model, the tokens, the codec; and whether it fits a model and a prompt."""

from dataclasses import asdict

from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral import __version__
from unsloth_spectral.cache.tokens import token_hashes
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.integrations.huggingface.identity import difference, identify


def make_header(
    model: PreTrainedModel, config: SpectralConfig, batch: int, num_tokens: int, input_ids: Tensor | None
) -> Field:
    """The header of a snapshot of ``num_tokens`` tokens in each of ``batch`` rows.

    Raises:
        InvalidArgumentError: ``input_ids`` are not as many rows, or fewer tokens.
    """
    token_hash = None
    if input_ids is not None:
        if input_ids.ndim != 2 or len(input_ids) != batch or input_ids.shape[1] < num_tokens:
            raise InvalidArgumentError(
                f"input_ids must be the {batch} rows of at least {num_tokens} tokens that this cache holds, got shape "
                f"{tuple(input_ids.shape)}: give all that was fed to the model, from the beginning"
            )
        token_hash = token_hashes(input_ids, [num_tokens])[num_tokens]
    return {
        "library": __version__,
        "model": identify(model),
        "tokens": {"count": num_tokens, "batch": batch, "sha256": token_hash},
        "codec": asdict(config),
    }


def config_in(header: Fields) -> SpectralConfig:
    """The options of the cache.

    Raises:
        LoadError: they are none of this version's.
    """
    try:
        return SpectralConfig(**header.data("codec"))
    except (TypeError, InvalidArgumentError) as error:
        raise LoadError(f"the snapshot's codec is not one of this version ({error}): make it anew") from error


def check_header(header: Fields, model: PreTrainedModel, input_ids: Tensor | None) -> None:
    """Refuse a snapshot of another model, or of tokens that ``input_ids`` do not begin with.

    Raises:
        LoadError: says what differs.
    """
    found = difference(header.data("model"), model)
    header.require(found is None, f"been made of this model, but {found}")
    if input_ids is None:
        return
    tokens = header.sub("tokens")
    count, batch = tokens.integer("count", 1), tokens.integer("batch", 1)
    header.require(tokens.has("sha256"), "a token hash to compare with: pass input_ids to cache.save(path, input_ids)")
    fits = input_ids.ndim == 2 and len(input_ids) == batch and input_ids.shape[1] >= count
    header.require(fits, f"no more tokens than input_ids {list(input_ids.shape)}, but has {batch} rows of {count}")
    same = token_hashes(input_ids, [count])[count] == tokens.text("sha256")
    header.require(same, f"the same first {count} tokens as input_ids, but they differ")
