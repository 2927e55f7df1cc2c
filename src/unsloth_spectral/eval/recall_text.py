"""Texts that repeat, at their end, facts from all their parts: what attention to single far tokens is needed for."""

import random

import torch
from torch import Tensor

from unsloth_spectral.eval.tasks.asking import ids_of
from unsloth_spectral.eval.tasks.haystack import made_up_words
from unsloth_spectral.integrations.models import LoadedModel

_NUM_FACTS = 24
_THINGS = ("boats", "fields", "horses", "houses", "trees")


def recall_text(loaded: LoadedModel, text: Tensor, prefix: int, continuation: int, seed: int) -> Tensor:
    """Token ids ``[1, prefix + continuation + 1]``: ``text [1, at least prefix]`` with facts, then the facts again.

    A fact is a made-up name and a number of things; the facts return in another order. In a short prefix there are
    fewer of them, and the continuation starts again after the last one. ``seed`` draws them.
    """
    generator = random.Random(seed)
    names = made_up_words(_NUM_FACTS, generator)
    facts = [f"{n.capitalize()} has {generator.randrange(100, 1000)} {generator.choice(_THINGS)}." for n in names]
    hidden = [ids_of(loaded, f"\n\n{fact}\n\n") for fact in facts]
    # At most half of the prefix, and at least one.
    while len(hidden) > 1 and sum(ids.shape[1] for ids in hidden) > prefix // 2:
        hidden.pop()
    told = facts[: len(hidden)]
    room = max(0, prefix - sum(ids.shape[1] for ids in hidden))
    stops = [round(room * place / len(hidden)) for place in range(len(hidden) + 1)]
    pieces = [part for i, ids in enumerate(hidden) for part in (text[:, stops[i] : stops[i + 1]], ids.to(text.device))]
    generator.shuffle(told)
    recalled = ids_of(loaded, " ".join(told)).to(text.device)
    times = -(-(continuation + 1) // recalled.shape[1])
    context = torch.cat(pieces, dim=1)[:, :prefix]
    return torch.cat([context, recalled.repeat(1, times)[:, : continuation + 1]], dim=1)
