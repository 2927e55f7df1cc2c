"""Coded keys: close to the dense ones, unbiased, and the same whole, sliced, appended or in scores."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from unsloth_spectral.codec.spectral import keys as codec
from unsloth_spectral.codec.spectral import trellis
from unsloth_spectral.codec.spectral.keys import KeyCodes, KeyPlan
from unsloth_spectral.codec.spectral.metric import query_metric
from unsloth_spectral.codec.spectral.packing import unpack
from unsloth_spectral.codec.spectral.statistics import KeyStatistics, centre, covariance, principal_basis
from unsloth_spectral.codec.tensors import TokenShape
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten
from unsloth_spectral.rope import Rotation, Spans, anchors_of, own_anchors, rotate, spans_of, unrotate

BATCH, HEADS = 2, 3
# Keys un-rotated by anchors, by their own rotation (as in records of chunks), not at all, and those without rotation.
FRAMES = ["anchored", "unrotated", "rotated", "none"]
frames = pytest.mark.parametrize("frame", FRAMES)
# 8 bits: relative error of a component about 1 %, of a scale 1.1 %, and the rounding of the basis.
NEAR = 0.025


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation_of(tokens: int, head_dim: int, start: int = 0) -> Rotation:
    """A rotation of the first three quarters of the dimensions."""
    pairs = head_dim * 3 // 8
    angle = torch.arange(start, start + tokens)[:, None] * 100.0 ** (-torch.arange(pairs) / pairs)
    first = torch.arange(pairs)
    return Rotation.of(torch.polar(torch.ones_like(angle), angle)[None], first, first + pairs)


def spans_in(frame: str, rotation: Rotation | None) -> Spans:
    """The spans of a block in ``frame``."""
    if frame == "anchored":
        return spans_of(rotation)
    if frame == "unrotated":
        return own_anchors(rotation)
    return () if rotation is None else (0,) * rotation.num_pairs


def dense_keys(tokens: int, head_dim: int, heads: int, frame: str, start: int = 0, seed: int = 0) -> Any:
    """Keys as a model caches them, with a large mean before rotation, and their rotation."""
    mix = random(BATCH, heads, head_dim, head_dim, seed=1) / head_dim**0.5
    x = random(BATCH, heads, tokens, head_dim, seed=100 + seed + start) @ mix + 3 * random(BATCH, heads, 1, head_dim)
    if frame == "none":
        return x, None
    rotation = rotation_of(tokens, head_dim, start)
    return rotate(x, rotation.table()[:, None], rotation), rotation


def encoded(
    keys: torch.Tensor,
    rotation: Rotation | None,
    frame: str,
    widths: torch.Tensor | int = 8,
    real: torch.Tensor | None = None,
    plan: KeyPlan | None = None,
    mean: torch.Tensor | None = None,
    carries: torch.Tensor | None = None,
) -> tuple[KeyCodes, KeyPlan, torch.Tensor, torch.Tensor]:
    """The codes, their plan, what was coded, and the metric."""
    heads, head_dim = keys.shape[1], keys.shape[-1]
    spans = spans_in(frame, rotation)
    x, mean = centre(keys, mean, rotation, spans, real)
    metric = query_metric(random(1, heads, 4 * head_dim, head_dim, seed=9) * torch.logspace(-0.3, 0.3, head_dim))
    if isinstance(widths, int):
        widths = torch.full((heads, head_dim), widths)
    if plan is None:
        plan = codec.plan(principal_basis(covariance(x), metric), widths, 0.1)
    statistics = KeyStatistics(x, mean, covariance(x), metric, rotation, spans, torch.ones(len(x)))
    codes, plan = codec.encode(statistics, plan, carries)
    return codes, plan, x, metric


def requantized(coefficients: torch.Tensor, widths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """``coefficients [B, C, n]`` as they come back at the scales that project exactly onto them, and those scales."""
    coded = codec.quantize(coefficients, widths, codec.CLIPS)
    scales = coded.energies / coded.overlaps.clamp_min(torch.finfo(torch.float32).tiny)
    hat = codec.dequantize(unpack(coded.streams, coded.carries, widths), widths, scales)
    return hat[..., : coefficients.shape[-1]], scales


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@frames
@pytest.mark.parametrize(
    ("head_dim", "heads", "tokens"), [(64, 3, 136), (60, 1, 128), (80, 2, 1000), (16, 1, 8), (64, 1, 1000)]
)
def test_eight_bits_are_near_lossless(frame: str, head_dim: int, heads: int, tokens: int) -> None:
    keys, rotation = dense_keys(tokens, head_dim, heads, frame)
    codes, _, x, metric = encoded(keys, rotation, frame)
    rebuilt = codes.reconstruct()
    assert rebuilt.shape == keys.shape
    assert rebuilt.dtype == torch.float32
    assert (codes.num_tokens, codes.num_key_value_heads, codes.num_bits) == (tokens, heads, 8 * heads * head_dim)
    assert ((rebuilt - keys).norm(dim=(-2, -1)) / x.norm(dim=(-2, -1)) < NEAR).all()
    error = rebuilt - keys
    if rotation is not None:
        error = unrotate(error, anchors_of(rotation, codes.spans)[:, None], rotation)
    lost = ((error @ metric) * error).sum((-2, -1)) / ((x @ metric) * x).sum((-2, -1))
    assert torch.allclose(codes.relative_error.float(), lost.sqrt(), rtol=0.02)


@frames
def test_the_error_falls_with_the_bits(frame: str) -> None:
    keys, rotation = dense_keys(256, 64, HEADS, frame)
    errors = [float(encoded(keys, rotation, frame, nbits)[0].relative_error.max()) for nbits in range(1, 9)]
    assert all(after < 0.68 * before for before, after in pairwise(errors[:7]))
    assert errors[7] < errors[6]
    assert errors[0] < 0.85
    assert [errors[1] < 0.4, errors[3] < 0.13, errors[7] < NEAR] == [True] * 3


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1e2])
def test_the_size_of_the_keys_does_not_matter(size: float) -> None:
    keys, _ = dense_keys(256, 64, HEADS, "none")
    keys = keys - keys.mean(-2, keepdim=True)
    assert float(encoded(size * keys, None, "none")[0].relative_error.max()) < NEAR


@pytest.mark.parametrize("nbits", [1, 2, 3, 5, 8])
def test_scales_are_unbiased(nbits: int, assert_close: Callable[..., None]) -> None:
    coefficients = random(BATCH, 5, 300) * torch.logspace(-2, 2, 5)[:, None]
    coefficients[..., 7] *= 20
    hat, scales = requantized(coefficients, (nbits,) * 5)
    assert hat.shape == (BATCH, 5, 300)
    assert scales.shape == (BATCH, 5, 3)
    for start in (0, 128, 256):
        part, coded = coefficients[..., start : start + 128], hat[..., start : start + 128]
        assert_close((part * coded).sum(-1) / part.square().sum(-1), torch.ones(BATCH, 5), 1e-4)
    # As stored the scales are rounded, to 1/32 of an octave.
    keys, _ = dense_keys(256, 16, 1, "none")
    encoded_keys, plan, x, metric = encoded(keys, None, "none", nbits)
    exact = x @ codec.projection((plan.vectors.float() * plan.row_scales)[:, None], metric)
    stored = encoded_keys.components()[0] * (plan.vector_scales / plan.row_scales)[:, None]
    both = (exact.mT * stored).unflatten(-1, (-1, 128)).sum(-1)
    ratio = both / exact.mT.square().unflatten(-1, (-1, 128)).sum(-1)
    assert_close(ratio, torch.ones_like(ratio), 0.35 / 32 + 1e-4)
    assert abs(float(ratio.mean()) - 1) < 0.004


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_quantize_beats_not_clipping_where_one_coefficient_is_huge(nbits: int) -> None:
    coefficients, half = random(1, 1, 128), 1 << (nbits - 1)
    coefficients[..., 0] = 12
    step = coefficients.abs().max() / half
    unclipped = ((coefficients / step).floor() + 0.5).clamp(0.5 - half, half - 0.5) * step
    actual, _ = requantized(coefficients, (nbits,))
    assert (actual - coefficients).norm() < 0.9 * (unclipped - coefficients).norm()


def test_a_group_of_zeros_stays_zero() -> None:
    coefficients = random(1, 2, 256)
    coefficients[:, 1, 128:] = 0
    for widths in ((4, 2), (8, 5)):
        hat, scales = requantized(coefficients, widths)
        assert scales.isfinite().all()
        assert not hat[:, 1, 128:].any()
        assert hat[:, 1, :128].any()


def uneven_widths(heads: int, head_dim: int) -> torch.Tensor:
    widths = (torch.arange(head_dim).flip(0) * 9 // head_dim).expand(heads, -1).clone()
    widths[-1] = widths[-1] // 2
    return widths


@frames
@pytest.mark.parametrize(("head_dim", "heads", "tokens"), [(64, 3, 200), (60, 1, 136)])
def test_scores_are_products_with_the_reconstruction(
    frame: str, head_dim: int, heads: int, tokens: int, assert_close: Callable[..., None]
) -> None:
    keys, rotation = dense_keys(tokens, head_dim, heads, frame)
    codes = encoded(keys, rotation, frame, uneven_widths(heads, head_dim))[0]
    query = random(BATCH, heads, 7, head_dim, seed=5)
    assert_close(codes.scores(query), query @ codes.reconstruct().mT, 1e-4)
    assert codes.scores(query.bfloat16()).dtype == torch.bfloat16
    assert relative(codes.scores(query), query @ keys.mT) < 0.3


def test_scores_with_a_table_that_scales_and_has_rows(assert_close: Callable[..., None]) -> None:
    tokens, head_dim = 136, 16
    angle = torch.stack([torch.arange(tokens), (torch.arange(tokens) - 40).clamp_min(1)])[..., None] * torch.rand(8)
    rotation = Rotation.of(torch.polar(torch.full_like(angle, 1.3), angle), torch.arange(8), torch.arange(8) + 8)
    x = random(BATCH, HEADS, tokens, head_dim) + 3 * random(BATCH, HEADS, 1, head_dim, seed=1)
    keys = rotate(x, rotation.table()[:, None], rotation)
    query = random(BATCH, HEADS, 3, head_dim, seed=5)
    for frame in ("anchored", "unrotated", "rotated"):
        codes = encoded(keys, rotation, frame)[0]
        assert relative(codes.reconstruct(), keys) < NEAR
        assert_close(codes.scores(query), query @ codes.reconstruct().mT, 1e-4)


@frames
@pytest.mark.parametrize(("start", "stop"), [(0, 400), (0, 3), (128, 400), (256, 321)])
def test_a_slice_is_that_part(frame: str, start: int, stop: int, assert_close: Callable[..., None]) -> None:
    keys, rotation = dense_keys(400, 16, HEADS, frame)
    codes = encoded(keys, rotation, frame, uneven_widths(HEADS, 16))[0]
    part, query = codes.slice(start, stop), random(BATCH, HEADS, 2, 16)
    assert part.num_tokens == stop - start
    assert_close(part.reconstruct(), codes.reconstruct()[..., start:stop, :], 1e-3)
    assert_close(part.scores(query), codes.scores(query)[..., start:stop], 1e-3)
    assert part.streams.untyped_storage().data_ptr() == codes.streams.untyped_storage().data_ptr()


@frames
def test_appended_keys_follow(frame: str, assert_close: Callable[..., None]) -> None:
    keys, rotation = dense_keys(256, 16, HEADS, frame)
    later, then = dense_keys(136, 16, HEADS, frame, start=256)
    first, plan, _, _ = encoded(keys, rotation, frame, uneven_widths(HEADS, 16))
    second, same, _, _ = encoded(later, then, frame, plan=plan, mean=first.mean, carries=first.carries_at(256))
    assert same.vectors is plan.vectors
    assert same.vector_scales is plan.vector_scales is second.vector_scales
    joined = first.append(second)
    assert joined.num_tokens == 392
    assert_close(joined.reconstruct(), torch.cat([first.reconstruct(), second.reconstruct()], -2), 1e-3)
    query = random(BATCH, HEADS, 2, 16)
    assert_close(joined.scores(query), torch.cat([first.scores(query), second.scores(query)], -1), 1e-3)
    shares = first.relative_error.float().square() * 256 + second.relative_error.float().square() * 136
    assert_close(joined.relative_error, (shares / 392).sqrt(), 1e-2)
    if rotation is not None:
        assert joined.rotation is not None
        assert joined.rotation.is_even, "positions that run on stay a few numbers"


@frames
def test_map_acts_on_rows(frame: str, assert_close: Callable[..., None]) -> None:
    keys, rotation = dense_keys(136, 16, HEADS, frame)
    codes = encoded(keys, rotation, frame, 5)[0]
    mapped = codes.map(lambda tensor: tensor[[1, 0, 1]])
    assert_close(mapped.reconstruct(), codes.reconstruct()[[1, 0, 1]], 1e-5)
    assert relative(mapped.reconstruct()[:1], keys[1:]) < 0.1


@frames
def test_nbytes_are_those_of_the_storages(frame: str) -> None:
    keys, rotation = dense_keys(1000, 64, HEADS, frame)
    widths = uneven_widths(HEADS, 64)
    codes = encoded(keys, rotation, frame, widths)[0]
    tensors = [getattr(codes, field.name) for field in dataclasses.fields(codes)]
    held_bytes = sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
    assert codes.nbytes == held_bytes
    components = int((widths > 0).sum())
    # 1,000 tokens in eight tiles of 16 bytes a bit; a component has eight scales, a carry and a row of the basis.
    expected = int(widths.sum()) * 128 + components * (8 + 1 + 64 + 4) + 2 * HEADS * 64 + 2 * HEADS
    assert held_bytes == BATCH * expected
    assert codes.num_bits == int(widths.sum())


@frames
def test_padding_changes_nothing_for_others(frame: str, assert_close: Callable[..., None]) -> None:
    keys, rotation = dense_keys(256, 16, HEADS, frame)
    real = torch.ones(BATCH, 256, dtype=torch.bool)
    real[1, :100] = False
    garbage, zeros = keys.clone(), keys.clone()
    garbage[1, :, :100] = 1e3 * random(HEADS, 100, 16, seed=8)
    zeros[1, :, :100] = 0
    first, second = (encoded(k, rotation, frame, 4, real=real)[0] for k in (garbage, zeros))
    assert torch.equal(first.streams, second.streams)
    assert torch.equal(first.mean, second.mean)
    assert_close(first.reconstruct(), second.reconstruct(), 1e-6)
    assert relative(first.reconstruct()[1, :, 100:], keys[1, :, 100:]) < 0.06
    # Row 0 has no padding: as if there were none.
    assert torch.equal(first.streams[0], encoded(keys, rotation, frame, 4)[0].streams[0])


@frames
def test_padding_takes_no_mean(frame: str) -> None:
    keys, rotation = dense_keys(256, 16, HEADS, frame)
    real = torch.zeros(BATCH, 256, dtype=torch.bool)
    x, mean = centre(keys, None, rotation, spans_in(frame, rotation), real)
    assert not x.any()
    assert not mean.any()
    real[:, 56:] = True
    x, mean = centre(keys, None, rotation, spans_in(frame, rotation), real)
    assert not x[:, :, :56].any()
    if frame in ("unrotated", "none"):  # the others rotate the rest
        assert x[:, :, 56:].mean(-2).abs().max() < 0.01
    centred, same = centre(keys, mean, rotation, spans_in(frame, rotation), None)
    assert same is mean
    assert torch.equal(centred[:, :, 56:], x[:, :, 56:])


@frames
def test_no_components_leave_the_mean(frame: str, assert_close: Callable[..., None]) -> None:
    keys, rotation = dense_keys(136, 16, HEADS, frame)
    codes, _, x, _ = encoded(keys, rotation, frame, 0)
    assert codes.num_bits == 0
    assert codes.streams.numel() == 0
    # The contribution of the coefficients is missing.
    back = x if rotation is None else rotate(x, anchors_of(rotation, codes.spans)[:, None], rotation)
    assert_close(codes.reconstruct() + back, keys, 1e-3)
    query = random(BATCH, HEADS, 2, 16)
    assert_close(codes.scores(query), query @ codes.reconstruct().mT, 1e-4)
    assert torch.allclose(codes.relative_error.float(), torch.ones(BATCH, HEADS), atol=1e-3)


@frames
def test_a_head_without_components(frame: str) -> None:
    keys, rotation = dense_keys(136, 16, HEADS, frame)
    widths = torch.full((HEADS, 16), 8)
    widths[1] = 0
    codes, _, x, _ = encoded(keys, rotation, frame, widths)
    error = (codes.reconstruct() - keys).norm(dim=(-2, -1)) / x.norm(dim=(-2, -1))
    assert (error[:, [0, 2]] < NEAR).all()
    assert torch.allclose(error[:, 1], torch.ones(BATCH), atol=1e-2)


def test_zero_keys() -> None:
    codes = encoded(torch.zeros(BATCH, HEADS, 128, 16), None, "none", 3)[0]
    assert not codes.reconstruct().any()
    assert not codes.relative_error.any()


def test_the_rounded_basis_costs_hardly_anything() -> None:
    keys, _ = dense_keys(1000, 64, HEADS, "none")
    coded, _, x, metric = encoded(keys, None, "none", 4)
    basis = principal_basis(covariance(x), metric)
    exact = (x.double() @ torch.linalg.inv(basis.vectors.double())).float().mT.flatten(1, 2)
    lost = (requantized(exact, (4,) * (HEADS * 64))[0] - exact).norm() / exact.norm()
    assert float(coded.relative_error.mean()) < 1.03 * float(lost)


def test_helpers() -> None:
    assert codec.flat_widths(((8, 3), (), (1,))) == (8, 3, 1)
    expected = codec.expected_error(torch.tensor([[4.0, 2.0, 1.0]]), torch.tensor([[2, 1, 0]]))
    of_one_bit, of_two_bits = trellis.tables().distortions[:2]
    assert float(expected) == pytest.approx(4 * of_two_bits + 2 * of_one_bit + 1)


@frames
def test_stored_keys_come_back(frame: str) -> None:
    keys, rotation = dense_keys(200, 16, HEADS, frame)
    codes = encoded(keys, rotation, frame, uneven_widths(HEADS, 16))[0]
    tree, tensors = flatten(codes.to_fields())
    shape = TokenShape(BATCH, HEADS, 16, 16, torch.float32, torch.float32)

    def read(**changed: Any) -> KeyCodes:
        return KeyCodes.from_fields(Fields({**tree, **changed}, lambda number, _: tensors[number]), shape)

    assert torch.equal(read().reconstruct(), codes.reconstruct())
    with pytest.raises(LoadError, match="a span for each rotary pair"):
        read(spans=[*codes.spans, 0])
    if rotation is not None:
        with pytest.raises(LoadError, match="spans among 0, 1"):
            read(spans=[33, *codes.spans[1:]])
