"""Every build of the encoding kernel against torch's passes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from unsloth_spectral.codec.spectral import kernel
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.packing import last_bytes, pack, unpack
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import library

VARIANTS = [name for name in library.VARIANTS if library.load(name) is not None]
pytestmark = pytest.mark.skipif(not VARIANTS, reason=f"no kernel here: {library.obstacle()}")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers with rare huge ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.where(torch.rand(shape, generator=generator) < 0.01, 12.0, 1.0)


WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1, 1, 4, 3, 2, 1)


def some_carries(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@every_variant
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 63), (1, 128), (3, 500)])
def test_keys(assert_close, variant: str, batch: int, tokens: int, goes_on: bool) -> None:
    coefficients = heavy(batch, len(WIDTHS), tokens) * torch.logspace(-3, 3, len(WIDTHS))[:, None]
    coefficients[:, 3] = 0
    coefficients[:, 6] = 0
    carries = some_carries(batch, len(WIDTHS)) if goes_on else None
    expected = key_codec.quantize(coefficients, WIDTHS, key_codec.CLIPS, carries)
    actual = kernel.encode_keys(coefficients, WIDTHS, key_codec.CLIPS, carries, variant)
    assert torch.equal(actual.streams, expected.streams)
    assert torch.equal(actual.carries, expected.carries)
    for name in ("energies", "overlaps", "squares"):
        assert_close(getattr(actual, name), getattr(expected, name), 1e-6)


@every_variant
def test_sums_are_those_of_the_reconstruction(assert_close, variant: str) -> None:
    coefficients = heavy(2, len(WIDTHS), 300)
    encoded = kernel.encode_keys(coefficients, WIDTHS, key_codec.CLIPS, variant=variant)
    windows = unpack(encoded.streams, encoded.carries, WIDTHS)
    reconstructed = key_codec.dequantize(windows, WIDTHS, torch.ones(2, len(WIDTHS), 3))[..., :300]
    for measured, product in (
        (encoded.energies, coefficients.square()),
        (encoded.overlaps, coefficients * reconstructed),
        (encoded.squares, reconstructed.square()),
    ):
        groups = torch.nn.functional.pad(product, (0, 84)).unflatten(-1, (-1, 128))
        assert_close(measured, groups.sum(-1), 1e-5)


@every_variant
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 300), (60, 128), (40, 1), (128, 63)])
def test_values(assert_close, variant: str, nbits: int, head_dim: int, tokens: int, goes_on: bool) -> None:
    rotated = heavy(2, 3, head_dim, tokens)
    rotated[0, 1, :, 0] = 0
    carries = some_carries(2, 3, head_dim) if goes_on else None
    expected = value_codec.quantize(rotated, nbits, carries)
    actual = kernel.encode_values(rotated, nbits, carries, variant)
    widths = (nbits,) * (3 * head_dim)
    windows = [unpack(part.streams, part.carries.flatten(1), widths)[..., :tokens] for part in (actual, expected)]
    # Energies are summed in another order: a number on the edge of two codes may fall to either side.
    assert (windows[0] != windows[1]).float().mean() < 1e-3
    for name in ("energies", "overlaps", "squares"):
        assert_close(getattr(actual, name), getattr(expected, name), 1e-4)
    # What fills up the last tile is code 0, as `pack` has it.
    assert torch.equal(pack(windows[0] >> (8 - nbits), widths), actual.streams)


@pytest.mark.skipif(len(VARIANTS) < 2, reason="one build alone")
@pytest.mark.parametrize("tokens", [1, 130, 1024, 2100])
def test_every_build_gives_the_same_codes_bit_for_bit(tokens: int) -> None:
    coefficients, rotated = heavy(1, len(WIDTHS), tokens), heavy(1, 1, 24, tokens)
    keys = [kernel.encode_keys(coefficients, WIDTHS, key_codec.CLIPS, variant=variant) for variant in VARIANTS]
    assert all(torch.equal(a, b) for other in keys[1:] for a, b in zip(keys[0], other, strict=True))
    for nbits in (1, 2, 3, 4, 8):
        values = [kernel.encode_values(rotated, nbits, variant=variant) for variant in VARIANTS]
        assert all(torch.equal(a, b) for other in values[1:] for a, b in zip(values[0], other, strict=True))


@every_variant
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("tokens", [100, 256])
def test_numbers_that_cannot_be_coded_do_not_depend_on_other_components(
    variant: str, number: float, tokens: int
) -> None:
    """Nor do they disturb these: whether a group is finite is only known once it is coded."""
    coefficients = heavy(1, len(WIDTHS), tokens)
    broken = coefficients.clone()
    broken[:, 1::2, 3] = number
    for chosen in range(len(WIDTHS)):
        one = slice(chosen, chosen + 1)
        alone = kernel.encode_keys(broken[:, one], WIDTHS[one], key_codec.CLIPS, variant=variant)
        among = kernel.encode_keys(broken, WIDTHS, key_codec.CLIPS, variant=variant)
        row = sum(WIDTHS[:chosen])
        assert torch.equal(among.streams[:, :, row : row + WIDTHS[chosen]], alone.streams)
        torch.testing.assert_close(among.squares[:, one], alone.squares, rtol=0, atol=0)
        assert float(alone.squares.max()) <= tokens * 127.5**2


@every_variant
@pytest.mark.parametrize("nbits", [3, 7])
def test_values_that_cannot_be_coded_keep_to_the_range_of_their_codes(variant: str, nbits: int) -> None:
    rotated = heavy(1, 2, 8, 40)
    rotated[0, 0, 2, 5] = float("nan")
    encoded = kernel.encode_values(rotated, nbits, variant=variant)
    assert float(encoded.squares.max()) <= 8 * 127.5**2


@every_variant
@pytest.mark.parametrize("count", [8, 32, 96])
def test_codes_at_given_scales_are_those_of_torch(variant: str, count: int) -> None:
    """The first group takes the scales that it is given, so that its tokens can join earlier ones in their group."""
    coefficients = heavy(2, len(WIDTHS), count)
    inverses = random_inverses(coefficients)
    carries = torch.arange(2 * len(WIDTHS), dtype=torch.uint8).view(2, -1)
    actual = kernel.encode_keys(coefficients, WIDTHS, key_codec.CLIPS, carries, variant, inverses)
    expected = key_codec.quantize(coefficients, WIDTHS, key_codec.CLIPS, carries, inverses)
    assert torch.equal(actual.streams, expected.streams)
    assert torch.equal(actual.overlaps, expected.overlaps)
    assert not torch.equal(actual.streams, kernel.encode_keys(coefficients, WIDTHS, key_codec.CLIPS, carries).streams)


def random_inverses(coefficients: torch.Tensor) -> torch.Tensor:
    drawn = torch.rand(coefficients.shape[:2], generator=torch.Generator().manual_seed(3))
    return 20 * (0.5 + drawn) / coefficients.std(-1)


@every_variant
def test_streams_that_go_on_join(variant: str) -> None:
    """Tokens coded in two pieces, the second going on from the first: together they read as they do apart."""
    coefficients = heavy(2, len(WIDTHS), 400)
    first, rest = coefficients[..., :256], coefficients[..., 256:]
    before = kernel.encode_keys(first, WIDTHS, key_codec.CLIPS, variant=variant)
    ends = last_bytes(before.streams, before.carries, WIDTHS, 256)
    behind = kernel.encode_keys(rest, WIDTHS, key_codec.CLIPS, ends, variant)
    assert torch.equal(behind.carries, ends)
    joined = unpack(torch.cat([before.streams, behind.streams], 1), before.carries, WIDTHS)
    apart = [unpack(part.streams, part.carries, WIDTHS) for part in (before, behind)]
    assert torch.equal(joined, torch.cat(apart, -1))


class Spoiling(TorchFunctionMode):
    """The tensor that ``factory`` makes has another dtype, is too short or is on another device."""

    def __init__(self, factory: Any, wrong: str) -> None:
        super().__init__()
        self._factory, self._wrong = factory, wrong

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not self._factory:
            return result
        if self._wrong == "dtype":
            return result.to({torch.uint8: torch.int16, torch.int32: torch.int64}.get(result.dtype, torch.float16))
        return result[..., :-1] if self._wrong == "size" else result.to("meta")


@pytest.fixture
def nothing_cached() -> Iterator[None]:
    cached = (kernel._rows, kernel._ratios)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize("wrong", ["dtype", "size", "device"])
@pytest.mark.parametrize("factory", [torch.empty, torch.tensor])
def test_the_encoders_refuse_tensors_made_for_the_call_that_are_not_theirs(factory: Any, wrong: str) -> None:
    with Spoiling(factory, wrong), pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
        kernel.encode_keys(heavy(1, 8, 200), WIDTHS[:8], key_codec.CLIPS)
    if factory is torch.empty:
        with Spoiling(factory, wrong), pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
            kernel.encode_values(heavy(1, 2, 64, 200), 3)


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.double, torch.Tensor.int])
def test_the_encoders_refuse_numbers_of_another_dtype_or_device(change: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"coefficients must be .*float32"):
        kernel.encode_keys(change(heavy(1, 8, 200)), WIDTHS[:8], key_codec.CLIPS)
    with pytest.raises(InvalidArgumentError, match=r"rotated values must be .*float32"):
        kernel.encode_values(change(heavy(1, 2, 64, 200)), 3)


def test_the_encoders_refuse_widths_that_do_not_fit() -> None:
    coefficients = heavy(1, 8, 200)
    for widths in ((8,) * 7, (8,) * 9, (9,) * 8, (0,) * 8):
        with pytest.raises(InvalidArgumentError, match="widths must be"):
            kernel.encode_keys(coefficients, widths, key_codec.CLIPS)
    for nbits in (0, 9):
        with pytest.raises(InvalidArgumentError, match="width must be 1 to 8 bits"):
            kernel.encode_values(heavy(1, 2, 64, 200), nbits)


def test_the_encoders_refuse_carries_of_another_shape_or_dtype() -> None:
    for carries in (torch.zeros(1, 7, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.int8)):
        with pytest.raises(InvalidArgumentError, match="carries must be"):
            kernel.encode_keys(heavy(1, 8, 200), WIDTHS[:8], key_codec.CLIPS, carries)
    for carries in (torch.zeros(1, 2, 63, dtype=torch.uint8), torch.zeros(1, 2, 64, dtype=torch.int8)):
        with pytest.raises(InvalidArgumentError, match="carries must be"):
            kernel.encode_values(heavy(1, 2, 64, 200), 3, carries)
