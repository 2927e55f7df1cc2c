"""Prefill, continue and decode on a cache: the forward passes of the whole evaluation."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import chat_frame, row_of, token_ids
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A cache that holds a context.

    Attributes:
        cache: the transformers ``Cache``, filled.
        footprint: of the cache right after the prefill.
        by_layer: the method's figures of each layer right after the prefill.
    """

    cache: Any
    footprint: Footprint
    by_layer: dict[str, list[float]]


def prefill(loaded: LoadedModel, method: Method, context: Tensor, on_progress: OnProgress | None) -> Prefilled:
    """Run ``context [1, n]`` through a fresh cache of ``method``."""
    cache = method.make_cache(loaded.model)
    fill(loaded, cache, context, f"{method.name}: prefill", on_progress)
    return Prefilled(cache, method.footprint(cache), method.by_layer(cache))


def fill(loaded: LoadedModel, cache: Any, tokens: Tensor, stage: str, on_progress: OnProgress | None) -> None:
    """Append ``tokens [1, n]`` to ``cache`` in one forward pass, whose layers are reported as steps of ``stage``."""
    with layers_reported(loaded.model, stage, on_progress):
        _forward(loaded, tokens, cache, logits_to_keep=1)


def prefill_dense(loaded: LoadedModel, context: Tensor) -> Any:
    """The model's own cache, filled with ``context [1, n]``: the reference of a task that ran no dense cache before."""
    return own_cache(loaded.model, context.to(loaded.model.device))


def own_cache(model: Any, tokens: Tensor) -> Any:
    """The cache that ``model`` itself makes in a forward pass over ``tokens [1, n]`` on its device; None if none."""
    return cache_of(model(input_ids=tokens, use_cache=True, logits_to_keep=1))


def continue_on(loaded: LoadedModel, cache: Any, tokens: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of one forward pass that appends ``tokens [1, n]`` to ``cache``."""
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
    """The text that the model writes greedily behind ``tokens [1, n]``, up to its end token. ``cache`` grows."""
    return answer_text(loaded, greedy_tokens(loaded, cache, tokens, max_new_tokens, stage, on_progress))


def answer_text(loaded: LoadedModel, tokens: Iterable[int]) -> str:
    """The text of ``tokens`` up to the first end token."""
    ends = end_tokens(loaded)
    answer = list(takewhile(lambda token: token not in ends, tokens))
    return str(loaded.tokenizer.decode(answer, skip_special_tokens=True))


def greedy_tokens(
    loaded: LoadedModel,
    cache: Any,
    tokens: Tensor,
    max_new_tokens: int,
    stage: str = "decode",
    on_progress: OnProgress | None = None,
) -> Iterator[int]:
    """The ``max_new_tokens`` tokens that the model chooses greedily behind ``tokens [1, n]``, past its end tokens.

    ``cache`` grows. ``generate`` is not used: a checkpoint's generation settings (repetition penalties ...) would
    change the outcome.
    """
    for step in range(1, max_new_tokens + 1):
        chosen = int(_forward(loaded, tokens, cache, logits_to_keep=1)[0, -1].argmax())
        if on_progress is not None:
            on_progress(stage, step, max_new_tokens)
        yield chosen
        tokens = row_of([chosen])


def ask(loaded: LoadedModel, cache: Any, question: str, answer: str, max_new_tokens: int) -> str:
    """The model's greedy answer to ``question`` on a copy of ``cache``; ``answer`` is its given beginning.

    The given words show a small model what to answer and in which form, as the answer prefixes of RULER do (Hsieh et
    al. 2024).
    """
    closing = closing_ids(loaded, question, answer)
    return decode_on(loaded, copy.deepcopy(cache), closing, max_new_tokens)


def opening_ids(loaded: LoadedModel) -> Tensor:
    """The chat format's tokens ``[1, n]`` before a context; without a chat format, the first token of texts, if any."""
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
    """The model's number of positions, or None if its configuration does not tell."""
    limit: int | None = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def check_positions(loaded: LoadedModel, needed: int, *, option: str = "context_length") -> None:
    """Refuse a model with fewer than ``needed`` positions.

    Raises:
        InvalidArgumentError: the model has fewer; the message names the task's ``option`` to lower.
    """
    limit = positions_of(loaded)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"the task needs {needed:,} positions, but {loaded.name} has {limit:,}: lower its {option}"
        )


def check_case(case: str, cases: Sequence[str]) -> int:
    """The index of ``case`` in ``cases``.

    Raises:
        InvalidArgumentError: ``case`` is not one of them.
    """
    if case not in cases:
        raise InvalidArgumentError(f"case must be one of {', '.join(cases)}, got {case!r}")
    return cases.index(case)


def at_least(least: int, **options: int) -> None:
    """Check that a task's options are integers of at least ``least``.

    Raises:
        InvalidArgumentError: an option is not.
    """
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")


def _forward(loaded: LoadedModel, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    model: Any = loaded.model
    logits: Tensor = model(input_ids=tokens.to(model.device), **cache_argument(cache), use_cache=True, **options).logits
    return logits
