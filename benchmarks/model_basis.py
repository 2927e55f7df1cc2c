"""The model's basis against bases of their own, by context and kind of text; and how many texts it takes.

For each context KL to the dense cache and the factor of the whole cache, with the profile's bases left out ("own"), in
the model's basis at any length ("model's"), and by the codec's choice. The same for texts whose last 500 tokens come
one by one. Then the model's basis is measured from the first 1, 2, 4 and 8 texts. Needs a profile: run
``unsloth-spectral profile`` first.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from harness import RESULTS, arguments, finish
from smollm2 import CONTINUATION, PREFIX, STARTS, Subject

from unsloth_spectral import SpectralCache
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral import codec
from unsloth_spectral.eval.agreement import compare_logits
from unsloth_spectral.eval.kinds_of_text import source_of, texts_by_kind
from unsloth_spectral.eval.model_bases import measure_bases
from unsloth_spectral.eval.profile import BASIS_TOKENS
from unsloth_spectral.eval.tasks.asking import ids_of
from unsloth_spectral.integrations.huggingface import cache as cache_module
from unsloth_spectral.integrations.models import load_model
from unsloth_spectral.plots.style import blank_figure, save_figure, tidy

CONTEXTS = (512, 1024, 2048, PREFIX)
DECODED = 500
COUNTS, CONTEXT_OF_COUNTS = (1, 2, 4, 8), 1024
# Of the standard library; the profile takes others.
CODE, CODE_START = "argparse", 2000
CONFIG = SpectralConfig(preset="balanced")


def texts(subject: Subject) -> dict[str, torch.Tensor]:
    """Token ids ``[1, PREFIX + CONTINUATION + 1]`` by name."""
    count = PREFIX + CONTINUATION + 1
    cases = {f"reference, from {start:,}": subject.ids(start, count) for start in STARTS}
    code = subject.tokenizer(source_of(CODE), add_special_tokens=False)["input_ids"]
    return {**cases, "source code": torch.tensor([code[CODE_START : CODE_START + count]])}


def measure(
    subject: Subject, ids: torch.Tensor, context: int, profile: ModelProfile, decoded: int = 0
) -> dict[str, float]:
    """KL and factor behind the last ``context`` tokens of the prefix, of which the last ``decoded`` come one by one."""
    prefix, rest = ids[:, PREFIX - context : PREFIX], ids[:, PREFIX:-1]
    dense = subject.logits(rest, subject.prefill(prefix))
    with patch.object(cache_module, "profile_of", lambda *_: profile):
        cache = SpectralCache(subject.model, config=CONFIG)
    subject.prefill(prefix[:, : context - decoded], cache)
    for token in prefix[:, context - decoded :].unbind(1):
        subject.prefill(token[:, None], cache)
    factor = cache.stats().compression_factor
    agreement = compare_logits(dense, subject.logits(rest, cache), ids[0, PREFIX + 1 :])
    return {"kl": agreement.kl, "factor": factor}


def draw(rows: list[dict[str, Any]]) -> None:
    """KL against the number of texts, one line for each text that was measured on."""
    figure = blank_figure(7, 4.2)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["text"] for row in rows):
        points = [(row["texts"], row["kl"]) for row in rows if row["text"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, map(str, COUNTS))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="texts that the model's basis was measured from", ylabel="KL to the dense cache, nats")
    axes.set_title(f"SmolLM2, balanced, {CONTEXT_OF_COUNTS:,} tokens")
    axes.legend(frameon=False)
    tidy(axes)
    save_figure(figure, RESULTS.parents[1] / "docs" / "texts.png")


def decoded_rows(
    subject: Subject, ids: torch.Tensor, profile: ModelProfile, without: ModelProfile
) -> list[dict[str, Any]]:
    """The choice and bases of their own, behind ``DECODED`` tokens that came one by one."""
    rows = []
    for context in CONTEXTS[:-1]:
        row: dict[str, Any] = {"prompt": context, "decoded": DECODED}
        for name, chosen in (("own", without), ("choice", profile)):
            row[name] = measure(subject, ids, context + DECODED, chosen, DECODED)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    options = arguments("model_basis", __doc__ or "", repeats=1)
    subject = Subject()
    profile = subject.profile()
    cases, contexts, counts = texts(subject), [], []
    without = replace(profile, bases=(), key_means=(), rope_steps=())
    for context in CONTEXTS:
        for name, ids in cases.items():
            row: dict[str, Any] = {"context": context, "text": name}
            row["own"] = measure(subject, ids, context, without)
            with patch.object(codec, "_LEAST_TOKENS_OF_A_BASIS", PREFIX + 1):
                row["model"] = measure(subject, ids, context, profile)
            row["choice"] = measure(subject, ids, context, profile)
            contexts.append(row)
            print(row, flush=True)
    decoded = decoded_rows(subject, next(iter(cases.values())), profile, without)
    loaded = load_model()
    first = str(subject.tokenizer.decode(subject.ids(5_000, BASIS_TOKENS)[0]))
    by_kind = [ids_of(loaded, text)[:, :BASIS_TOKENS] for text in texts_by_kind(first).values()]
    for count in COUNTS:
        fewer = replace(profile, bases=measure_bases(loaded, by_kind[:count]).bases)
        for name, ids in cases.items():
            counts.append({"texts": count, "text": name, **measure(subject, ids, CONTEXT_OF_COUNTS, fewer)})
            print(counts[-1], flush=True)
    draw(counts)
    finish(options.json, {"benchmark": "model_basis", "contexts": contexts, "decoded": decoded, "counts": counts}, [])


if __name__ == "__main__":
    main()
