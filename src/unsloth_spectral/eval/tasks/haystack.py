"""Real text with sentences hidden in it."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.eval.tasks.asking import ids_of, opening_ids
from unsloth_spectral.integrations.models import LoadedModel

# Cities that small models know, one or two tokens each: the test is about the cache, not the tokenizer.
_CITIES = """
Amsterdam Athens Bangkok Barcelona Beijing Berlin Boston Brussels Budapest Cairo Chicago Dallas Delhi Denver Dublin
Florence Geneva Hamburg Helsinki Houston Istanbul Jakarta Lagos Lima Lisbon London Madrid Manila Miami Milan Montreal
Moscow Mumbai Munich Nairobi Naples Oslo Paris Prague Rome Seattle Seoul Singapore Stockholm Sydney Tokyo Toronto Vienna
"""
CITIES = tuple(_CITIES.split())
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", ("", "l", "n", "r", "s")


def check_document(loaded: LoadedModel, document: str | None, context_length: int) -> None:
    """Refuse a document with fewer than ``context_length`` tokens, before any context is built.

    Raises:
        LoadError: the document is too short.
    """
    _tokens(loaded, document, context_length)


def hide(
    loaded: LoadedModel,
    document: str | None,
    sentences: Sequence[str],
    depths: Sequence[float],
    *,
    context_length: int,
    generator: random.Random,
) -> Tensor:
    """A context ``[1, context_length]``: the chat format's opening, then text with a paragraph for each sentence.

    Args:
        loaded: provides the tokenizer.
        document: the text; None is the default document.
        sentences: sentences to hide.
        depths: their depths, ascending, from 0 (before all text) to 1 (behind it).
        context_length: tokens in all.
        generator: draws the token of the document where the text begins.

    Raises:
        InvalidArgumentError: the sentences do not fit.
        LoadError: the document is too short.
    """
    opening = opening_ids(loaded)
    hidden = [ids_of(loaded, f"\n\n{sentence}\n\n") for sentence in sentences]
    needed = opening.shape[1] + sum(ids.shape[1] for ids in hidden)
    room = context_length - needed
    if room < 0:
        raise InvalidArgumentError(
            f"context_length must be at least {needed} for the hidden sentences, got {context_length}"
        )
    text = _tokens(loaded, document, room)
    start = generator.randrange(text.shape[1] - room + 1)
    places = [round(depth * room) for depth in depths]
    return torch.cat([opening, inserted(text[:, start : start + room], hidden, places)], dim=1)


def inserted(text: Tensor, pieces: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """``text [1, n]`` with each of ``pieces [1, m]`` before the token at its place, ``[1, n + all m]``.

    ``places`` ascend, from 0 to ``n``.
    """
    stops = [0, *places]
    joined = [part for i, piece in enumerate(pieces) for part in (text[:, stops[i] : stops[i + 1]], piece)]
    return torch.cat([*joined, text[:, stops[-1] :]], dim=1)


def _tokens(loaded: LoadedModel, document: str | None, needed: int) -> Tensor:
    text = default_document() if document is None else document
    return tokens_of(text, loaded.tokenizer, needed, fix="give a longer document")


def spread(count: int) -> list[float]:
    """Depths of ``count`` sentences, each in the middle of its part of the text."""
    return [(index + 0.5) / count for index in range(count)]


def made_up_words(count: int, generator: random.Random, syllables: int = 2) -> list[str]:
    """Distinct pronounceable words without meaning, which no model knows from its training."""
    words: dict[str, None] = {}
    while len(words) < count:
        stem = [generator.choice(_ONSETS) + generator.choice(_VOWELS) for _ in range(syllables)]
        words["".join(stem) + generator.choice(_CODAS)] = None
    return list(words)


def numbers(count: int, generator: random.Random, digits: int) -> list[str]:
    """Distinct numbers of ``digits`` digits, without leading zeros."""
    return [str(number) for number in generator.sample(range(10 ** (digits - 1), 10**digits), count)]
