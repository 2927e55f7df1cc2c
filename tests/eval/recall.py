"""A model that repeats what its cache holds, so that a task's score is known beforehand."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_in
from unsloth_spectral.integrations.models import LoadedModel


class Encoding(dict[str, list[int]]):
    """What tokenizers return: token ids by name and as an attribute."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class AsciiTokenizer:
    """One token a character, and back."""

    bos_token = ""
    eos_token_id = 0
    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> Any:
        return Encoding(input_ids=[ord(character) for character in text])

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Memory:
    """A cache of token ids that remembers the newest ``span`` of them when new ones come."""

    def __init__(self, span: int) -> None:
        self.span, self.text = span, ""


class RecallModel(nn.Module):
    """Writes what followed the longest piece of the cached text that ends as its prompt does (an induction head).

    With a ``reply`` it writes that instead, leaving out words that the cached text does not hold.
    """

    generation_config = SimpleNamespace(eos_token_id=[0])

    def __init__(self) -> None:
        super().__init__()
        self.device, self.reply, self._written = torch.device("cpu"), None, 0
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=4096))

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        cache = Memory(10_000) if cache_in(options) is None else cache_in(options)
        context = cache.text[-cache.span :]
        cache.text = context + "".join(map(chr, input_ids[0].tolist()))
        logits = torch.zeros(1, 1, 128)
        logits[0, 0, ord(self._next(context, cache.text, input_ids.shape[1]))] = 1
        return SimpleNamespace(logits=logits, **cache_argument(cache))

    def _next(self, known: str, text: str, length: int) -> str:
        if self.reply is not None:
            self._written = self._written + 1 if length == 1 else 0
            words = [word for word in self.reply.split() if word in known]
            return (" ".join(words) + "\0" * 100)[self._written]
        for size in range(60, 3, -1):
            place = text[:-1].rfind(text[-size:])
            if place >= 0:
                return text[place + size]
        return "\0"


def recall_method(name: str, span: int) -> Method:
    return Method(
        name, name, lambda model: Memory(span), lambda cache: Footprint(len(cache.text), len(cache.text), None)
    )


def recall_loaded() -> LoadedModel:
    return LoadedModel(RecallModel(), AsciiTokenizer(), "recall")
