"""The main job on a tiny model: every figure belongs to the cache it is named after."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig, unpatch_unsloth_attention
from unsloth_spectral.errors import InvalidArgumentError, LoadError, UnsupportedModelError
from unsloth_spectral.eval.compare import CONTINUATION_TOKENS, Comparison, compare
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

LENGTH = 300
# Full rank with small int8 error, and a rank that loses much.
CLOSE = SpectralConfig(rank_keys=16, rank_values=16, block_size=32, residual_length=16)
FAR = SpectralConfig(rank_keys=1, rank_values=1, block_size=32, residual_length=16)


@pytest.fixture
def loaded(tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")


def run(loaded: LoadedModel, document: str, *configs: SpectralConfig, **options: Any) -> Comparison:
    arguments = {"question": "Why?", "context_length": LENGTH, "max_new_tokens": 8, **options}
    return compare(loaded, document, configs, **arguments)


def test_figures(loaded: LoadedModel, document: str) -> None:
    result = run(loaded, document, CLOSE, FAR)
    dense, close, far = result.caches
    assert [cache.name for cache in result.caches] == ["dense", "rank 16/16", "rank 1/1"]
    # 2 layers, 2 heads, keys and values of head_dim 16 in float32
    assert dense.stored_bytes == dense.dense_bytes == LENGTH * 2 * 2 * 2 * 16 * 4
    assert dense.bits_per_element == 32
    assert (dense.fidelity.kl, dense.fidelity.top1_agreement, dense.fidelity.perplexity_change) == (0, 1, 0)
    assert close.dense_bytes == far.dense_bytes == dense.dense_bytes
    assert far.stored_bytes < close.stored_bytes < dense.stored_bytes
    for cache in (close, far):
        assert cache.compression_factor == pytest.approx(cache.dense_bytes / cache.stored_bytes)
        assert cache.bits_per_element == pytest.approx(32 / cache.compression_factor)
        assert 0 < cache.seal_seconds < cache.prefill_seconds
        assert cache.decode_tokens_per_second > 0
        assert cache.context_bytes[-1] == cache.stored_bytes
    assert 0 < close.fidelity.kl < 1e-3 < far.fidelity.kl
    assert close.fidelity.top1_agreement > far.fidelity.top1_agreement
    assert result.lengths[-1] == LENGTH
    assert dense.context_bytes == tuple(length * dense.stored_bytes // LENGTH for length in result.lengths)


def test_fidelity_and_text_are_those_of_the_caches(loaded: LoadedModel, document: str) -> None:
    """Computed again by hand, token by token, where `compare` takes the continuation at once."""
    result = run(loaded, document, FAR)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([tokenizer("^" + document).input_ids])
    context, rest = ids[:, :LENGTH], ids[:, LENGTH : LENGTH + CONTINUATION_TOKENS + 1]
    with torch.inference_mode():
        dense_cache = DynamicCache(config=model.config)
        model(context, **cache_argument(dense_cache))
        expected = model(rest[:, :-1], **cache_argument(dense_cache)).logits[0].double().log_softmax(-1)
        cache = SpectralCache(model, config=FAR)
        model(context, **cache_argument(cache))
        actual = model(rest[:, :-1], **cache_argument(cache)).logits[0].double().log_softmax(-1)
        kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
        assert result.caches[1].fidelity.kl == pytest.approx(kl, rel=1e-4)
        loss = -actual.gather(-1, rest[0, 1:, None]).mean()
        assert result.caches[1].fidelity.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
        prompt = torch.cat([context, torch.tensor([tokenizer("\n\nQuestion: Why?\nAnswer:").input_ids])], 1)
        unpatch_unsloth_attention(model)
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=500, pad_token_id=0)
        answer = tokens[0, prompt.shape[1] :].tolist()
        if 2 in answer:
            answer = answer[: answer.index(2)]
        assert result.caches[0].text == tokenizer.decode(answer)


def test_progress_of_each_cache(loaded: LoadedModel, document: str) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}
    run(
        loaded,
        document,
        CLOSE,
        on_progress=lambda stage, done, total: steps.setdefault(stage, []).append((done, total)),
    )
    assert list(steps) == [
        f"{name}: {stage}" for name in ("dense", "rank 16/16") for stage in ("prefill", "continuation", "decode")
    ]
    assert all(done[-1][0] == done[-1][1] for done in steps.values())
    assert steps["dense: decode"] == [(i, 8) for i in range(1, 9)]


def test_the_model_comes_back_as_it_was(loaded: LoadedModel, document: str) -> None:
    before = loaded.model.config._attn_implementation
    run(loaded, document, CLOSE)
    assert loaded.model.config._attn_implementation == before


def test_seed_picks_the_place(loaded: LoadedModel, document: str) -> None:
    first, again, other = (run(loaded, document, seed=seed) for seed in (5, 5, 6))
    assert run(loaded, document).start == 0
    assert first.start == again.start != other.start
    assert first.caches[0].text == again.caches[0].text


def test_to_dict_is_json(loaded: LoadedModel, document: str) -> None:
    result = json.loads(json.dumps(run(loaded, document, CLOSE).to_dict()))
    assert result["config"] == {"block_size": 32, "num_sink_tokens": 4, "residual_length": 16}
    assert result["caches"][1]["fidelity"]["kl"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2, got 1"),
        ({"question": "  "}, "question must not be empty"),
        ({"question": "caf\udce9"}, "question must be text"),
        ({"seed": 10**30}, r"seed must be 0 to 2\*\*63 - 1, got 1000000000000000000000000000000"),
        ({"seed": -1}, "seed must be 0"),
        ({"context_length": 2500, "max_new_tokens": 2000}, "lower context_length to at most"),
        ({"max_new_tokens": 10**6}, "lower max_new_tokens, or ask a shorter question"),
        ({"question": "x" * 9000}, "lower max_new_tokens, or ask a shorter question"),
    ],
)
def test_options_out_of_range(loaded: LoadedModel, document: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run(loaded, document, CLOSE, **options)


def test_a_short_document(loaded: LoadedModel) -> None:
    with pytest.raises(LoadError, match="has 5 tokens and 557 are needed"):
        run(loaded, "short", CLOSE)


def test_an_unsupported_model_is_told_before_any_work(character_tokenizer: Any, document: str) -> None:
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    steps: list[str] = []
    model = MistralForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM has no full-attention layer"):
        run(
            LoadedModel(model, character_tokenizer, "tiny"), document, CLOSE,
            on_progress=lambda stage, *_: steps.append(stage),
        )  # fmt: skip
    assert steps == []
    assert model.config._attn_implementation != "unsloth_spectral"


def test_the_spectral_codec_by_its_title(loaded: LoadedModel, document: str) -> None:
    small = SpectralConfig(bits_per_element=8, block_size=128, residual_length=16)
    smaller = SpectralConfig(bits_per_element=7, block_size=128, residual_length=16)
    _, first, second = run(loaded, document, small, smaller).caches
    assert (first.name, second.name) == ("spectral 8 bits", "spectral 7 bits")
    for cache in (first, second):
        assert cache.stored_bytes < cache.dense_bytes
        assert cache.context_bytes[-1] == pytest.approx(cache.stored_bytes, rel=0.1)
        assert 0 < cache.fidelity.kl < 0.1
