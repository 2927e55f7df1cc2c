"""Rotations at known positions: integers that layers share, checked against the model's own table."""

from typing import Any

import pytest
import torch

from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten
from unsloth_spectral.rope import Claim, Rotation, join_in_kind, join_rotations

HEAD_DIM = 16
PAIRS = HEAD_DIM // 2
FIRST, SECOND = slice(0, PAIRS, 1), slice(PAIRS, HEAD_DIM, 1)
STEP = (10_000.0 ** (-torch.arange(PAIRS, dtype=torch.float32) / PAIRS)).double()
UNIT = torch.ones(1, 1, PAIRS, dtype=torch.complex64)
# As Qwen2-VL has it, and as Qwen3-VL has it.
SECTIONS, INTERLEAVED = (0, 0, 1, 1, 1, 2, 2, 2), (0, 1, 2, 0, 1, 2, 0, 0)
NEAR = 5e-3


def image(start: int, height: int = 3, width: int = 5) -> torch.Tensor:
    """``[3, height * width]``: time, height and width of an image's tokens."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return start + torch.stack([torch.zeros(height * width, dtype=torch.int64), *(axis.flatten() for axis in grid)])


def text(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count).expand(3, -1)


PICTURE = torch.cat([text(0, 20), image(20), text(25, 30)], -1)
UNEVEN: dict[str, torch.Tensor] = {
    "gap": torch.tensor([[*range(50), *range(60, 100)]]),
    "two documents": torch.tensor([[*range(60), *range(60)]]),
    "branches of a tree": torch.tensor([[7, 7, 7, 8, 8, 9]]),
    "random": torch.randint(0, 50_000, (1, 70), generator=torch.Generator().manual_seed(0)),
    "an image": PICTURE,
    "an image alone": image(9),
}


def table_of(numbers: torch.Tensor, axes: tuple[int, ...] = SECTIONS, dtype: torch.dtype = torch.float32) -> Any:
    """As a model makes it, in float32, of ``numbers [A, n]``: ``[1, n, P]`` complex64."""
    by_pair = numbers[list(axes)] if len(numbers) > 1 else numbers.expand(PAIRS, -1)
    angle = by_pair.T.float() * STEP.float()
    return torch.complex(angle.cos().to(dtype).float(), angle.sin().to(dtype).float())[None]


def claim_of(*rows: torch.Tensor) -> Claim:
    return Claim(torch.stack(rows), UNIT, STEP)


def known(numbers: torch.Tensor, axes: tuple[int, ...] = SECTIONS) -> Rotation:
    return Rotation.of(table_of(numbers, axes), FIRST, SECOND, claims=[claim_of(numbers)])


def error(rotation: Rotation, table: torch.Tensor) -> float:
    assert rotation.table().shape == table.shape
    return float((rotation.table() - table).abs().max())


@pytest.mark.parametrize("numbers", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("axes", [SECTIONS, INTERLEAVED], ids=["sections", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uneven_positions_are_kept_as_integers(
    numbers: torch.Tensor, axes: tuple[int, ...], dtype: torch.dtype
) -> None:
    table = table_of(numbers, axes, dtype)
    rotation = Rotation.of(table, FIRST, SECOND, claims=[claim_of(numbers)])
    assert rotation.step is not None
    assert not rotation.is_even
    assert error(rotation, table) < NEAR
    assert storage_bytes(*rotation.tensors) == 4 * numbers.numel() + 16 * PAIRS
    part = rotation.slice(2, 6)
    assert error(part, table[:, 2:6]) < NEAR
    assert error(part.slice(1, 2), table[:, 3:4]) < NEAR
    assert part.is_even or part.places.table is rotation.places.table


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 100])
def test_known_even_positions_need_no_integers(axes: int, count: int) -> None:
    numbers = torch.arange(5, 5 + count).expand(axes, -1)
    rotation = known(numbers)
    assert rotation.is_even
    assert rotation.unit is UNIT
    assert rotation.step is STEP
    assert error(rotation, table_of(numbers)) < NEAR
    assert float((rotation.start - table_of(numbers[:, :1])).abs().max()) < NEAR


@pytest.mark.parametrize(
    "claim",
    [
        claim_of(UNEVEN["gap"] + (torch.arange(90) == 70)),
        Claim(UNEVEN["gap"][None], UNIT, STEP * 1.01),
        Claim(UNEVEN["gap"][None], 1.1 * UNIT, STEP),
        claim_of(UNEVEN["gap"][:, 1:]),
        Claim(UNEVEN["gap"][None], UNIT[..., 1:], STEP[1:]),
        claim_of(UNEVEN["gap"] + 2**40),
    ],
    ids=["another place", "frequencies", "scaling", "too few", "fewer pairs", "too far"],
)
def test_a_wrong_claim_is_refused_and_the_next_one_tried(claim: Claim) -> None:
    table = table_of(UNEVEN["gap"])
    refused = Rotation.of(table, FIRST, SECOND, claims=[claim])
    assert refused.step is None
    assert torch.equal(refused.table(), table)
    assert Rotation.of(table, FIRST, SECOND, claims=[claim, claim_of(UNEVEN["gap"])]).step is not None


@pytest.mark.parametrize("start", [200_000, 262_144, 1_000_000, 2_000_000])
@pytest.mark.parametrize("count", [63, 700])
def test_even_positions_far_out_take_a_few_numbers(start: int, count: int) -> None:
    """Float32 angles are off by a sixteenth of a token there."""
    numbers = torch.arange(start, start + count)[None]
    table = table_of(numbers)
    for claims in ([claim_of(numbers)], []):
        rotation = Rotation.of(table, FIRST, SECOND, claims=claims)
        assert rotation.is_even
        assert error(rotation, table) < 0.15
        assert storage_bytes(*rotation.tensors) == 16 * PAIRS


@pytest.mark.parametrize("start", [0, 200_000, 2_000_000])
@pytest.mark.parametrize("place", [1, 31, 62])
@pytest.mark.parametrize("missing", [1, -1])
def test_one_token_out_of_step_is_seen_far_out(start: int, place: int, missing: int) -> None:
    numbers = start + torch.arange(63)[None] + missing * (torch.arange(63) >= place)
    table = table_of(numbers)
    assert torch.equal(Rotation.of(table, FIRST, SECOND).table(), table)
    assert not known(numbers).is_even


def test_rows_of_a_batch_and_their_padding() -> None:
    """Padding stands anywhere; a row of padding alone makes nothing uneven."""
    rows = torch.tensor([[*range(80)], [1] * 30 + [*range(50)], [1] * 80])
    table = torch.cat([table_of(row[None]) for row in rows])
    padding = torch.tensor([0, 30, 80])
    for claims in ([Claim(rows[:, None], UNIT, STEP)], []):
        rotation = Rotation.of(table, FIRST, SECOND, padding, claims)
        assert rotation.is_even
        assert error(rotation.slice(30, 80).map_batch(lambda rows: rows[:2]), table[:2, 30:]) < NEAR
        assert error(rotation.slice(0, 30).map_batch(lambda rows: rows[:1]), table[:1, :30]) < NEAR


def test_rows_picked_from_a_batch_share_what_there_is() -> None:
    first, second = UNEVEN["gap"], UNEVEN["gap"] + 9
    table = torch.cat([table_of(first), table_of(second)])
    rotation = Rotation.of(table, FIRST, SECOND, claims=[claim_of(first, second)])
    mapped = rotation.map_batch(lambda rows: rows[[1, 0, 1]]).map_batch(lambda rows: rows[[2, 1]])
    assert error(mapped, table[[1, 0]]) < NEAR
    assert mapped.places.table is rotation.places.table
    joined = join_rotations([mapped.slice(0, 40), mapped.slice(40, 90)])
    assert error(joined, table[[1, 0]]) < NEAR


def test_joined_pieces_are_the_same_object_for_every_layer() -> None:
    pieces = [known(PICTURE[:, :17]), known(PICTURE[:, 17:40]), *(known(PICTURE[:, t : t + 1]) for t in range(40, 65))]
    joined = [join_rotations([piece.slice(0, piece.num_tokens) for piece in pieces]) for _ in range(3)]
    assert joined[0] is joined[1] is joined[2]
    assert torch.equal(joined[0].places.numbers(0, 65), PICTURE[None])
    assert error(joined[0], table_of(PICTURE)) < NEAR
    other = join_rotations([*pieces[:-1], known(PICTURE[:, 64:] + 1)])
    assert other is not joined[0]
    assert int(other.places.numbers(64, 65)[0, 0, 0]) == int(PICTURE[0, 64]) + 1


def test_what_is_even_joins_with_what_is_even() -> None:
    before, picture, behind = known(text(0, 20)), known(image(20)), known(text(20, 5))
    assert join_in_kind(before, behind) is not None
    assert join_rotations([before, behind]).is_even
    assert join_in_kind(before, picture) is None
    assert join_in_kind(picture, behind) is None
    assert join_in_kind(picture, known(image(30))) is None, (
        "layers whose blocks join otherwise would not share the places"
    )


def test_pieces_in_which_axes_are_alike_join() -> None:
    """All tokens of a one-row image share height and time; only a later image shows along which axis a pair rotates."""
    flat, tall = image(0, height=1), image(5)
    joined = join_rotations([known(flat), known(tall)])
    assert joined.step is not None
    assert error(joined, table_of(torch.cat([flat, tall], -1))) < NEAR


def test_pieces_of_other_frequencies_join_as_a_table() -> None:
    numbers = torch.arange(40)[None]
    other = Claim(numbers[None, :, 20:], UNIT, STEP * 0.9)
    table = torch.polar(torch.ones(20, PAIRS, dtype=torch.float64), numbers[0, 20:, None] * other.step)[None]
    last = Rotation.of(table.to(torch.complex64), FIRST, SECOND, claims=[other])
    assert last.is_even
    first = known(numbers[:, :20])
    assert join_in_kind(first, last) is None
    joined = join_rotations([first, last])
    assert error(joined, torch.cat([first.table(), last.table()], 1)) < NEAR


@pytest.mark.parametrize("numbers", [UNEVEN["gap"], PICTURE, torch.arange(90)[None]], ids=["gap", "image", "even"])
def test_it_is_stored_and_restored(numbers: torch.Tensor) -> None:
    rotation = known(numbers).slice(3, 50)
    tree, tensors = flatten(rotation.to_fields())
    restored = Rotation.from_fields(Fields(tree, lambda number, _: tensors[number]), HEAD_DIM, 1, 47)
    assert torch.equal(restored.table(), rotation.table())
    changes: list[dict[str, Any]] = [
        {"num_tokens": 48},
        {"offset": -1},
        {"axes": [9] * PAIRS if len(numbers) > 1 else [0]},
        {"places": {"first": [], "table": None}},
        {"places": {"first": [[0], [1]], "table": None}},
        {"rows": None, "places": {"first": [[0, 1], [1]], "table": None}},
    ]
    for change in changes:
        fields = Fields({**tree, **change}, lambda number, _: tensors[number])
        with pytest.raises(LoadError):
            Rotation.from_fields(fields, HEAD_DIM, 1, 47)
    if rotation.places.table is not None:
        with pytest.raises(LoadError):
            Rotation.from_fields(Fields({**tree, "offset": 60}, lambda number, _: tensors[number]), HEAD_DIM, 1, 47)


def test_models_with_other_pairs_of_dimensions_are_not_mixed_up() -> None:
    """They may have the same frequencies."""
    numbers = torch.arange(20)[None]
    layouts = [(FIRST, SECOND), (slice(0, HEAD_DIM, 2), slice(1, HEAD_DIM, 2)), (torch.arange(8), torch.arange(8, 16))]
    for first, second in layouts:
        whole = Rotation.of(table_of(numbers), first, second, claims=[claim_of(numbers)])
        joined = join_rotations([whole.slice(0, 9), whole.slice(9, 20)])
        assert joined.first is first
        assert joined.second is second


def test_a_slice_that_is_even_by_itself_needs_no_integers() -> None:
    """Text behind an image, both joined before they were sealed."""
    rows = torch.stack([PICTURE, PICTURE + 7])
    table = torch.cat([table_of(row) for row in rows])
    whole = Rotation.of(table, FIRST, SECOND, claims=[Claim(rows, UNIT, STEP)])
    joined = join_rotations([whole.slice(0, 30), whole.slice(30, 65)])
    assert not joined.is_even
    for rotation in (joined, joined.slice(5, 65).slice(1, 60)):
        start = 65 - 20 if rotation is joined else 65 - 26
        text_behind = rotation.slice(start, start + 10)
        assert text_behind.is_even
        first = 45
        assert error(text_behind, table[:, first : first + 10]) < NEAR
        mapped = text_behind.map_batch(lambda rows: rows[[1, 0]])
        assert error(mapped, table[[1, 0], first : first + 10]) < NEAR
    assert not joined.slice(15, 30).is_even
    assert joined.slice(15, 30).places.table is joined.places.table
