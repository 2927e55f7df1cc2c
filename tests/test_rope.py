"""Rotations as numbers: compact where positions run on evenly, a table where they do not, the same to every caller."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch

from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.rope import Rotation, join_rotations, rotate, unrotate
from unsloth_spectral.rope import rotation as module

HEAD_DIM = 16
PAIRS = HEAD_DIM // 2
FIRST, SECOND = torch.arange(PAIRS), torch.arange(PAIRS) + PAIRS
TOLERANCE = 2e-3


def frequencies(scale: float = 1.0) -> torch.Tensor:
    return scale * 10_000.0 ** (-torch.arange(PAIRS, dtype=torch.float32) / PAIRS)


def table_of(positions: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """As a model makes it, in float32: ``positions [..., T]`` to ``[..., T, P]`` complex64."""
    angle = positions.float()[..., None] * frequencies(scale)
    return torch.complex(angle.cos(), angle.sin())


def rounded(table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What models in half precision make of it."""
    return torch.complex(table.real.to(dtype).float(), table.imag.to(dtype).float())


def rotation_of(*rows: Iterable[int], scale: float = 1.0) -> tuple[Rotation, torch.Tensor]:
    table = table_of(torch.stack([torch.tensor(list(row)) for row in rows]), scale)
    return Rotation.of(table, FIRST, SECOND), table


def nbytes(rotation: Rotation) -> int:
    return storage_bytes(*rotation.tensors)


def error(rotation: Rotation, table: torch.Tensor) -> float:
    assert rotation.table().shape == table.shape
    assert rotation.table().dtype == torch.complex64
    return float((rotation.table() - table).abs().max())


@pytest.mark.parametrize("num_tokens", [3, 4, 5, 63, 9000])
@pytest.mark.parametrize(("start", "scale"), [(0, 1.0), (0, 0.25), (777, 1.0)], ids=["default", "linear", "offset"])
def test_even_positions_take_a_few_numbers(num_tokens: int, start: int, scale: float) -> None:
    rotation, table = rotation_of(range(start, start + num_tokens), scale=scale)
    assert rotation.is_even
    assert rotation.start.shape == (1, 1, PAIRS)
    assert rotation.num_tokens == num_tokens
    assert nbytes(rotation) == 2 * 8 * PAIRS
    assert error(rotation, table) <= TOLERANCE
    angles = torch.arange(start, start + num_tokens).double()[:, None] * frequencies(scale).double()
    exact = torch.polar(torch.ones_like(angles), angles)
    assert float((rotation.table()[0] - exact).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [3, 4, 63, 700, 9000, 40_000])
@pytest.mark.parametrize(("start", "scale"), [(0, 1.0), (777, 1.0), (0, 1.3)], ids=["default", "offset", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_half_precision_take_a_few_numbers_too(
    num_tokens: int, start: int, scale: float, dtype: torch.dtype
) -> None:
    exact = scale * table_of(torch.arange(start, start + num_tokens)[None])
    rotation = Rotation.of(rounded(exact, dtype), FIRST, SECOND)
    assert rotation.is_even
    assert nbytes(rotation) == 2 * 8 * PAIRS
    # Where there are tokens to take the mean of, it is no further from the exact one than the rounded table is.
    rounding = float((rounded(exact, dtype) - exact).abs().max()) + 1e-7 * num_tokens
    assert error(rotation, exact) <= rounding * (1.0 if num_tokens > 60 else 2.0)


def test_pieces_in_half_precision_join_into_a_few_numbers() -> None:
    exact = table_of(torch.stack([torch.arange(300), torch.arange(9, 309)]))
    table = rounded(exact, torch.bfloat16)
    pieces = [table[:, :200], *table[:, 200:].split(1, dim=1)]
    joined = join_rotations([Rotation.of(piece, FIRST, SECOND) for piece in pieces])
    assert joined.is_even
    assert error(joined, exact) <= TOLERANCE


def test_a_gap_is_seen_in_half_precision() -> None:
    table = rounded(table_of(torch.tensor([[*range(50), *range(51, 100)]])), torch.bfloat16)
    assert torch.equal(Rotation.of(table, FIRST, SECOND).table(), table)


def test_one_and_two_tokens() -> None:
    for count in (1, 2):
        rotation, table = rotation_of(range(5, 5 + count))
        assert torch.equal(rotation.table(), table)
        assert rotation.num_tokens == count


@pytest.mark.parametrize(
    "positions",
    [
        [*range(50), *range(60, 100)],
        [0, 1, 2, 4],
        [1, 1, 1, 0, 1, 2, 3, 4],
        torch.randint(0, 500, (70,), generator=torch.Generator().manual_seed(0)).tolist(),
    ],
    ids=["gap", "short gap", "left padding", "random"],
)
def test_irregular_positions_keep_their_table(positions: list[int]) -> None:
    rotation, table = rotation_of(positions)
    assert rotation.step is None
    assert torch.equal(rotation.table(), table)
    assert rotation.unit.data_ptr() != table.data_ptr()
    assert nbytes(rotation) == 8 * PAIRS * len(positions)


def test_a_frequency_that_changes_with_length_keeps_its_table() -> None:
    angle = torch.arange(100.0)[:, None] ** 1.01 * frequencies()
    table = torch.polar(torch.ones_like(angle), angle)[None]
    assert Rotation.of(table, FIRST, SECOND).step is None


def test_rows_that_differ() -> None:
    shifted, table = rotation_of(range(100), range(7, 107))
    assert shifted.is_even
    assert shifted.start.shape == (2, 1, PAIRS)
    assert error(shifted, table) <= TOLERANCE
    padded, table = rotation_of(range(100), [1] * 30 + list(range(70)))
    assert padded.step is None
    assert torch.equal(padded.table(), table)
    stretched = torch.cat([table_of(torch.arange(100)[None]), table_of(2 * torch.arange(100)[None])])
    assert torch.equal(Rotation.of(stretched, FIRST, SECOND).table(), stretched)


def test_equal_rows_are_kept_once() -> None:
    rotation, table = rotation_of(range(40), range(40), range(40))
    assert rotation.start.shape[0] == 1
    assert error(rotation, table[:1]) <= TOLERANCE
    irregular, table = rotation_of([3, 1, 4, 1, 5], [3, 1, 4, 1, 5])
    assert torch.equal(irregular.table(), table[:1])


EVEN, PADDED, SHIFTED = (range(200),), (range(200), [1] * 30 + list(range(170))), (range(200), range(9, 209))
kinds = pytest.mark.parametrize("rows", [EVEN, PADDED, SHIFTED], ids=["even", "padded", "shifted"])


@kinds
@pytest.mark.parametrize(("start", "stop"), [(0, 200), (0, 1), (128, 200), (131, 137), (199, 200)])
def test_a_slice_is_that_part_of_the_table(rows: tuple[Iterable[int], ...], start: int, stop: int) -> None:
    rotation, table = rotation_of(*rows)
    part = rotation.slice(start, stop)
    assert part.num_tokens == stop - start
    assert error(part, table[:, start:stop]) <= TOLERANCE
    assert error(part.slice(0, 1), table[:, start : start + 1]) <= TOLERANCE
    assert nbytes(part) <= nbytes(rotation)


def test_a_slice_of_a_table_shares_it() -> None:
    rotation, _ = rotation_of(*PADDED)
    assert nbytes(rotation.slice(10, 20)) == nbytes(rotation)


@kinds
@pytest.mark.parametrize("cuts", [[100], [1, 2, 3, 199], list(range(1, 200))], ids=["halves", "uneven", "single"])
def test_joined_pieces_are_the_whole(rows: tuple[Iterable[int], ...], cuts: list[int]) -> None:
    rotation, table = rotation_of(*rows)
    edges = [0, *cuts, 200]
    joined = join_rotations([rotation.slice(a, b) for a, b in pairwise(edges)])
    assert joined.num_tokens == 200
    assert (joined.step is None) == (rotation.step is None)
    assert error(joined, table) <= TOLERANCE


def test_joining_pieces_with_one_row_and_with_several() -> None:
    _, table = rotation_of(*SHIFTED)
    same, tail = table_of(torch.arange(50))[None], table[:, 50:]
    joined = join_rotations([Rotation.of(same, FIRST, SECOND), Rotation.of(tail, FIRST, SECOND)])
    assert error(joined, torch.cat([same.expand(2, -1, -1), tail], 1)) <= TOLERANCE


@kinds
def test_map_batch_picks_rows(rows: tuple[Iterable[int], ...]) -> None:
    rotation, table = rotation_of(*rows)
    mapped = rotation.map_batch(lambda tensor: tensor[[1, 0, 1]] if len(rows) > 1 else None)
    assert error(mapped, table[[1, 0, 1]] if len(rows) > 1 else table) <= TOLERANCE


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1.0, 1.35, 0.2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_unrotate_undoes_rotate_whatever_the_size(
    size: float, interleaved: bool, assert_close: Callable[..., None]
) -> None:
    first, second = (2 * torch.arange(PAIRS), 2 * torch.arange(PAIRS) + 1) if interleaved else (FIRST, SECOND)
    rotation = Rotation.of(size * table_of(torch.arange(90)[None]), first, second)
    assert rotation.is_even
    x, table = random(2, 3, 90, HEAD_DIM), rotation.table()[:, None]
    rotated = rotate(x, table, rotation)
    assert_close(unrotate(rotated, table, rotation), x, 1e-5)
    assert_close(rotated.norm(dim=-1), size * x.norm(dim=-1), 1e-5)
    assert not torch.equal(rotated[..., 1, :], x[..., 1, :])


def test_rotate_is_the_models_own_arithmetic(assert_close: Callable[..., None]) -> None:
    rotation, _ = rotation_of(range(70))
    x, angle = random(2, 3, 70, HEAD_DIM), torch.arange(70.0)[:, None] * frequencies().repeat(2)
    half = torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1)
    assert_close(rotate(x, rotation.table()[:, None], rotation), x * angle.cos() + half * angle.sin(), 1e-4)


def test_dimensions_outside_the_pairs_stay(assert_close: Callable[..., None]) -> None:
    partial = Rotation.of(table_of(torch.arange(70)[None])[..., :3], torch.arange(3), torch.arange(3) + 3)
    x = random(2, 70, HEAD_DIM)
    rotated = rotate(x, partial.table(), partial)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert not torch.equal(rotated[..., 1:, :6], x[..., 1:, :6])
    assert_close(unrotate(rotated, partial.table(), partial), x, 1e-5)


def test_rotating_leaves_its_argument_alone() -> None:
    rotation, _ = rotation_of(range(20))
    x = random(2, 20, HEAD_DIM)
    before = x.clone()
    rotate(x, rotation.table(), rotation)
    unrotate(x, rotation.table(), rotation)
    assert torch.equal(x, before)


def test_a_long_table_is_not_kept(assert_close: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    angles = torch.arange(500, dtype=torch.float64)[:, None] * torch.tensor([0.3, 0.01])
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None]
    rotation = Rotation.of(table, slice(0, 2), slice(2, 4))
    monkeypatch.setattr(module, "MOST_KEPT_BYTES", 500 * 2 * 8 - 1)
    monkeypatch.setattr(module._last, "table", None)
    assert_close(torch.view_as_real(rotation.table()), torch.view_as_real(table), 1e-5)
    assert module._last.table is None
    monkeypatch.setattr(module, "MOST_KEPT_BYTES", 500 * 2 * 8)
    rotation.table()
    assert module._last.table is not None
