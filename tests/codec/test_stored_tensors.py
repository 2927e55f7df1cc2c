"""What follows from the declarations of a block's tensors: bytes, and the bytes of a record."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.record import write_layer
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.statistics import KeyStatistics
from unsloth_spectral.codec.stored_tensors import Stored, StoredTensors


@dataclass
class Example(StoredTensors):
    codes: Annotated[Tensor, Stored(torch.uint8, ("batch", "components"))]
    offset: Annotated[Tensor, Stored(torch.float16, ("batch", "tiles", "heads"))]
    mean: Annotated[Tensor, Stored(torch.float32, ("batch", "heads"))]
    error: Annotated[Tensor, Stored(torch.float16, ("batch", "heads"), is_statistic=True)]


SIZES = {"batch": 1, "components": 5, "tiles": 3, "heads": 2}


def test_bytes_of_what_has_no_such_dimension() -> None:
    """Every tensor is charged once: with the components that it grows by, or beside them."""
    assert Example.bytes_without(("components",), SIZES) == 3 * 2 * 2 + 2 * 4
    assert Example.bytes_without(("components", "tiles"), SIZES) == 2 * 4
    assert Example.bytes_per("components", SIZES) == 1


def test_a_tensor_of_any_strides_goes_into_a_record() -> None:
    """A tensor with sizes of 1 counts as contiguous whatever its strides."""
    x = torch.randn(1, 1, 128, 4, generator=torch.Generator().manual_seed(0))
    run = KeyStatistics.of(x, torch.eye(4).expand(1, 1, 4, 4), None, True)
    codes, _ = key_codec.encode(run, key_codec.plan(run.basis(), torch.tensor([[2, 0, 0, 0]]), 1.0))
    strided = torch.empty_strided(codes.vector_scales.shape, (7, 2, 3)).copy_(codes.vector_scales)
    assert strided.is_contiguous()
    assert strided.stride(-1) != 1
    values, exact = value_codec.encode(x, 2), torch.empty(1, 0, 4)
    expected = write_layer(codes, values, exact, exact)
    codes_strided = codes.map_tensors(lambda tensor: strided if tensor is codes.vector_scales else tensor)
    actual = write_layer(codes_strided, values, exact, exact)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
