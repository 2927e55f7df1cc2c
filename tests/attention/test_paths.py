"""The direct and the tiled path against the naive one, and the naive one against two references of its own."""

import pytest
import torch
from coded import random
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.attention import cpu, direct, dispatch, gpu, naive
from unsloth_spectral.attention.dispatch import DIRECT_QUERY_LENGTH, NATIVE_QUERY_LENGTH, rebuilt_tiles
from unsloth_spectral.attention.scores import ScoreOptions, causal_mask
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.rank.block import RankBlock
from unsloth_spectral.native import library

LAYOUTS = [
    [("exact", 1)],
    [("sealed", 63)],
    [("exact", 4), ("sealed", 63), ("exact", 1)],
    [("exact", 4), ("stacked", 500), ("exact", 63)],
    [("exact", 4), ("stacked", 126), ("exact", 63), ("sealed", 63), ("exact", 1)],
    [("stacked", 2), ("sealed", 1), ("exact", 500)],
]
MASKS = ["none", "bool", "additive", "causal", "left_padding", "shared"]


def make_mask(kind: str, batch: int, query_length: int, kv_length: int, seed: int) -> torch.Tensor | None:
    """A mask in which every row sees something."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, query_length, kv_length, generator=generator) > 0.4
    mask[..., -1] = True
    if kind == "none":
        return None
    if kind == "additive":
        return torch.where(mask, torch.randn(mask.shape, generator=generator), -torch.inf)
    if kind == "causal":
        return causal_mask(query_length, max(kv_length, query_length), mask.device)[..., -kv_length:]
    if kind == "left_padding":
        padding = torch.randint(0, kv_length, (batch, 1), generator=generator)
        return (torch.arange(kv_length) >= padding)[:, None, None].expand(-1, -1, query_length, -1)
    return mask[:1] if kind == "shared" else mask


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 7),
    head_dim=st.sampled_from([8, 60, 64, 80]),
    layout=st.sampled_from(LAYOUTS),
    query_length=st.sampled_from([1, 2, 7, 64, 65, 70]),
    mask_kind=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, 3.0]),
    with_sink_logits=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_path_agrees_with_the_naive_one(
    make_blocks,
    assert_close,
    batch,
    heads,
    group,
    head_dim,
    layout,
    query_length,
    mask_kind,
    softcap,
    with_sink_logits,
    seed,
):
    blocks = make_blocks(batch, heads, head_dim, layout, seed)
    query = random(batch, heads * group, query_length, head_dim, seed=seed)
    mask = make_mask(mask_kind, batch, query_length, sum(block.num_tokens for block in blocks), seed)
    sink_logits = random(heads * group, seed=seed) if with_sink_logits else None
    options = ScoreOptions(head_dim**-0.5, softcap, sink_logits)
    expected = naive.attend(query, blocks, mask, options)
    assert expected.shape == query.shape
    assert torch.isfinite(expected).all()
    assert_close(direct.attend(query, blocks, mask, options), expected, 1e-4)
    assert_close(direct.attend(query, rebuilt_tiles(blocks), mask, options), expected, 1e-4)
    assert_close(dispatch.attend(query, blocks, mask, options), expected, 1e-4)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sink_logits", [False, True])
def test_naive_is_the_textbook_softmax(
    make_blocks, reference, assert_close, mask_kind, softcap, with_sink_logits
) -> None:
    blocks = make_blocks(2, 3, 16, LAYOUTS[4])
    query = random(2, 15, 9, 16, seed=1)
    mask = make_mask(mask_kind, 2, 9, sum(block.num_tokens for block in blocks), 0)
    sink_logits = random(15, seed=2) if with_sink_logits else None
    options = ScoreOptions(0.25, softcap, sink_logits)
    assert_close(
        naive.attend(query, blocks, mask, options), reference(query, blocks, mask, 0.25, softcap, sink_logits), 1e-5
    )


@pytest.mark.parametrize("mask_kind", MASKS)
def test_naive_is_the_attention_of_torch(make_blocks, assert_close, mask_kind: str) -> None:
    blocks = make_blocks(2, 3, 60, LAYOUTS[3])
    query = random(2, 6, 9, 60, seed=1)
    keys, values = (torch.cat(part, -2) for part in zip(*(block.reconstruct() for block in blocks), strict=True))
    mask = make_mask(mask_kind, 2, 9, keys.shape[-2], 0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=0.1, enable_gqa=True
    )
    assert_close(naive.attend(query, blocks, mask, ScoreOptions(0.1)), expected, 1e-5)


def test_dispatch_takes_each_path(make_blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks(1, 2, 16, [("exact", 4), ("sealed", 63)])
    calls: list[list[type]] = []
    attend = direct.attend

    def spy(query, pieces, mask, options):
        pieces = list(pieces)
        calls.append([type(piece) for piece in pieces])
        return attend(query, pieces, mask, options)

    monkeypatch.setattr(dispatch.direct, "attend", spy)
    for query_length in (DIRECT_QUERY_LENGTH, DIRECT_QUERY_LENGTH + 1):
        dispatch.attend(random(1, 2, query_length, 16), blocks, None, ScoreOptions(0.25))
    assert calls == [[ExactBlock, RankBlock], [ExactBlock, ExactBlock]]


def test_the_compiled_kernel_takes_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [ExactBlock(torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 400, 4))]
    taken: list[int] = []

    def spy(query, *_):
        taken.append(query.shape[2])
        return query

    monkeypatch.setattr(dispatch.cpu, "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch.cpu, "attend", spy)
    for query_length in (1, NATIVE_QUERY_LENGTH, NATIVE_QUERY_LENGTH + 1):
        dispatch.attend(random(1, 1, query_length, 4), blocks, None, ScoreOptions(0.5))
    assert taken == [1, NATIVE_QUERY_LENGTH]


def test_every_path_is_listed_with_what_keeps_it_away() -> None:
    paths = {path.name: path.obstacle for path in dispatch.available_paths()}
    torch_alone = {"dense": None, "direct": None, "tiles": None}
    assert paths == {**torch_alone, "native": library.obstacle(), "triton": gpu.missing()}
    assert all(path.serves for path in dispatch.available_paths())


def test_the_rebuilt_tiles_never_hold_the_whole_cache(make_blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [*make_blocks(1, 1, 8, [("exact", 4), ("stacked", 500)]), *make_blocks(1, 1, 8, [("exact", 300)], seed=1)]
    monkeypatch.setattr(dispatch, "_REBUILT_TOKENS", 250)
    assert [tile.num_tokens for tile in rebuilt_tiles(blocks)] == [4, 250, 250, 250, 50]


@pytest.mark.parametrize("query_length", [3, 70])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_give_zeros(make_blocks, assert_close, query_length: int, additive: bool) -> None:
    blocks = make_blocks(2, 2, 16, LAYOUTS[4])
    kv_length = sum(block.num_tokens for block in blocks)
    mask = torch.ones(2, 1, query_length, kv_length, dtype=torch.bool)
    mask[0, :, 0] = False
    mask[1] = False
    mask[0, :, 1, 4:] = False  # sees the first block only
    mask[0, :, 2, :-1] = False  # sees the last token only
    query = random(2, 6, query_length, 16)
    mask_in_form = torch.where(mask, 0.0, -torch.inf) if additive else mask
    for output in (
        naive.attend(query, blocks, mask_in_form, ScoreOptions(0.25)),
        direct.attend(query, blocks, mask_in_form, ScoreOptions(0.25)),
        dispatch.attend(query, blocks, mask_in_form, ScoreOptions(0.25)),
    ):
        assert torch.isfinite(output).all()
        assert torch.equal(output[0, :, 0], torch.zeros(6, 16))
        assert torch.equal(output[1], torch.zeros(6, query_length, 16))
        assert (output[0, :, 1:].abs().amax(-1) > 0).all()
        last = blocks[-1].reconstruct()[1][0, :, -1].repeat_interleave(3, 0)
        assert_close(output[0, :, 2], last, 1e-5)


def test_sink_logits_also_join_rows_that_see_nothing(make_blocks) -> None:
    blocks = make_blocks(1, 2, 16, LAYOUTS[2])
    mask = torch.zeros(1, 1, 2, sum(block.num_tokens for block in blocks), dtype=torch.bool)
    options = ScoreOptions(0.25, sink_logits=torch.tensor([0.0, 100.0, -100.0, 5.0]))
    for attend in (naive.attend, direct.attend):
        assert torch.equal(attend(random(1, 4, 2, 16), blocks, mask, options), torch.zeros(1, 4, 2, 16))


def test_a_strong_sink_takes_all_weight(make_blocks, assert_close) -> None:
    blocks = make_blocks(1, 2, 16, LAYOUTS[2])
    query = random(1, 4, 2, 16)
    strong, weak = torch.full((4,), 60.0), torch.full((4,), -60.0)
    for attend in (naive.attend, direct.attend):
        assert attend(query, blocks, None, ScoreOptions(0.25, sink_logits=strong)).abs().max() < 1e-12
        plain = attend(query, blocks, None, ScoreOptions(0.25))
        assert_close(attend(query, blocks, None, ScoreOptions(0.25, sink_logits=weak)), plain, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("query_length", [2, 70])
def test_half_precision_queries_are_computed_in_float32(make_blocks, assert_close, dtype, query_length: int) -> None:
    blocks = make_blocks(2, 2, 64, LAYOUTS[4])
    query = random(2, 6, query_length, 64).to(dtype)
    options = ScoreOptions(0.125)
    computing = torch.promote_types(dtype, torch.float32)
    expected = naive.attend(query.to(computing), blocks, None, options)
    for output in (naive.attend(query, blocks, None, options), direct.attend(query, blocks, None, options)):
        assert output.dtype == computing
        assert_close(output, expected, 1e-4)
    answered = dispatch.attend(query, blocks, None, options)
    assert answered.dtype == dtype
    assert_close(answered, expected, 2 * torch.finfo(dtype).eps + 1e-4)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("query_length", [2, 70])
def test_extreme_scores_stay_finite(make_blocks, assert_close, size: float, query_length: int) -> None:
    blocks = make_blocks(1, 2, 16, LAYOUTS[4])
    kv_length = sum(block.num_tokens for block in blocks)
    query = random(1, 4, query_length, 16)
    mask = torch.zeros(1, 1, query_length, kv_length)
    mask[..., : kv_length // 2] = size
    options = ScoreOptions(0.25)
    expected = naive.attend(query, blocks, mask, options)
    hard = mask.sign() == mask.sign().amax(-1, keepdim=True)
    assert_close(expected, naive.attend(query, blocks, hard, options), 1e-2)
    for output in (
        direct.attend(query, blocks, mask, options),
        dispatch.attend(query, blocks, mask, options),
        direct.attend(query.half(), blocks, mask.half(), options),
    ):
        assert torch.isfinite(output).all()
        assert_close(output, expected, 1e-2)
    assert_close(
        direct.attend(query * 1e4, blocks, None, options), naive.attend(query * 1e4, blocks, None, options), 1e-3
    )


def test_the_lowest_number_masks_as_minus_infinity_does(make_blocks, assert_close) -> None:
    blocks = make_blocks(2, 2, 16, LAYOUTS[4])
    query = random(2, 4, 3, 16)
    mask = make_mask("bool", 2, 3, sum(block.num_tokens for block in blocks), 0)
    expected = direct.attend(query, blocks, mask, ScoreOptions(0.25))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        lowest = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
        assert_close(direct.attend(query, blocks, lowest, ScoreOptions(0.25)), expected, 1e-6)
        assert_close(naive.attend(query, blocks, lowest, ScoreOptions(0.25)), expected, 1e-4)


def test_inputs_are_left_alone(make_blocks) -> None:
    blocks = make_blocks(2, 2, 16, LAYOUTS[4])
    query, mask = random(2, 4, 3, 16), make_mask("additive", 2, 3, 257, 0)
    before = [query.clone(), mask.clone(), *(tensor.clone() for block in blocks for tensor in block.reconstruct())]
    for attend in (naive.attend, direct.attend, dispatch.attend):
        attend(query, blocks, mask, ScoreOptions(0.25, 3.0, torch.zeros(4)))
    after = [query, mask, *(tensor for block in blocks for tensor in block.reconstruct())]
    assert all(torch.equal(earlier, later) for earlier, later in zip(before, after, strict=True))


def test_a_change_in_one_token_is_seen(make_blocks) -> None:
    # Guards the comparisons above: were a block dropped by every path alike, they would still agree.
    blocks = make_blocks(1, 1, 16, LAYOUTS[4])
    query, options = random(1, 1, 1, 16), ScoreOptions(0.25)
    whole = direct.attend(query, blocks, None, options)
    for index in range(len(blocks)):
        assert not torch.allclose(direct.attend(query, blocks[:index] + blocks[index + 1 :], None, options), whole)


def test_attention_over_no_tokens_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no tokens"):
        direct.attend(random(1, 1, 1, 16), [], None, ScoreOptions(0.25))


def test_kernels_that_fail_on_a_gpu_are_left_for_good(make_blocks, monkeypatch, caplog) -> None:
    def attend(*_: object) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("no such card")

    calls: list[int] = []
    monkeypatch.setattr(gpu, "_failed", {})
    monkeypatch.setattr(gpu, "attend", attend)
    monkeypatch.setattr(gpu, "obstacle", lambda query, _: gpu._failed.get(query.device))
    monkeypatch.setattr(cpu, "obstacle", lambda *_: "none here")
    query, blocks = random(1, 2, 1, 64), make_blocks(1, 2, 64, [("exact", 4), ("sealed", 63)])
    expected = direct.attend(query, blocks, None, ScoreOptions(0.125))
    for _ in range(2):
        assert torch.equal(dispatch.attend(query, blocks, None, ScoreOptions(0.125)), expected)
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such card" in caplog.text
