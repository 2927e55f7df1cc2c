"""Texts that outgrow the first factors of a longrope model, where transformers drops the cache and reads them again.

They are compared with generating without a cache: with one of transformers' own, Phi-4-multimodal, and Phi-3 in the
first supported releases, go on from the newest token alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, padded_batch, sealed_tokens, token_ids
from families.models import COMMON, HEAD_DIM, build
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from unsloth_spectral import PrefixStore, SpectralCache, SpectralConfig, patch_unsloth_attention, spectral
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of

LIMIT = 96
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0 + 0.1 * pair for pair in range(HEAD_DIM // 2)],
    "long_factor": [3.0] * (HEAD_DIM // 2),
}
OPTIONS: dict[str, Any] = {
    **{name: value for name, value in COMMON.items() if name != "head_dim"},
    "sliding_window": None,
    "original_max_position_embeddings": LIMIT,
    "max_position_embeddings": 4 * LIMIT,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "crop_size": 28,
    "image_token_id": 126,
}
AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "input_size": 16,
    "nemo_conv_channels": 8,
    "ext_pw_out_channel": 32,
    "depthwise_seperable_out_channel": 32,
    "audio_token_id": 127,
}


def phi3() -> PreTrainedModel:
    return build(
        "Phi-3, longrope",
        **{name: OPTIONS[name] for name in OPTIONS if "max_position" in name},
        rope_parameters=LONGROPE,
    )


def phimoe() -> PreTrainedModel:
    rope = {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.3}
    config = PhimoeConfig(**OPTIONS, rope_parameters=rope, num_local_experts=4, num_experts_per_tok=2)
    return seeded(PhimoeForCausalLM, config)


def phi4_multimodal() -> PreTrainedModel:
    config = Phi4MultimodalConfig(**OPTIONS, rope_parameters=LONGROPE, vision_config=VISION, audio_config=AUDIO)
    return seeded(Phi4MultimodalForCausalLM, config)


def seeded(kind: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    model.generation_config.eos_token_id = None
    return model


MODELS = pytest.mark.parametrize("make", [phi3, phimoe, phi4_multimodal])


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    arguments = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, **arguments)


def check_whole(cache: Any, result: Any) -> None:
    """``cache`` is the one that was used, and holds the whole text but its last token, most of it sealed."""
    assert cache_of(result) is cache
    assert cache.get_seq_length() == result.sequences.shape[1] - 1
    assert min(sealed_tokens(cache)) >= 80


@MODELS
@pytest.mark.parametrize(
    ("how", "length"),
    [("own", LIMIT - 6), ("patched", LIMIT - 6), ("own", LIMIT), ("patched", LIMIT + 1), ("scope", LIMIT + 10)],
)
@pytest.mark.usefixtures("unrounded")
def test_the_cache_is_refilled_where_the_text_outgrows_the_first_factors(
    make: Callable[[], PreTrainedModel], how: str, length: int
) -> None:
    ids, model = token_ids(length=length) % 126, make()
    expected = generate(model, ids, use_cache=False).sequences
    if how == "own":
        cache = SpectralCache(model, config=LOSSLESS)
        result = generate(model, ids, **cache_argument(cache))
    elif how == "patched":
        patch_unsloth_attention(model, config=LOSSLESS)
        cache = cache_of(result := generate(model, ids))
    else:
        with spectral(model, config=LOSSLESS):
            cache = cache_of(result := generate(model, ids))
    assert torch.equal(result.sequences, expected)
    assert isinstance(cache, SpectralCache)
    check_whole(cache, result)


@pytest.mark.usefixtures("unrounded")
def test_the_next_turn_goes_on_with_the_refilled_cache() -> None:
    model = phi3()
    cache, text = SpectralCache(model, config=LOSSLESS), token_ids(length=50)
    # Within the first factors, across them by the prompt, behind them.
    for turn in range(3):
        expected = generate(model, text, use_cache=False).sequences
        result = generate(model, text, **cache_argument(cache))
        assert torch.equal(result.sequences, expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
        text = torch.cat([expected, token_ids(length=30, seed=turn + 1)], 1)


@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.usefixtures("unrounded")
def test_ways_to_generate_across_the_limit(ways: dict[str, Any], is_patched: bool) -> None:
    model, ids = phi3(), token_ids(length=LIMIT - 6)
    expected = generate(model, ids, use_cache=False, num_beams=ways.get("num_beams", 1)).sequences
    result = generate(model, ids, **ways, **given(model, is_patched))
    assert torch.equal(result.sequences, expected)
    assert cache_of(result).get_seq_length() >= expected.shape[1] - 1


def given(model: PreTrainedModel, is_patched: bool) -> dict[str, Any]:
    """A spectral cache for ``generate``, by an option or by patching ``model``."""
    if not is_patched:
        return cache_argument(SpectralCache(model, config=LOSSLESS))
    patch_unsloth_attention(model, config=LOSSLESS)
    return {}


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.usefixtures("unrounded")
def test_guesses_across_the_limit(is_patched: bool) -> None:
    model, ids, guessing = phi3(), token_ids(length=LIMIT - 6), {"assistant_model": build("Llama")}
    # Guesses across the limit have the text before them rotated anew too, before it is that long.
    dense = generate(model, ids, **guessing)
    result = generate(model, ids, **guessing, **given(model, is_patched))
    assert cache_of(result).get_seq_length() >= result.sequences.shape[1] - 1
    if cache_of(dense).get_seq_length() >= dense.sequences.shape[1] - 1:
        assert torch.equal(result.sequences, dense.sequences)


@pytest.mark.usefixtures("unrounded")
def test_a_padded_batch_across_the_limit() -> None:
    model, batch = phi3(), padded_batch(LIMIT - 6)
    expected = model.generate(**batch, max_new_tokens=24, do_sample=False, use_cache=False)
    cache = SpectralCache(model, config=LOSSLESS)
    assert torch.equal(model.generate(**batch, max_new_tokens=24, do_sample=False, **cache_argument(cache)), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


@torch.no_grad()
def test_a_refilled_cache_is_as_one_that_read_the_text_at_once() -> None:
    model = phi3()
    model.config.original_max_position_embeddings = 280
    model.model.rotary_emb.config.original_max_position_embeddings = 280
    ids = token_ids(length=270)
    refilled, at_once = (SpectralCache(model, config=SpectralConfig(preset="balanced", block_size=128)) for _ in "ab")
    text = generate(model, ids, max_new_tokens=12, **cache_argument(refilled)).sequences
    # The step of 281 tokens reads all of them again.
    model(text[:, :281], **cache_argument(at_once))
    for token in range(281, text.shape[1] - 1):
        model(text[:, token : token + 1], **cache_argument(at_once))
    assert refilled.get_seq_length() == at_once.get_seq_length() == text.shape[1] - 1
    last = text[:, -1:]
    assert torch.equal(model(last, **cache_argument(refilled)).logits, model(last, **cache_argument(at_once)).logits)
    assert refilled.stats().stored_bytes == at_once.stats().stored_bytes


@pytest.mark.usefixtures("unrounded")
def test_a_prefix_from_a_store_and_a_question_across_the_limit(tmp_path: Path) -> None:
    model, document = phi3(), token_ids(length=LIMIT - 6)
    text = torch.cat([document, token_ids(length=12, seed=4)], 1)
    expected = generate(model, text, use_cache=False).sequences
    store = PrefixStore(tmp_path)
    for _ in range(2):
        cache = store.prefill(model, document, config=LOSSLESS)
        assert cache.get_seq_length() == LIMIT - 7
        result = generate(model, text, **cache_argument(cache))
        assert torch.equal(result.sequences, expected)
        check_whole(cache, result)


@pytest.mark.parametrize("padding", [0, 3])
def test_new_tokens_alone_cannot_be_read_again(padding: int) -> None:
    model, first = phi3(), token_ids(length=40)
    cache, mask = SpectralCache(model, config=LOSSLESS), torch.ones(1, 140, dtype=torch.int64)
    mask[:, :padding] = 0
    with torch.no_grad():
        model(first, attention_mask=mask[:, :40], **cache_argument(cache))
    with pytest.raises(
        CacheBypassedError, match=r"drops the 40 tokens .* only 100 newer tokens: give generate the whole"
    ):
        generate(model, token_ids(length=100), attention_mask=mask, **cache_argument(cache))
    assert cache.get_seq_length() == 40


@pytest.mark.usefixtures("unrounded")
def test_a_prompt_in_pieces() -> None:
    model, ids = phi3(), token_ids(length=LIMIT + 30)
    # Pieces within the first factors never make transformers drop a cache: each is rotated as it comes.
    expected = generate(model, ids, prefill_chunk_size=40).sequences
    cache = SpectralCache(model, config=LOSSLESS)
    assert torch.equal(generate(model, ids, prefill_chunk_size=40, **cache_argument(cache)).sequences, expected)


@pytest.mark.usefixtures("unrounded")
def test_a_dense_cache_is_left_alone() -> None:
    model, ids = phi3(), token_ids(length=LIMIT - 6)
    expected = generate(model, ids).sequences
    SpectralCache(model, config=LOSSLESS)
    assert torch.equal(generate(model, ids).sequences, expected)
