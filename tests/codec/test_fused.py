"""Every build of the encoding kernel against torch's passes."""

from itertools import chain

import pytest
import torch

from unsloth_spectral.codec import fused
from unsloth_spectral.codec import keys as key_codec
from unsloth_spectral.codec import values as value_codec
from unsloth_spectral.codec.packing import pack, pack_quads, unpack, unpack_quads
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
    planes, found, energies, squares = fused.encode_keys(coefficients, heads, key_codec.CLIPS, variant)
    stored = unpack_quads(planes, heads)[..., :tokens]
    # Products in another order: a coefficient on the edge of two codes may fall to either side.
    different = (stored != codes[..., :tokens]).float().mean()
    assert different < 0.005
    assert_close(found, scales, 1e-2)
    hat, expected = (key_codec.dequantize(c, nbits, s) for c, s in ((stored, found), (codes[..., :tokens], scales)))
    lost, least = ((x - coefficients).square().sum(-1) for x in (hat, expected))
    assert (lost <= 1.02 * least + 1e-12).all()
    around_zero = stored.float() - ((1 << (nbits - 1)).float() - 0.5)[:, None]
    for own, of in ((energies, coefficients), (squares, around_zero)):
        tiles = torch.nn.functional.pad(of, (0, -tokens % 128)).unflatten(-1, (-1, 128))
        assert_close(own, tiles.square().sum(-1), 1e-5)
    if tokens == 128:
        overlap, energy = (coefficients * hat).sum(-1), coefficients.square().sum(-1)
        assert_close(overlap[energy > 0] / energy[energy > 0], torch.ones_like(energy[energy > 0]), 1e-4)


@every_variant
@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 500), (60, 128), (40, 1), (128, 63)])
def test_values(assert_close, variant: str, nbits: int, head_dim: int, tokens: int) -> None:
    turned = heavy(2, 3, head_dim, tokens)
    turned[0, 1, :, 0] = 0
    step = 0.5**nbits
    expected = value_codec.quantize(turned, nbits, step)
    found = fused.encode_values(turned, nbits, step, variant)
    widths = (nbits,) * (3 * head_dim)
    both = [unpack(planes, widths)[..., :tokens] for planes in (found[0], expected[0])]
    assert (both[0] != both[1]).float().mean() < 0.002
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert_close(own, other, 1e-2)
    # What fills up the last tile is code 0, as `pack` has it.
    assert torch.equal(pack(both[0], widths), found[0])


@every_variant
@pytest.mark.parametrize("heads", [((8,) * 4,), ((8,) * 5, (8,) * 3), ((8,) * 12, (8,) * 8)])
def test_each_bit_lands_where_pack_puts_it(variant: str, heads: tuple[tuple[int, ...], ...]) -> None:
    count = sum(map(len, heads))
    codes = torch.randint(0, 256, (2, count, 256), generator=torch.Generator().manual_seed(0))
    # The whole range in each tile, so that no clipping point is better than none.
    codes[..., 0::128], codes[..., 1::128] = 0, 255
    planes, scales, *_ = fused.encode_keys(codes.float() - 127.5, heads, (1.0,), variant)
    # As large as the codes themselves, so the step is one and every number falls to its own code.
    assert (scales - 1).abs().max() < 0.01
    assert torch.equal(planes, pack_quads(codes.to(torch.uint8), heads))
