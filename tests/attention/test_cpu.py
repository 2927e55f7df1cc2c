"""Every build of the kernel that runs here against the naive path."""

import copy
import dataclasses

import pytest
import torch
from coded import coded_block, exact, in_model_basis, random
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.attention import cpu, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.rank.block import RankBlock, seal
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.codec.spectral.allocate import widths_at
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import library

VARIANTS = [name for name in library.VARIANTS if library.load(name) is not None]
FRAMES = ("anchored", "rotated", "none")
pytestmark = pytest.mark.skipif(not VARIANTS, reason=f"no kernel here: {library.obstacle()}")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# Weights have 15 bits. Components of random widths have steps of all sizes, and the largest sets the weights' unit for
# codes up to 255; the codec's own widths have similar steps, and the error is a tenth of that.
TOLERANCE, TOLERANCE_OF_CODEC = 6e-3, 6e-4
# The AVX-512 build rounds the factors of codes of up to 3 bits to a byte, a 254th of the largest. Outputs here are
# means over hundreds of random tokens and thus much smaller than each token. A separate test compares this rounding
# with the error of the codes themselves.
ROUGH_TOLERANCE, ROUGH_TOLERANCE_OF_CODEC = 5e-2, 5e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(query, blocks, mask, options, variant, assert_close, of_codec: bool = False) -> None:
    if variant == "avx512":
        tolerance = ROUGH_TOLERANCE_OF_CODEC if of_codec else ROUGH_TOLERANCE
    else:
        tolerance = TOLERANCE_OF_CODEC if of_codec else TOLERANCE
    expected = naive.attend(query, blocks, mask, options)
    output = cpu.attend(query, blocks, mask, options, variant)
    assert output.shape == expected.shape
    assert output.dtype == torch.float32
    assert_close(output, expected, tolerance)


@every_variant
def test_masked_tokens_have_no_share_at_all(variant: str) -> None:
    """Their shares are exactly zero: arithmetic with denormal numbers takes many times as long."""
    values = torch.zeros(1, 1, 300, 64)
    values[:, :, 10:] = 3e38
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 10:] = False
    block = ExactBlock(random(1, 1, 300, 64, seed=1), values)
    assert not cpu.attend(random(1, 1, 1, 64, seed=2), [block], mask, ScoreOptions(0.1), variant).any()


@every_variant
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 16),
    head_dim=st.sampled_from([40, 60, 64, 80, 96, 128, 256]),
    frame=st.sampled_from(FRAMES),
    tokens=st.sampled_from([1, 63, 128, 500, 513, 1100]),
    value_nbits=st.integers(1, 8),
    query_length=st.sampled_from([1, 1, 1, 2, 5, 33]),
    mask_kind=st.sampled_from(["none", "none", "bool", "additive", "shared"]),
    softcap=st.sampled_from([None, 8.0]),
    with_sink_logits=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_naive_path(
    assert_close,
    variant,
    batch,
    heads,
    group,
    head_dim,
    frame,
    tokens,
    value_nbits,
    query_length,
    mask_kind,
    softcap,
    with_sink_logits,
    seed,
):
    blocks = [
        exact(batch, heads, 4, head_dim, seed=seed),
        coded_block(batch, heads, head_dim, tokens, frame, value_nbits, seed, rows=batch if seed % 2 else 1),
        exact(batch, heads, 70, head_dim, seed=seed + 1),
    ]
    query = random(batch, heads * group, query_length, head_dim, seed=seed)
    total = sum(block.num_tokens for block in blocks)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1 if mask_kind == "shared" else batch, 1, query_length, total, generator=generator) > 0.4
    if mask_kind == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -torch.inf)
    sink_logits = random(heads * group, seed=seed) if with_sink_logits else None
    options = ScoreOptions(head_dim**-0.5, softcap, sink_logits)
    check(query, blocks, None if mask_kind == "none" else mask, options, variant, assert_close)


@every_variant
@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("frame", FRAMES)
def test_every_width_alone(assert_close, variant: str, nbits: int, frame: str) -> None:
    widths = torch.full((2, 64), nbits)
    widths[1, 5:] = 0  # an odd number of components
    blocks = [coded_block(2, 2, 64, 300, frame, nbits, widths=widths)]
    check(random(2, 6, 1, 64), blocks, None, ScoreOptions(0.125), variant, assert_close)


@every_variant
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("level", [1e-1, 1e-3, 1e-5])
def test_error_under_the_widths_that_the_codec_gives(assert_close, variant: str, frame: str, level: float) -> None:
    variances = (9 * torch.arange(1, 65) ** -1.4).expand(2, -1)
    block = coded_block(2, 2, 64, 1000, frame, 4, widths=widths_at(level, variances, 1.1))
    assert block.keys.num_bits > 32
    check(random(2, 6, 1, 64), [block], None, ScoreOptions(0.125), variant, assert_close, of_codec=True)


@every_variant
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
@pytest.mark.parametrize("preset", ["small", "balanced", "quality"])
def test_the_kernel_adds_little_to_the_error_of_the_codes(variant: str, preset: str, sharpness: float) -> None:
    keys = random(1, 2, 1024, 64, seed=1) * torch.arange(1, 65) ** -0.7 + 0.5
    values, query = random(1, 2, 1024, 64, seed=2), sharpness * random(1, 6, 1, 64, seed=3)
    config, options = SpectralConfig(preset=preset), ScoreOptions(0.125)
    block = make_codec(config, 1).layer(0).seal(ExactBlock(keys, values), None, Observed())
    dense = naive.attend(query, [ExactBlock(keys, values)], None, options)
    coded = naive.attend(query, [block], None, options)
    output = cpu.attend(query, [block], None, options, variant)
    assert block.keys.num_bits < 2 * 64 * 4
    assert (output - coded).norm() < 0.1 * (coded - dense).norm()


@every_variant
@pytest.mark.parametrize("query_length", [1, 9])
def test_the_rows_of_a_models_basis(assert_close, variant: str, query_length: int) -> None:
    for nbits, dim in ((2, 64), (3, 40), (5, 128)):
        own = coded_block(1, 3, dim, 300, "anchored", nbits, seed=nbits)
        block, query = in_model_basis(own), random(1, 6, query_length, dim)
        check(query, [block], None, ScoreOptions(0.125), variant, assert_close)
        assert_close(block.keys.reconstruct(), own.keys.reconstruct(), 1e-6)


@every_variant
@pytest.mark.parametrize("frame", FRAMES)
def test_heads_without_any_component(assert_close, variant: str, frame: str) -> None:
    widths = torch.zeros(3, 64, dtype=torch.int64)
    widths[1, 7] = 3
    for widths_kept in (widths, torch.zeros_like(widths)):
        blocks = [coded_block(1, 3, 64, 200, frame, widths=widths_kept)]
        check(random(1, 6, 1, 64), blocks, None, ScoreOptions(0.125), variant, assert_close)


@every_variant
@pytest.mark.parametrize("frame", ["anchored", "rotated"])
def test_partial_and_interleaved_rotation(assert_close, variant: str, frame: str) -> None:
    blocks = [
        coded_block(1, 2, 64, 400, frame, pairs=12),
        coded_block(1, 2, 64, 256, frame, pairs=20, interleaved=True),
    ]
    check(random(1, 4, 1, 64), blocks, None, ScoreOptions(0.125), variant, assert_close)


@every_variant
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(assert_close, variant: str, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    special = exact(2, 2, 33, 60, dtype)
    special.keys[0, 0, 0, :4] = torch.tensor([6e-8, -1e-7, 0.0, 1e-5]).to(dtype)  # subnormal in half precision
    special = ExactBlock(special.keys, special.values.to(value_dtype))
    blocks = [special, coded_block(2, 2, 60, 300), exact(2, 2, 5, 60, dtype, seed=3)]
    check(random(2, 4, 1, 60).to(dtype), blocks, None, ScoreOptions(0.125), variant, assert_close)


@every_variant
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(assert_close, variant: str, threads: int) -> None:
    before = torch.get_num_threads()
    blocks = [exact(1, 3, 4, 64), coded_block(1, 3, 64, 2500), exact(1, 3, 100, 64)]
    torch.set_num_threads(threads)
    try:
        check(random(1, 9, 1, 64), blocks, None, ScoreOptions(0.125), variant, assert_close)
    finally:
        torch.set_num_threads(before)


@every_variant
def test_rows_that_see_nothing_give_zeros(variant: str) -> None:
    blocks = [exact(2, 2, 4, 64), coded_block(2, 2, 64, 700)]
    mask = torch.ones(2, 1, 1, 704, dtype=torch.bool)
    mask[1] = False
    output = cpu.attend(random(2, 4, 1, 64), blocks, mask, ScoreOptions(0.125), variant)
    assert not output[1].any()
    assert output[0].isfinite().all()
    assert output[0].any()


@every_variant
def test_what_is_not_finite_shows(variant: str) -> None:
    block = exact(1, 2, 10, 64)
    block.keys[0, 0, 3, 5] = torch.nan
    output = cpu.attend(random(1, 4, 1, 64), [block, coded_block(1, 2, 64, 200)], None, ScoreOptions(0.125), variant)
    assert output[0, :2].isnan().all()
    assert output[0, 2:].isfinite().all()


@every_variant
@pytest.mark.parametrize("frame", ["anchored", "rotated"])
def test_sharp_attention_finds_its_token(assert_close, variant: str, frame: str) -> None:
    """One token takes nearly all weight: the others' weights round to nothing, its own value stays exact."""
    block = coded_block(1, 1, 64, 1500, frame, 4, widths=torch.full((1, 64), 8))
    keys, values = block.reconstruct()
    longest = int(keys.norm(dim=-1).argmax())
    query = 50 * keys[:, :, longest : longest + 1] / keys[:, :, longest : longest + 1].norm()
    check(query, [block], None, ScoreOptions(1.0), variant, assert_close)
    output = cpu.attend(query, [block], None, ScoreOptions(1.0), variant)
    assert (output[0, 0, 0] - values[0, 0, longest]).norm() < 0.02 * values[0, 0, longest].norm()


@every_variant
def test_a_slice_and_a_copy_of_a_block(assert_close, variant: str) -> None:
    block = coded_block(2, 2, 64, 900)
    query, options = random(2, 4, 1, 64), ScoreOptions(0.125)
    check(query, [block], None, options, variant, assert_close)
    check(query, list(block.tiles(256)), None, options, variant, assert_close)
    twin = copy.deepcopy(block)
    del block
    check(query, [twin], None, options, variant, assert_close)
    mapped = twin.map_batch(lambda tensor: tensor[[1, 0, 1]])
    check(query[[1, 0, 1]], [mapped], None, options, variant, assert_close)


MALFORMED = {
    "streams too short": lambda block: {"keys": {"streams": block.keys.streams[:, :, :-1]}},
    "a tile missing": lambda block: {"keys": {"streams": block.keys.streams[:, :-1]}},
    "a carry missing": lambda block: {"keys": {"carries": block.keys.carries[:, :-1]}},
    "carries of another dtype": lambda block: {"keys": {"carries": block.keys.carries.int()}},
    "scales of another dtype": lambda block: {"keys": {"scales": block.keys.scales.int()}},
    "a basis row missing": lambda block: {"keys": {"vectors": block.keys.vectors[:, 1:]}},
    "widths that rise": lambda block: {"keys": {"widths": tuple(widths[::-1] for widths in block.keys.widths)}},
    "another mean": lambda block: {"keys": {"mean": block.keys.mean[..., :-1]}},
    "value streams too short": lambda block: {"values": {"streams": block.values.streams[..., :-1]}},
    "value carries too short": lambda block: {"values": {"carries": block.values.carries[..., :-1]}},
    "value scales too short": lambda block: {"values": {"scales": block.values.scales[..., :-1]}},
    "more tokens than there are": lambda block: {"keys": {"num_tokens": 400}, "values": {"num_tokens": 400}},
    "fewer values than keys": lambda block: {"values": {"num_tokens": 200}},
    "no such width": lambda block: {"values": {"nbits": 9}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_block_is_refused(name: str) -> None:
    block = coded_block(1, 2, 64, 300, widths=torch.arange(128).view(2, 64) % 9)
    changes = MALFORMED[name](block)
    parts = {part: dataclasses.replace(getattr(block, part), **new) for part, new in changes.items()}
    broken = dataclasses.replace(block, **parts)
    with pytest.raises(InvalidArgumentError, match="for the compiled kernel"):
        cpu.attend(random(1, 4, 1, 64), [broken], None, ScoreOptions(0.125))


def test_a_mask_or_query_that_does_not_fit_is_refused() -> None:
    block = coded_block(1, 2, 64, 300)
    with pytest.raises(InvalidArgumentError, match="mask"):
        cpu.attend(random(1, 4, 1, 64), [block], torch.ones(1, 1, 1, 299, dtype=torch.bool), ScoreOptions(0.125))
    with pytest.raises(InvalidArgumentError, match="head_dim"):
        cpu.attend(random(1, 4, 1, 60), [block], None, ScoreOptions(0.125))
    with pytest.raises(InvalidArgumentError, match="query heads"):
        cpu.attend(random(1, 5, 1, 64), [block], None, ScoreOptions(0.125))


@pytest.mark.parametrize("head_dim", [60, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_serves_exact_tokens_beside_coded_ones(head_dim: int, dtype: torch.dtype) -> None:
    blocks = [exact(1, 2, 5, head_dim, dtype), coded_block(1, 2, head_dim, 300), exact(1, 2, 70, head_dim, dtype)]
    assert cpu.obstacle(random(1, 4, 1, head_dim).to(dtype), blocks) is None


def test_exact_tokens_that_the_kernel_cannot_read_are_left_to_others() -> None:
    query, whole = random(1, 4, 1, 64), exact(1, 2, 5, 64)
    every_second = ExactBlock(random(1, 2, 5, 128)[..., ::2], whole.values)
    for block in (exact(1, 2, 5, 64, torch.float64), every_second, ExactBlock(whole.keys, whole.values.double())):
        assert "exact tokens" in (cpu.obstacle(query, [whole, block]) or "")


def test_what_the_kernel_leaves_to_others() -> None:
    block, query = coded_block(1, 2, 64, 300), random(1, 4, 1, 64)
    assert cpu.obstacle(query, [block]) is None
    assert "float64" in (cpu.obstacle(query.double(), [block]) or "")
    assert "no tokens" in (cpu.obstacle(query, [exact(1, 2, 0, 64)]) or "")
    assert "head_dim" in (cpu.obstacle(torch.randn(1, 4, 1, 320), [exact(1, 2, 5, 320)]) or "")
    assert "gradients" in (cpu.obstacle(query.clone().requires_grad_(), [block]) or "")
    uneven = dataclasses.replace(block.keys.rotation, step=None)
    other = dataclasses.replace(block, keys=dataclasses.replace(block.keys, rotation=uneven))
    assert "positions" in (cpu.obstacle(query, [other]) or "")
    ranked = seal(random(1, 2, 64, 64), random(1, 2, 64, 64), SpectralConfig(rank_keys=4, rank_values=4, block_size=64))
    assert isinstance(ranked, RankBlock)
    assert "codec" in (cpu.obstacle(query, [ranked]) or "")
