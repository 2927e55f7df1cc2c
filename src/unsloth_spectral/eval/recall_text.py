"""Texts that repeat earlier facts at their end, so that predicting them needs attention to single far tokens."""

import random

import torch
from torch import Tensor

from unsloth_spectral.eval.tasks.asking import ids_of
from unsloth_spectral.eval.tasks.haystack import inserted, made_up_words
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
    facts = [f"{name.capitalize()} has {generator.randrange(100, 1000)} {generator.choice(_THINGS)}." for name in names]
    fact_ids = [ids_of(loaded, f"\n\n{fact}\n\n").to(text.device) for fact in facts]
    # At most half of the prefix, and at least one.
    while len(fact_ids) > 1 and sum(ids.shape[1] for ids in fact_ids) > prefix // 2:
        fact_ids.pop()
    hidden_facts = facts[: len(fact_ids)]
    room = max(0, prefix - sum(ids.shape[1] for ids in fact_ids))
    places = [round(room * number / len(fact_ids)) for number in range(1, len(fact_ids) + 1)]
    context = inserted(text[:, :room], fact_ids, places)[:, :prefix]
    generator.shuffle(hidden_facts)
    recalled_ids = ids_of(loaded, " ".join(hidden_facts)).to(text.device)
    repeats = -(-(continuation + 1) // recalled_ids.shape[1])
    return torch.cat([context, recalled_ids.repeat(1, repeats)[:, : continuation + 1]], dim=1)
