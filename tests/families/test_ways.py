"""Ways to generate: a lossless spectral cache gives the same tokens and logits as a dense one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families.lossless import BLOCK, LOSSLESS, dense_cache, padded_batch, sealed_tokens, token_ids
from families.models import FAMILIES, build, served
from transformers import PreTrainedModel

from unsloth_spectral import SpectralCache
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

Check = Callable[..., None]
# Of the prompt four blocks are sealed, and one more after six tokens.
PROMPT, NEW, SEALED = 86, 14, 5 * BLOCK
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "padded batch": {},
    "beam search": {"num_beams": 3},
    "several sequences": {"num_return_sequences": 3, "do_sample": True, "temperature": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {},
    "chunked prefill": {"prefill_chunk_size": 32},
    "padded batch, beam search": {"num_beams": 3},
    "padded batch, chunked prefill": {"prefill_chunk_size": 32},
}
EVERYWHERE = ("greedy", "padded batch", "beam search", "prompt lookup", "chunked prefill")
GUESSES = ("prompt lookup", "assisted")


def inputs_of(way: str) -> dict[str, torch.Tensor]:
    if way.startswith("padded batch"):
        return padded_batch(PROMPT)
    if way == "prompt lookup":  # a text that repeats itself
        return {"input_ids": token_ids(length=PROMPT // 2).repeat(1, 2)}
    return {"input_ids": token_ids(length=PROMPT)}


def generate(model: PreTrainedModel, way: str, assistant: PreTrainedModel | None, past: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "do_sample": False, **WAYS[way]}
    if assistant is not None:
        options["assistant_model"] = assistant
    return model.generate(
        **inputs_of(way), **options, **cache_argument(past), return_dict_in_generate=True, output_logits=True
    )


@pytest.mark.parametrize(
    ("family", "way"),
    [cell for way in WAYS for cell in served(way, quick=way in EVERYWHERE)],
)
@pytest.mark.usefixtures("unrounded")
def test_tokens_and_logits_equal_the_dense_ones(family: str, way: str, cell: Check, assert_close: Check) -> None:
    refused = FAMILIES[family].is_recurrent and way in GUESSES
    cell(family, way.split(", ")[-1], "refused by transformers" if refused else "works")
    if family == "Qwen2-VL, text" and way == "chunked prefill" and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 fails here with a dense cache too")
    plain, model = build(family), build(family)
    # Other weights, so that most of what it proposes is taken back.
    assistant = build(family, seed=1) if way == "assisted" else None
    spectral = SpectralCache(model, config=LOSSLESS)
    if refused:
        for candidate, past in ((plain, dense_cache(plain)), (model, spectral)):
            with pytest.raises(ValueError, match="not supported with stateful models"):
                generate(candidate, way, assistant, past)
        return
    expected = generate(plain, way, assistant, dense_cache(plain))
    generated = generate(model, way, assistant, spectral)
    assert sealed_tokens(spectral), "no layer is spectral"
    assert min(sealed_tokens(spectral)) >= SEALED
    assert generated.sequences.shape[-1] == PROMPT + NEW
    assert torch.equal(generated.sequences, expected.sequences)
    assert len(generated.logits) == len(expected.logits)
    for actual, wanted in zip(generated.logits, expected.logits, strict=True):
        assert_close(actual, wanted, 1e-4)


@pytest.mark.parametrize("family", [family for family, row in FAMILIES.items() if row.refusal is not None])
def test_what_cannot_be_served_is_refused_in_one_line(family: str, cell: Check) -> None:
    cell(family, "greedy", "unsupported")
    model = build(family)
    with pytest.raises(UnsupportedModelError, match=FAMILIES[family].refusal) as caught:
        SpectralCache(model)
    assert str(caught.value).startswith(type(model).__name__)
    assert "\n" not in str(caught.value)
    # Nothing was changed.
    assert torch.equal(
        model.generate(token_ids(), max_new_tokens=3, do_sample=False),
        build(family).generate(token_ids(), max_new_tokens=3, do_sample=False),
    )


def test_contrastive_search_is_not_in_the_library() -> None:
    """It was moved to a repository on the hub: a spectral cache is refused with it as any other is."""
    model = build("Llama")
    for past in (dense_cache(model), SpectralCache(model, config=LOSSLESS)):
        with pytest.raises(ValueError, match="Contrastive Search requires `trust_remote_code=True`"):
            model.generate(token_ids(), **cache_argument(past), penalty_alpha=0.6, top_k=4, max_new_tokens=3)
