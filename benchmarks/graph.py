"""One step of decoding, compiled and not, with a spectral cache and with transformers' own.

The contenders take turns; each step adds a token to its cache, sealings included. The compiled ones are compiled alike:
``torch.compile(model, fullgraph=True)``. SmolLM2 is the model; a tiny one shows what Python costs. Then both kinds of
spectral steps answer to the same tokens, and their logits are compared.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from harness import Target, alternate, arguments, finish
from smollm2 import Subject
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from unsloth_spectral import SpectralCache
from unsloth_spectral.eval.agreement import compare_logits
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

CONTEXTS, TINY_CONTEXT, ROOM = (1024, 8192), 1024, 2048
COMPARED = 128
SPECTRAL, COMPILED = "spectral, uncompiled", "spectral, compiled"
STATIC, DYNAMIC = "static, compiled", "dynamic, uncompiled"


def tiny() -> Any:
    """Four layers of 64 dimensions with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Contender:
    """A model with a cache that holds a prompt; a call decodes one more token."""

    def __init__(self, model: Any, cache: Any, run: Callable[..., Any], input_ids: torch.Tensor) -> None:
        self.cache, self._run, self._place = cache, run, 0
        model(input_ids=input_ids, **cache_argument(cache), logits_to_keep=1)
        self._token = input_ids[:, -1:].clone()
        self._place = input_ids.shape[1]

    def __call__(self) -> torch.Tensor:
        return self.answer(self._token)

    def answer(self, token: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, vocab]`` behind ``token [B, 1]``."""
        if isinstance(self.cache, SpectralCache):
            self.cache.prepare_step()
        position = torch.tensor([[self._place]], dtype=torch.int64, device="cpu")
        self._place += 1
        logits: torch.Tensor = self._run(input_ids=token, position_ids=position, **cache_argument(self.cache)).logits[
            :, -1
        ]
        return logits


def contender(name: str, model: Any, compiled: Any, input_ids: torch.Tensor) -> Contender:
    length = input_ids.shape[1] + ROOM
    cache: Any
    if name == SPECTRAL:
        cache = SpectralCache(model, preset="balanced")
    elif name == COMPILED:
        cache = SpectralCache(model, preset="balanced", max_length=length)
    else:
        cache = StaticCache(model.config, max_cache_len=length) if name == STATIC else DynamicCache(config=model.config)
    return Contender(model, cache, compiled if name in (COMPILED, STATIC) else model, input_ids)


def difference(model: Any, input_ids: torch.Tensor) -> dict[str, float]:
    """How far a compiled step's logits are from an uncompiled one's, on the same tokens."""
    prompt, rest = input_ids[:, :-COMPARED], input_ids[:, -COMPARED:]
    found, compiled = [], torch.compile(model, fullgraph=True)
    for name in (SPECTRAL, COMPILED):
        taking = contender(name, model, compiled, prompt)
        found.append(torch.cat([taking.answer(token[:, None].clone()) for token in rest.unbind(1)]))
    agreement = compare_logits(found[0][:-1], found[1][:-1], rest[0, 1:])
    return {"largest": float((found[0] - found[1]).abs().max()), "kl": agreement.kl}


@torch.no_grad()
def main() -> None:
    options = arguments("graph", __doc__ or "", repeats=30)
    subject, rows, targets = Subject(), [], []
    tokens = torch.randint(0, 1024, (1, TINY_CONTEXT), generator=torch.Generator().manual_seed(0))
    cases = [("SmolLM2-135M", subject.model, subject.ids(0, context)) for context in CONTEXTS]
    cases.append(("tiny Llama", tiny(), tokens))
    for name, model, input_ids in cases:
        torch.compiler.reset()
        context = input_ids.shape[1]
        compiled = torch.compile(model, fullgraph=True)
        names = (SPECTRAL, COMPILED, STATIC, DYNAMIC)
        timings = alternate({n: contender(n, model, compiled, input_ids) for n in names}, options.repeats)
        rows.append({"model": name, "context": context, "milliseconds": {n: asdict(t) for n, t in timings.items()}})
        ratio = timings[COMPILED].median / timings[SPECTRAL].median
        print(name, context, {n: round(t.median, 2) for n, t in timings.items()}, flush=True)
        targets.append(Target(f"compiled over uncompiled, {name}, {context:,} tokens", 1.0, ratio, at_least=False))
    torch.compiler.reset()
    logits = difference(subject.model, subject.ids(20_000, CONTEXTS[0] + COMPARED))
    print(logits)
    finish(options.json, {"benchmark": "graph", "rows": rows, "difference": logits}, targets)


if __name__ == "__main__":
    main()
