"""The Triton kernels against the naive path: on a GPU, or with TRITON_INTERPRET=1 on a CPU."""

import os
import random as python_random
from dataclasses import replace
from importlib.util import find_spec

import coded as cpu
import pytest
import torch

from unsloth_spectral.attention import gpu, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank.block import RankBlock, seal

IS_INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if gpu.missing() is not None and not IS_INTERPRETED:
    pytest.skip(f"no Triton kernel here: {gpu.missing()}", allow_module_level=True)

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
OBSTACLE = "queries on cpu" if IS_INTERPRETED else None
# Two products in half precision replace one in single precision; softmax is in single precision.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another."""
    if IS_INTERPRETED:
        monkeypatch.setattr(gpu, "_PROGRAMS", 6)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return cpu.random(*shape, seed=seed).to(DEVICE)


def exact(*args, **options) -> Block:
    return cpu.exact(*args, **options).map_batch(lambda tensor: tensor.to(DEVICE))


def coded(*args, **options) -> Block:
    block = cpu.coded_block(*args, **options).map_batch(lambda tensor: tensor.to(DEVICE))
    rotation = block.keys.rotation
    if rotation is not None and rotation.step is not None:
        # Rows that have it in common are not mapped.
        rotation = replace(rotation, unit=rotation.unit.to(DEVICE), step=rotation.step.to(DEVICE))
    return replace(block, keys=replace(block.keys, rotation=rotation))


def check(query, blocks, mask, options, assert_close, tolerance=TOLERANCE) -> None:
    assert gpu.obstacle(query, blocks) == OBSTACLE
    expected = naive.attend(query, blocks, mask, options)
    output = gpu.attend(query, blocks, mask, options)
    assert output.shape == expected.shape
    assert output.dtype == torch.float32
    assert_close(output, expected, tolerance)


def test_the_rows_of_a_models_basis(assert_close) -> None:
    block = cpu.in_model_basis(coded(1, 2, 64, 200, "anchored", 3, 0))
    check(random(1, 6, 2, 64), [block], None, ScoreOptions(0.125), assert_close)


@pytest.mark.parametrize("seed", range(6 if IS_INTERPRETED else 60))
def test_agrees_with_the_naive_path(assert_close, seed: int) -> None:
    draw = python_random.Random(seed)
    batch, heads, group = draw.randint(1, 2), draw.randint(1, 3), draw.choice([1, 3, 4, 8, 20])
    head_dim, tokens = draw.choice([40, 64, 80, 128]), draw.choice([1, 63, 128, 300 if IS_INTERPRETED else 1100])
    query_length = draw.choice([1, 1, 2, 5] if group < 8 else [1])
    mask_kind = draw.choice(["none", "none", "bool", "additive", "shared"])
    rows, frame = draw.choice([1, batch]), draw.choice(["anchored", "anchored", "rotated", "none"])
    interleaved, pairs = draw.random() < 0.3, draw.choice([None, 16])
    options = {"rows": rows, "interleaved": interleaved, "pairs": pairs}
    blocks = [
        exact(batch, heads, 4, head_dim, seed=seed),
        coded(batch, heads, head_dim, tokens, frame, draw.randint(1, 8), seed, **options),
        exact(batch, heads, draw.choice([70, 300]), head_dim, seed=seed + 1),
    ]
    if draw.random() < 0.3:
        blocks.insert(2, coded(batch, heads, head_dim, 200, frame, 3, seed + 2, **options))
    query = random(batch, heads * group, query_length, head_dim, seed=seed)
    total = sum(block.num_tokens for block in blocks)
    mask = random(1 if mask_kind == "shared" else batch, 1, query_length, total, seed=seed) > -0.3
    if mask_kind == "additive":
        mask = torch.where(mask, random(*mask.shape, seed=seed), -torch.inf)
    sink_logits = random(heads * group, seed=seed) if draw.random() < 0.5 else None
    options = ScoreOptions(head_dim**-0.5, draw.choice([None, 8.0]), sink_logits)
    check(query, blocks, None if mask_kind == "none" else mask, options, assert_close)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_every_width_alone(assert_close, nbits: int) -> None:
    widths = torch.full((2, 64), nbits)
    widths[1, 5:] = 0  # an odd number of components
    blocks = [coded(2, 2, 64, 300, "anchored", nbits, widths=widths)]
    check(random(2, 6, 1, 64), blocks, None, ScoreOptions(0.125), assert_close)


def test_heads_without_any_component(assert_close) -> None:
    widths = torch.zeros(3, 64, dtype=torch.int64)
    widths[1, 7] = 3
    for widths_kept in (widths, torch.zeros_like(widths)):
        blocks = [coded(1, 3, 64, 200, "anchored", widths=widths_kept)]
        check(random(1, 6, 1, 64), blocks, None, ScoreOptions(0.125), assert_close)


def test_slices_are_read_where_they_lie(assert_close) -> None:
    block = coded(2, 1, 64, 300, "anchored")
    pieces = [*block.tiles(128), exact(2, 1, 9, 64)]
    assert len(pieces) == 4
    check(random(2, 4, 1, 64), pieces, None, ScoreOptions(0.125), assert_close)


def test_a_row_that_may_attend_to_nothing_gets_zeros(assert_close) -> None:
    blocks = [coded(2, 1, 64, 200), exact(2, 1, 9, 64)]
    mask = torch.ones(2, 1, 1, 209, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    query = random(2, 2, 1, 64)
    check(query, blocks, mask, ScoreOptions(0.125), assert_close)
    assert not gpu.attend(query, blocks, mask, ScoreOptions(0.125))[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(assert_close, dtype: torch.dtype) -> None:
    blocks = [exact(1, 2, 4, 64, dtype), coded(1, 2, 64, 300), exact(1, 2, 33, 64, dtype)]
    check(random(1, 8, 1, 64).to(dtype), blocks, None, ScoreOptions(0.125), assert_close)


def test_what_it_leaves_to_others() -> None:
    query, sealed = random(1, 4, 1, 64), coded(1, 2, 64, 300)
    assert gpu.obstacle(query, [exact(1, 2, 9, 64)]) == "nothing sealed"
    assert "one by one" in gpu.obstacle(query, [coded(1, 2, 64, 300, "unrotated")])
    ranks = seal(*random(2, 1, 2, 64, 64), SpectralConfig(rank_keys=8, rank_values=8, block_size=64))
    assert isinstance(ranks, RankBlock)
    assert "RankBlock" in gpu.obstacle(query, [ranks, sealed])
    assert "gradients" in gpu.obstacle(query.requires_grad_(), [sealed])
    assert "head_dim" in gpu.obstacle(random(1, 4, 1, 512), [sealed])


def test_both_sides_cut_the_work_alike() -> None:
    from unsloth_spectral.attention import gpu_kernels

    assert (gpu_kernels.ROWS.value, gpu_kernels.CHUNK.value) == (gpu._ROWS, gpu._CHUNK)
