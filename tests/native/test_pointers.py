"""An address is given only for a tensor of the dtype, size and device that the kernel expects."""

import pytest
import torch

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native.pointers import address, require

SHAPE = (2, 3, 5)


def test_the_address_of_a_tensor_that_fits() -> None:
    tensor = torch.zeros(SHAPE)
    assert address("queries", tensor, torch.float32, SHAPE) == tensor.data_ptr()
    rows = torch.zeros(2, 6, 5)[:, ::2]
    assert address("keys", rows, torch.float32, SHAPE, strided=True) == rows.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "strided", "part"),
    [
        (torch.zeros(SHAPE, dtype=torch.float16), False, "a torch.float16 one"),
        (torch.zeros(SHAPE, dtype=torch.float64), True, "a torch.float64 one"),
        (torch.zeros(SHAPE, dtype=torch.int32), False, "a torch.int32 one"),
        (torch.zeros(2, 3, 4), False, r"shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4), True, r"shape \(2, 3, 4\)"),
        (torch.zeros(30), False, r"shape \(30,\)"),
        (torch.zeros(SHAPE, device="meta"), False, "on meta"),
        (torch.zeros(SHAPE, device="meta"), True, "on meta"),
        (torch.zeros(2, 6, 5)[:, ::2], False, "not contiguous"),
        (torch.zeros(2, 5, 3).mT, True, "not contiguous"),
    ],
    ids=str,
)
def test_any_other_tensor_is_refused(tensor: torch.Tensor, strided: bool, part: str) -> None:
    message = (
        rf"^queries must be .*float32 tensor of shape \(2, 3, 5\) on the CPU for the compiled kernel, got .*{part}"
    )
    with pytest.raises(InvalidArgumentError, match=message):
        address("queries", tensor, torch.float32, SHAPE, strided=strided)


def test_requirements_name_what_was_given() -> None:
    require(True, "widths", "falling", (1, 2))
    with pytest.raises(InvalidArgumentError, match=r"widths must be falling for the compiled kernel, got \(1, 2\)"):
        require(False, "widths", "falling", (1, 2))
