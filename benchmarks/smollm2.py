"""SmolLM2 and slices of the default document, for the benchmarks that need a real model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.eval.agreement import Agreement, compare_logits
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.fingerprint import profile_of
from unsloth_spectral.integrations.models import load_model

# Where the slices begin in the default document, in tokens, and how they are cut.
STARTS = (20_000, 50_000, 80_000)
PREFIX = 4096
CONTINUATION = 256


@dataclass(frozen=True, slots=True)
class Slice:
    """A prefix with its dense cache, and its continuation.

    ``keys`` and ``values`` are ``[layers, batch, heads, PREFIX, head_dim]`` as the model caches them.
    """

    start: int
    input_ids: Tensor
    keys: Tensor
    values: Tensor
    dense_logits: Tensor


class Subject:
    """The model, with its prefills, logits and agreement."""

    def __init__(self) -> None:
        loaded = load_model()
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        last = STARTS[-1] + PREFIX + CONTINUATION + 1
        self.document_ids = tokens_of(default_document(), self.tokenizer, last)

    def ids(self, start: int, count: int) -> Tensor:
        return self.document_ids[:, start : start + count]

    def profile(self) -> ModelProfile:
        """The model's profile, from the cache folder; ends the program if there is none with bases."""
        profile = profile_of(self.model, self.model.config.num_hidden_layers)
        if profile is None or not profile.bases:
            raise SystemExit("this needs a profile with bases: run `unsloth-spectral profile` first")
        return profile

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, cache: Any = None) -> Any:
        """The cache after one forward pass over ``input_ids``; the model's default one if None is given."""
        return cache_of(self.model(input_ids=input_ids, **cache_argument(cache), use_cache=True, logits_to_keep=1))

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, cache: Any) -> Tensor:
        return self.model(input_ids=input_ids, **cache_argument(cache)).logits[0]

    def slices(self) -> Iterator[Slice]:
        """The three slices, one after another, each with its dense prefill."""
        for start in STARTS:
            input_ids = self.ids(start, PREFIX + CONTINUATION + 1)
            cache = self.prefill(input_ids[:, :PREFIX])
            keys = torch.stack([layer.keys for layer in cache.layers])
            values = torch.stack([layer.values for layer in cache.layers])
            logits = self.logits(input_ids[:, PREFIX:-1], cache)
            yield Slice(start, input_ids, keys, values, logits)

    def fidelity(self, text_slice: Slice, cache: Any) -> Agreement:
        """Agreement with the dense cache on the continuation, given a cache of the prefix."""
        logits = self.logits(text_slice.input_ids[:, PREFIX:-1], cache)
        return compare_logits(text_slice.dense_logits, logits, text_slice.input_ids[0, PREFIX + 1 :])

    def rotation(self, count: int) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin for positions 0 to ``count``, ``[1, count, head_dim]``."""
        return self.model.model.rotary_emb(torch.zeros(1), torch.arange(count)[None])


def mean_fidelity(results: list[Agreement]) -> dict[str, float]:
    """The mean of each figure over slices."""
    count = len(results)
    return {
        "kl": sum(result.kl for result in results) / count,
        "top1_agreement": sum(result.top1_agreement for result in results) / count,
        "perplexity_change": sum(result.perplexity_change for result in results) / count,
    }
