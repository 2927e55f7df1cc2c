"""What every task does with a model: prefill a context once, then ask questions of copies of its cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import chat_frame, row_of, token_ids
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.models import LoadedModel

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A cache that holds a context.

    Attributes:
        cache: the transformers ``Cache``, filled.
        footprint: of it at that moment.
        by_layer: what the method tells of its layers then.
    """

    cache: Any
    footprint: Footprint
    by_layer: dict[str, list[float]]


def prefill(loaded: LoadedModel, method: Method, context: Tensor, on_progress: OnProgress | None) -> Prefilled:
    """Run ``context [1, n]`` through a fresh cache of ``method``."""
    cache = method.make_cache(loaded.model)
    with layers_reported(loaded.model, f"{method.name}: prefill", on_progress):
        _forward(loaded, context, cache, logits_to_keep=1)
    return Prefilled(cache, method.footprint(cache), method.by_layer(cache))


def prefill_dense(loaded: LoadedModel, context: Tensor) -> Any:
    """The cache that the model makes by itself, filled with ``context [1, n]``: the reference where a task is run
    without the dense cache before."""
    model: Any = loaded.model
    return cache_of(model(input_ids=context.to(model.device), use_cache=True, logits_to_keep=1))


def continue_on(loaded: LoadedModel, cache: Any, tokens: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of one forward pass of ``tokens [1, n]`` behind what ``cache`` holds; they join it."""
    return _forward(loaded, tokens, cache)[0]


def decode_on(
    loaded: LoadedModel,
    cache: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    stage: str = "decode",
    on_progress: OnProgress | None = None,
) -> str:
    """What the model writes greedily behind ``tokens [1, n]``, up to its end token; the tokens join ``cache``.

    Not by ``generate``: a checkpoint's own generation settings (repetition penalties ...) would decide with the cache.
    """
    ends, found = end_tokens(loaded), []
    for step in range(max_new_tokens):
        chosen = int(_forward(loaded, tokens, cache, logits_to_keep=1)[0, -1].argmax())
        if on_progress is not None:
            on_progress(stage, step + 1, max_new_tokens)
        if chosen in ends:
            break
        found.append(chosen)
        tokens = row_of([chosen])
    return str(loaded.tokenizer.decode(found, skip_special_tokens=True))


def ask(loaded: LoadedModel, cache: Any, question: str, answer: str, max_new_tokens: int) -> str:
    """The model's greedy answer to ``question``, whose first words are given, on a copy of ``cache``.

    The given words tell a small model what is wanted, and in which form, as the answer prefixes of RULER do
    (Hsieh et al. 2024).
    """
    closing = closing_ids(loaded, question, answer)
    return decode_on(loaded, copy.deepcopy(cache), closing, max_new_tokens)


def opening_ids(loaded: LoadedModel) -> Tensor:
    """The chat format's tokens ``[1, n]`` before a context; of a model without one its first token, or none."""
    return ids_of(loaded, chat_frame(loaded.tokenizer, "")[0])


def closing_ids(loaded: LoadedModel, question: str, answer: str = "") -> Tensor:
    """The tokens ``[1, n]`` behind a context: the question and the answer's given first words."""
    closing = chat_frame(loaded.tokenizer, question)[1]
    # Chat formats end in a line break or a space; the plain one in a colon.
    gap = " " if answer and not closing[-1].isspace() else ""
    return ids_of(loaded, closing + gap + answer)


def ids_of(loaded: LoadedModel, text: str) -> Tensor:
    """Token ids ``[1, n]`` of ``text``, without special tokens."""
    return token_ids(loaded.tokenizer, text)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """All tokens that end an answer: the tokenizer's and those of the model's generation settings."""
    listed: Any = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = listed if isinstance(listed, Sequence) else [listed]
    return {int(end) for end in [*ends, loaded.tokenizer.eos_token_id] if end is not None}


def positions_of(loaded: LoadedModel) -> int | None:
    """How many positions the model was made for; None where it does not say."""
    limit: int | None = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def check_positions(loaded: LoadedModel, needed: int, *, option: str = "context_length") -> None:
    """Refuse a model that was made for fewer than ``needed`` positions.

    Raises:
        InvalidArgumentError: it was; the message names the task's ``option`` to lower.
    """
    limit = positions_of(loaded)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"the task needs {needed:,} positions, but {loaded.name} has {limit:,}: lower its {option}"
        )


def check_case(case: str, cases: Sequence[str]) -> int:
    """The place of ``case`` among ``cases``.

    Raises:
        InvalidArgumentError: it is none of them.
    """
    if case not in cases:
        raise InvalidArgumentError(f"case must be one of {', '.join(cases)}, got {case!r}")
    return cases.index(case)


def at_least(least: int, **options: int) -> None:
    """Check integer options of a task.

    Raises:
        InvalidArgumentError: one is below ``least``, or no integer.
    """
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")


def _forward(loaded: LoadedModel, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    model: Any = loaded.model
    logits: Tensor = model(input_ids=tokens.to(model.device), **cache_argument(cache), use_cache=True, **options).logits
    return logits
