"""Masks that users make themselves: tokens that no query has seen are padding, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, dense_cache, sealed_tokens, token_ids
from families.models import build

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.cache.tiers import NEVER
from unsloth_spectral.integrations.huggingface import visible
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.visible import visible_through

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda mask: mask,
    "lowest": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
    "infinity": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
NEAR = 1e-4


def causal(length: int, kv_length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, kv_length, dtype=torch.bool).tril(kv_length - length)


def documents(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions of texts side by side that do not see each other."""
    mask = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    return mask[None, None], torch.cat([torch.arange(length) for length in lengths])[None]


def logits(passes: list[dict[str, Any]], config: SpectralConfig | None) -> tuple[list[torch.Tensor], Any]:
    """What a Llama answers to ``passes``, one after another, with a cache of ``config`` or the library's own."""
    model = build("Llama")
    cache = dense_cache(model) if config is None else SpectralCache(model, config=config)
    with torch.no_grad():
        return [model(**inputs, **cache_argument(cache)).logits for inputs in passes], cache


def check(passes: list[dict[str, Any]], assert_close: Callable[..., None], rows: Any = slice(None)) -> None:
    (expected, _), (spectral_logits, cache) = logits(passes, None), logits(passes, LOSSLESS)
    assert min(sealed_tokens(cache)) > 0
    for answer, wanted in zip(spectral_logits, expected, strict=True):
        assert_close(answer[rows], wanted[rows], NEAR)


def question(num_cached: int, form: Callable[[torch.Tensor], torch.Tensor], rows: int = 1) -> dict[str, Any]:
    """Five tokens that see everything."""
    mask = form(causal(5, num_cached + 5).expand(rows, -1, -1, -1))
    position_ids = torch.arange(num_cached, num_cached + 5)[None]
    return {"input_ids": token_ids(rows, 5, seed=9), "attention_mask": mask, "position_ids": position_ids}


@forms
@pytest.mark.parametrize("lengths", [(60, 60), (50, 40, 30), (20, 100)])
def test_documents_that_do_not_see_each_other(
    form: Callable[[torch.Tensor], torch.Tensor],
    lengths: tuple[int, ...],
    unrounded: None,
    assert_close: Callable[..., None],
) -> None:
    mask, position_ids = documents(*lengths)
    first = {"input_ids": token_ids(1, 120), "attention_mask": form(mask), "position_ids": position_ids}
    check([first, question(120, form)], assert_close)


@forms
@pytest.mark.parametrize("first", [10, 20, 40])
def test_a_document_that_only_an_earlier_pass_sees(
    form: Callable[[torch.Tensor], torch.Tensor], first: int, unrounded: None, assert_close: Callable[..., None]
) -> None:
    """Sealed with the second pass or before, and read by the third."""
    hidden = causal(60, first + 60)
    hidden[..., :first] = False
    passes: list[dict[str, Any]] = [
        {"input_ids": token_ids(1, first)},
        {
            "input_ids": token_ids(1, 60, seed=1),
            "attention_mask": form(hidden),
            "position_ids": torch.arange(60)[None],
        },
        question(first + 60, form),
    ]
    check(passes, assert_close)


@forms
@pytest.mark.parametrize("hidden", [slice(30, 50), slice(90, 120)], ids=["in the middle", "at the end"])
def test_tokens_masked_elsewhere_stay_what_they_are(
    form: Callable[[torch.Tensor], torch.Tensor],
    hidden: slice,
    unrounded: None,
    assert_close: Callable[..., None],
) -> None:
    """They are not padding: a later query that sees them reads them."""
    mask = causal(120, 120).expand(2, -1, -1, -1).clone()
    mask[1, ..., hidden] = False
    first = {"input_ids": token_ids(2, 120), "attention_mask": form(mask)}
    check([first, question(120, form, rows=2)], assert_close)


@pytest.mark.parametrize("preset", ["quality", "balanced", "small", "tiny"])
def test_padding_on_the_right_leaves_the_other_rows_alone(preset: str) -> None:
    """The queries of padding are not asked, on whichever side it is. Rows share widths: codes differ, errors do not."""
    ids, mask = token_ids(2, 300), torch.ones(2, 300, dtype=torch.int64)
    mask[1, 40:] = 0
    _, cache = logits([{"input_ids": ids, "attention_mask": mask}], SpectralConfig(preset=preset))
    _, alone = logits([{"input_ids": ids[:1]}], SpectralConfig(preset=preset))
    seen = visible_through(causal(300, 300) & mask.bool()[:, None, None], 2)
    assert seen.asking is not None
    assert seen.asking.sum(1).tolist() == [300, 40]
    _, nearly_exact = logits([{"input_ids": ids[:1]}], SpectralConfig(bits_per_element=8))
    together, by_itself, expected = (filled.layers[0].spectral.reconstruct() for filled in (cache, alone, nearly_exact))
    for actual, other, exact in zip(together, by_itself, expected, strict=True):
        errors = [float((states[0] - exact[0]).norm() / exact.norm()) for states in (actual, other)]
        assert errors[0] < 1.02 * errors[1] + 1e-3


@pytest.mark.parametrize("length", [80, 300, 600])
def test_a_blank_prompt_in_a_batch(length: int) -> None:
    model, ids = build("Llama"), token_ids(3, length)
    mask = torch.ones_like(ids)
    for row, hidden in ((1, length), (2, 30)):
        ids[row, :hidden], mask[row, :hidden] = 0, 0
    cache = SpectralCache(model, config=SpectralConfig(bits_per_element=8))
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    out = model.generate(ids, **cache_argument(cache), **options)
    expected = build("Llama").generate(ids, **options)
    assert torch.equal(out[[0, 2], : length + 5], expected[[0, 2], : length + 5])
    assert cache.stats().exact_blocks == 0
    if length >= 300:
        assert min(sealed_tokens(cache)) > 0
        rotation = cache.layers[0].spectral.blocks[1].keys.rotation
        assert rotation.is_even, "a blank row stands anywhere"


@forms
def test_what_a_mask_lets_queries_see(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mask = causal(4, 6).expand(4, -1, -1, -1).clone()
    mask[1, ..., :3] = False  # left padding, of one query too
    mask[2] = False
    mask[3, ..., 5] = False  # right padding
    seen = visible_through(form(mask), 4)
    assert seen.first.tolist() == [0, 3, NEVER, 0]
    assert seen.asking is not None
    assert seen.asking.tolist() == [[True] * 4, [False, True, True, True], [False] * 4, [True, True, True, False]]
    everyone = visible_through(form(causal(4, 6)), 3)
    assert everyone.first.tolist() == [0] * 3
    assert everyone.asking is None
    assert visible_through(None, 2).first.tolist() == [0, 0]


def test_a_bias_hides_nothing() -> None:
    """An additive mask may hold distances."""
    bias = -torch.arange(10.0).expand(1, 1, 10, 10).flip(-1)
    assert visible_through(bias, 1).first.tolist() == [0]


def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, read = [], visible._read
    monkeypatch.setattr(visible, "_read", lambda *args: calls.append(args) or read(*args))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :9] = 0
    logits([{"input_ids": token_ids(2, 40), "attention_mask": mask}], LOSSLESS)
    assert len(calls) == 1
    changed_mask = causal(4, 4).clone()
    assert visible_through(changed_mask, 1).first.tolist() == [0]
    changed_mask[..., :2] = False
    assert visible_through(changed_mask, 1).first.tolist() == [2], "a mask changed in place is another"
