"""The competitors' codecs against slow plain versions, and the list of them."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.eval.methods import peers as peers_module
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.methods.lloyd_max import LloydMax, gaussian_codebook, rotation
from unsloth_spectral.eval.methods.peers import peers, unavailable
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

NAMES = [
    *("quanto 4", "quanto 2", "hqq 8", "hqq 4", "hqq 3", "hqq 2", "hqq 1", "kivi 4", "kivi 3", "kivi 2"),
    *("lloyd-max 4", "lloyd-max 3", "lloyd-max 2", "lloyd-max 1"),
    *("tiny-turboquant safe", "tiny-turboquant balanced", "tiny-turboquant compact", "tiny-turboquant aggressive"),
]
Codec = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
SHAPES = [(1, 2, 64, 16), (2, 1, 65, 60), (1, 3, 33, 80), (1, 1, 1, 7), (1, 2, 31, 64)]


def states(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with channels of unlike offset and size, as models have, and values without."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *shape, generator=generator)
    channels = torch.randn(2, shape[-1], generator=generator)
    return keys * channels[0].exp() + 5 * channels[1], values


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().sum() / expected.square().sum()).sqrt().item()


# KIVI


def plain_group(group: Tensor, nbits: int) -> Tensor:
    """A list of numbers by minimum, step and integers, one at a time."""
    levels = 2**nbits - 1
    zero = group.min().half().float().item()
    scale = ((group.max() - group.min()) / levels).half().float().item()
    codes = [min(max(round((x - zero) / scale), 0), levels) if scale else 0 for x in group.tolist()]
    return torch.tensor([code * scale + zero for code in codes])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_kivi_matches_a_loop_over_groups(shape: tuple[int, ...], nbits: int) -> None:
    keys, values = states(shape)
    keys_hat, values_hat, _ = Kivi(nbits)(keys, values)
    batch, heads, tokens, head_dim = shape
    for row in range(batch):
        for head in range(heads):
            for start in range(0, tokens, 32):
                for channel in range(head_dim):
                    window = (row, head, slice(start, start + 32), channel)
                    assert torch.allclose(keys_hat[window], plain_group(keys[window], nbits), atol=1e-5)
            for token in range(tokens):
                for start in range(0, head_dim, 32):
                    window = (row, head, token, slice(start, start + 32))
                    assert torch.allclose(values_hat[window], plain_group(values[window], nbits), atol=1e-5)


def test_kivi_bits_add_up_by_hand() -> None:
    keys, values = states((2, 3, 96, 64))
    elements = 2 * 3 * 96 * 64
    assert Kivi(2)(keys, values)[2] == 2 * (elements * 2 + elements // 32 * 32)
    assert Kivi(4, group=64)(keys[..., :64, :], values[..., :64, :])[2] == 2 * (2 * 3 * 64 * 64 * 4 + 2 * 3 * 64 * 32)
    # 33 tokens make two groups per channel, 60 channels two groups per token: a short group pays its metadata too.
    assert Kivi(3)(*states((1, 1, 33, 60)))[2] == 2 * 33 * 60 * 3 + (2 * 60 + 33 * 2) * 32


def test_kivi_suits_keys_with_large_channels() -> None:
    keys, _ = states((1, 2, 128, 64))
    by_channel, by_token, _ = Kivi(2)(keys, keys)
    assert relative_error(by_channel, keys) < 0.5 * relative_error(by_token, keys)


# Random rotation and Lloyd-Max


@pytest.mark.parametrize(("nbits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_codebook_has_the_known_distortion(nbits: int, distortion: float) -> None:
    """Of a standard Gaussian (Max 1960, table I), by integration on a fine grid."""
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    levels = torch.tensor(gaussian_codebook(nbits), dtype=torch.float64)
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert torch.trapezoid((x - nearest).square() * density, x).item() == pytest.approx(distortion, rel=1e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-9)
    if nbits == 1:
        assert levels[1].item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)


@pytest.mark.parametrize("head_dim", [1, 7, 60, 64, 80])
def test_rotation_is_orthogonal_and_repeatable(head_dim: int) -> None:
    rotation_matrix = rotation(head_dim, 0)
    assert torch.allclose(rotation_matrix @ rotation_matrix.mT, torch.eye(head_dim), atol=1e-5)
    rotation.cache_clear()
    with torch.inference_mode():
        again = rotation(head_dim, 0)
    assert torch.equal(rotation_matrix, again)
    assert not again.is_inference()
    assert head_dim == 1 or not torch.equal(rotation_matrix, rotation(head_dim, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
def test_lloyd_max_matches_a_loop_over_vectors(shape: tuple[int, ...], nbits: int) -> None:
    keys, values = states(shape)
    head_dim = shape[-1]
    rotation_matrix, levels = (
        rotation(head_dim, 0).double(),
        torch.tensor(gaussian_codebook(nbits), dtype=torch.float64),
    )
    for x, decoded in zip((keys, values), LloydMax(nbits)(keys, values), strict=False):
        misses = 0
        for vector, actual in zip(x.flatten(0, -2).double(), decoded.flatten(0, -2).double(), strict=True):
            norm = vector.norm()
            coordinates = vector / norm @ rotation_matrix * math.sqrt(head_dim)
            nearest = levels[(coordinates[:, None] - levels).abs().argmin(-1)]
            expected = nearest @ rotation_matrix.T / math.sqrt(head_dim) * norm.half().double()
            misses += not torch.allclose(actual, expected, atol=1e-4 * norm.item())
        # A coordinate on the edge between two levels may fall on either side of it in float32.
        assert misses <= 0.02 * x[..., 0].numel()


def test_lloyd_max_bits_add_up_by_hand() -> None:
    keys, values = states((2, 3, 65, 60))
    assert LloydMax(3)(keys, values)[2] == 2 * (2 * 3 * 65 * 60 * 3 + 2 * 3 * 65 * 16)


@pytest.mark.parametrize(("nbits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_reaches_the_gaussian_distortion_on_any_direction(nbits: int, distortion: float) -> None:
    spikes = torch.zeros(1, 1, 512, 128)
    spikes[..., torch.arange(512), torch.arange(512) % 128] = torch.linspace(0.1, 50, 512)
    keys_hat, values_hat, _ = LloydMax(nbits)(spikes, torch.randn(1, 1, 512, 128))
    assert relative_error(keys_hat, spikes) ** 2 == pytest.approx(distortion, rel=0.1)
    assert values_hat.isfinite().all()


# Both


CODECS: list[Callable[[int], Any]] = [Kivi, LloydMax]


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_fall_with_bits(make: Callable[[int], Codec], shape: tuple[int, ...]) -> None:
    keys, values = states(shape)
    decoded = [make(nbits)(keys, values) for nbits in (1, 2, 4, 6)]
    # A single token makes groups of one key: exact at any number of bits, but for float16.
    errors = [max(relative_error(result[0], keys), 1e-3) for result in decoded]
    assert errors == sorted(errors, reverse=True)
    errors = [relative_error(result[1], values) for result in decoded]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05
    assert all(result[0].shape == result[1].shape == shape for result in decoded)
    bits = [result[2] for result in decoded]
    assert bits == sorted(set(bits))


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("nbits", [1, 4])
def test_zeros_and_constants(make: Callable[[int], Codec], nbits: int) -> None:
    zeros = torch.zeros(1, 1, 40, 60)
    keys_hat, values_hat, _ = make(nbits)(zeros, zeros)
    assert torch.equal(keys_hat, zeros)
    assert torch.equal(values_hat, zeros)
    keys_hat, values_hat, _ = make(nbits)(zeros + 3.0, zeros - 1e-7)
    assert keys_hat.isfinite().all()
    assert values_hat.isfinite().all()
    if make is Kivi:
        assert torch.equal(keys_hat, zeros + 3.0)


@pytest.mark.parametrize("make", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_extremes_stay_finite(make: Callable[[int], Codec], dtype: torch.dtype) -> None:
    keys, values = (x.to(dtype) for x in states((1, 2, 40, 64)))
    keys_hat, values_hat, _ = make(4)(keys, values)
    assert keys_hat.dtype == values_hat.dtype == dtype
    huge = torch.full((1, 1, 32, 32), 1e30)
    huge[..., ::2, ::2] = -1e30
    assert all(x.isfinite().all() for x in make(4)(huge, huge)[:2])


@pytest.mark.parametrize("wrong", [lambda: Kivi(0), lambda: Kivi(9), lambda: LloydMax(0), lambda: LloydMax(7)])
def test_bits_are_checked(wrong: Callable[[], Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="nbits must be from 1 to"):
        wrong()
    with pytest.raises(InvalidArgumentError, match="group must be at least 1"):
        Kivi(4, group=0)


# The list


def test_every_name_runs_here_or_says_why_not() -> None:
    available, missing = peers(), unavailable()
    assert [name for name in NAMES if name not in missing] == list(available)
    assert [name for name in NAMES if name in missing] == list(missing)
    for name, method in available.items():
        assert (method.name, method.family) == (name, name.rsplit(" ", 1)[0])


def test_missing_packages_are_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "_is_installed", lambda module: module.startswith("hqq"))
    reason = "needs the package {0}, which is not installed: pip install {0}"
    assert unavailable() == {
        name: reason.format("optimum-quanto" if name.startswith("quanto") else "tiny-turboquant")
        for name in NAMES
        if name.startswith(("quanto", "tiny"))
    }
    assert [name for name in NAMES if not name.startswith(("quanto", "tiny"))] == list(peers())


def test_a_package_inside_a_missing_one_is_missing() -> None:
    assert not peers_module._is_installed("no_such_package.inside")
    assert not peers_module._is_installed("json.no_such_module")
    assert peers_module._is_installed("json.decoder")


def test_asking_for_the_list_imports_nothing_heavy() -> None:
    code = """
import sys
from unsloth_spectral.eval.methods.peers import peers, unavailable
assert len(peers()) + len(unavailable()) == 18
heavy = [name for name in ("transformers", "hqq", "optimum.quanto", "tiny_turboquant") if name in sys.modules]
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny")])
def test_every_method_makes_caches_and_counts_them(tiny_llama: Callable[..., Any], name: str) -> None:
    if name in unavailable():
        pytest.skip(unavailable()[name])
    model, method, nbits = tiny_llama(), peers()[name], int(name.rsplit(" ", 1)[1])
    cache = method.make_cache(model)
    assert method.footprint(cache).cold_bits_per_element is None
    ids = torch.randint(3, 128, (1, 197), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, **cache_argument(cache))
        footprint = method.footprint(cache)
        model(ids[:, :5], **cache_argument(cache))
    assert cache is not method.make_cache(model)
    assert footprint.dense_bytes == 2 * 2 * 2 * 197 * 16 * 4
    assert 0 < footprint.stored_bytes < footprint.dense_bytes
    assert footprint.cold_bits_per_element is not None
    assert nbits < footprint.cold_bits_per_element < 1.3 * (nbits + 1.5)  # 197 tokens fill four groups of 64
    # 197 - 4 - 64 = 129 tokens are old, 128 of them encoded; values of 16 channels make groups of 16.
    if name.startswith("kivi"):
        assert footprint.cold_bits_per_element == nbits + (32 / 32 + 32 / 16) / 2
    if name.startswith("lloyd-max"):
        assert footprint.cold_bits_per_element == nbits + 16 / 16
    if not name.startswith(("quanto", "hqq")):
        exact = 2 * 2 * 2 * 69 * 16 * 4
        assert footprint.stored_bytes == exact + 2 * 2 * 2 * 128 * 16 * footprint.cold_bits_per_element / 8


@pytest.mark.parametrize("preset", [("safe", 4, 4), ("balanced", 4, 3), ("compact", 3, 3), ("aggressive", 3, 2)])
def test_tiny_turboquant_counts_as_by_hand(tiny_llama: Callable[..., Any], preset: tuple[str, int, int]) -> None:
    name, key_bits, value_bits = preset
    if f"tiny-turboquant {name}" in unavailable():
        pytest.skip(unavailable()[f"tiny-turboquant {name}"])
    method, model = peers()[f"tiny-turboquant {name}"], tiny_llama(head_dim=64)
    cache = method.make_cache(model)
    assert method.footprint(cache).cold_bits_per_element is None
    ids = torch.randint(3, 128, (1, 330), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, **cache_argument(cache))
    # Two blocks of 128; a scale and a zero per channel of a block, and per token, of 32 channels in the last preset.
    elements = 2 * 2 * 256 * 64
    metadata = 32 * (elements // 128 + elements // (32 if name == "aggressive" else 64))
    cold_bytes = (elements * (key_bits + value_bits) + metadata) // 8
    footprint = method.footprint(cache)
    assert footprint.cold_bits_per_element == 8 * cold_bytes / (2 * elements)
    assert footprint.stored_bytes == cold_bytes + 2 * 2 * 2 * 74 * 64 * 4
    assert footprint.dense_bytes == 2 * 2 * 2 * 330 * 64 * 4


def test_tiny_turboquant_refuses_other_layers(tiny_llama: Callable[..., Any]) -> None:
    if "tiny-turboquant safe" in unavailable():
        pytest.skip(unavailable()["tiny-turboquant safe"])
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="has layers of type sliding_attention"):
        peers()["tiny-turboquant safe"].make_cache(model)
