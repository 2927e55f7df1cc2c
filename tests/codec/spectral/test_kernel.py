"""Every build of the encoding kernel against torch's passes."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from unsloth_spectral.codec.spectral import kernel
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.packing import pack, pack_quads, unpack, unpack_quads
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


@every_variant
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 63), (1, 128), (3, 500)])
def test_keys(assert_close, variant: str, batch: int, tokens: int) -> None:
    heads = ((8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1), (3, 3, 3, 3, 2, 2, 2, 2, 1))
    widths = tuple(chain.from_iterable(heads))
    coefficients = heavy(batch, len(widths), tokens) * torch.logspace(-3, 3, len(widths))[:, None]
    coefficients[:, 3] = 0
    nbits = torch.tensor(widths)
    codes, scales = key_codec.quantize(coefficients, nbits)
    planes, kernel_scales, energies, squares = kernel.encode_keys(coefficients, heads, key_codec.CLIPS, variant)
    stored = unpack_quads(planes, heads)[..., :tokens]
    # Products in another order: a coefficient on the edge of two codes may fall to either side.
    different = (stored != codes[..., :tokens]).float().mean()
    assert different < 0.005
    assert_close(kernel_scales, scales, 1e-2)
    hat, expected = (
        key_codec.dequantize(c, nbits, s) for c, s in ((stored, kernel_scales), (codes[..., :tokens], scales))
    )
    lost, least = ((x - coefficients).square().sum(-1) for x in (hat, expected))
    assert (lost <= 1.02 * least + 1e-12).all()
    around_zero = stored.float() - ((1 << (nbits - 1)).float() - 0.5)[:, None]
    for measured, source in ((energies, coefficients), (squares, around_zero)):
        tiles = torch.nn.functional.pad(source, (0, -tokens % 128)).unflatten(-1, (-1, 128))
        assert_close(measured, tiles.square().sum(-1), 1e-5)
    if tokens == 128:
        overlap, energy = (coefficients * hat).sum(-1), coefficients.square().sum(-1)
        assert_close(overlap[energy > 0] / energy[energy > 0], torch.ones_like(energy[energy > 0]), 1e-4)


@every_variant
@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 500), (60, 128), (40, 1), (128, 63)])
def test_values(assert_close, variant: str, nbits: int, head_dim: int, tokens: int) -> None:
    rotated = heavy(2, 3, head_dim, tokens)
    rotated[0, 1, :, 0] = 0
    step = 0.5**nbits
    expected = value_codec.quantize(rotated, nbits, step)
    actual = kernel.encode_values(rotated, nbits, step, variant)
    widths = (nbits,) * (3 * head_dim)
    both = [unpack(planes, widths)[..., :tokens] for planes in (actual[0], expected[0])]
    assert (both[0] != both[1]).float().mean() < 0.002
    for measured, reference in zip(actual[1:], expected[1:], strict=True):
        assert_close(measured, reference, 1e-2)
    # What fills up the last tile is code 0, as `pack` has it.
    assert torch.equal(pack(both[0], widths), actual[0])


@every_variant
@pytest.mark.parametrize("heads", [((8,) * 4,), ((8,) * 5, (8,) * 3), ((8,) * 12, (8,) * 8)])
def test_each_bit_lands_where_pack_puts_it(variant: str, heads: tuple[tuple[int, ...], ...]) -> None:
    count = sum(map(len, heads))
    codes = torch.randint(0, 256, (2, count, 256), generator=torch.Generator().manual_seed(0))
    # The whole range in each tile, so that no clipping point is better than none.
    codes[..., 0::128], codes[..., 1::128] = 0, 255
    planes, scales, *_ = kernel.encode_keys(codes.float() - 127.5, heads, (1.0,), variant)
    # As large as the codes themselves, so the step is one and every number falls to its own code.
    assert (scales - 1).abs().max() < 0.01
    assert torch.equal(planes, pack_quads(codes.to(torch.uint8), heads))


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


HEADS = ((8, 7, 6, 5, 4), (3, 2, 1))


@pytest.mark.parametrize("wrong", ["dtype", "size", "device"])
@pytest.mark.parametrize("factory", [torch.empty, torch.tensor])
def test_the_encoders_refuse_tensors_made_for_the_call_that_are_not_theirs(factory: Any, wrong: str) -> None:
    with Spoiling(factory, wrong), pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
        kernel.encode_keys(heavy(1, 8, 200), HEADS, key_codec.CLIPS)
    if factory is torch.empty:
        with Spoiling(factory, wrong), pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
            kernel.encode_values(heavy(1, 2, 64, 200), 3, 0.5)


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.double, lambda x: x.to("meta"), torch.Tensor.int])
def test_the_encoders_refuse_numbers_of_another_dtype_or_device(change: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"coefficients must be .*float32"):
        kernel.encode_keys(change(heavy(1, 8, 200)), HEADS, key_codec.CLIPS)
    with pytest.raises(InvalidArgumentError, match=r"rotated values must be .*float32"):
        kernel.encode_values(change(heavy(1, 2, 64, 200)), 3, 0.5)


def test_the_encoders_refuse_widths_that_do_not_fit() -> None:
    coefficients = heavy(1, 8, 200)
    for heads in (((8,) * 7,), ((8,) * 9,), ((9,) * 8,), ((0,) * 8,)):
        with pytest.raises(InvalidArgumentError, match="widths must be"):
            kernel.encode_keys(coefficients, heads, key_codec.CLIPS)
    for nbits in (0, 9):
        with pytest.raises(InvalidArgumentError, match="width must be 1 to 8 bits"):
            kernel.encode_values(heavy(1, 2, 64, 200), nbits, 0.5)
