"""The tables of the trellis, and the plain search."""

import json
from importlib.resources import files
from itertools import product

import pytest
import torch

from unsloth_spectral.cache import snapshot
from unsloth_spectral.codec.chunk import record
from unsloth_spectral.codec.spectral import trellis
from unsloth_spectral.errors import LoadError

# Squared errors of the best scalar quantizers on a unit Gaussian (Max 1960), and the least that any code can have.
SCALAR = (0.3634, 0.1175, 0.03454, 0.009497)


def windows_along(codes: list[int], nbits: int, before: int) -> list[int]:
    """The last 8 bits up to each code, one after another."""
    windows, window = [], before
    for code in codes:
        window = window >> nbits | code << (8 - nbits)
        windows.append(window)
    return windows


def test_tables_beat_the_best_scalar_quantizer_and_not_the_limit() -> None:
    tables = trellis.tables()
    assert tables.entries.shape == (8, 256)
    assert float(tables.entries[:4].abs().max()) <= trellis.LARGEST_ENTRY
    for nbits, (distortion, scalar) in enumerate(zip(tables.distortions, SCALAR, strict=False), 1):
        assert 4.0**-nbits < distortion < 0.8 * scalar


def test_stored_codes_still_mean_the_same() -> None:
    """Other tables need another version of snapshots, ``VERSION``, and of both kinds of records."""
    text = files("unsloth_spectral.codec.spectral").joinpath(trellis.TABLES_FILE).read_text(encoding="utf-8")
    assert (json.loads(text)["crc32"], snapshot.VERSION) == (2604294079, 9)
    assert (record.OWN_BASIS, record.MODEL_BASIS) == (b"USC4", b"USC5")


def test_the_stored_distortions_are_those_of_the_tables() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    x /= x.square().mean(-1, keepdim=True).sqrt()
    tables = trellis.tables()
    for nbits in range(1, 5):
        unit = tables.units[nbits - 1]
        inputs = trellis.inputs_of(x, torch.tensor(unit))
        windows, _ = trellis.search(inputs, trellis.distances(nbits), nbits)
        error = float((tables.entries[nbits - 1][windows.long()] / unit - x).square().mean())
        assert error == pytest.approx(tables.distortions[nbits - 1], rel=0.12)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
@pytest.mark.parametrize("is_free", [False, True])
def test_no_other_path_costs_less(nbits: int, is_free: bool) -> None:
    """Against every path there is, for few tokens."""
    length = {1: 6, 2: 3, 3: 2, 4: 2}[nbits]
    inputs = torch.randint(-255, 256, (4, length), generator=torch.Generator().manual_seed(nbits))
    table = trellis.distances(nbits)
    to_states = trellis.reversed_bits("cpu").tolist()
    before = torch.tensor([0, 255, 77, 128], dtype=torch.uint8)
    windows, carries = trellis.search(inputs, table, nbits, None if is_free else before)
    assert is_free or torch.equal(carries, before)
    for row in range(len(inputs)):
        path = windows[row].tolist()
        codes = [window >> (8 - nbits) for window in path]
        assert windows_along(codes, nbits, int(carries[row])) == path
        rows = [table[int(number) + trellis.LARGEST_INPUT] for number in inputs[row]]

        def cost(windows: list[int], rows: list[torch.Tensor] = rows) -> int:
            return sum(int(costs[to_states[window]]) for costs, window in zip(rows, windows, strict=True))

        starts = range(0, 256, 1 << nbits) if is_free else [int(carries[row])]
        least = min(
            cost(windows_along(list(codes), nbits, start))
            for start in starts
            for codes in product(range(1 << nbits), repeat=length)
        )
        assert cost(path) == least


def test_inputs_are_rounded_to_the_nearest_integer() -> None:
    x = torch.tensor([-1e9, -300.0, -2.5, -0.6, -0.4, 0.0, 0.4, 0.5, 1.49, 254.6, 300.0])
    assert trellis.inputs_of(x, torch.tensor(1.0)).tolist() == [-255, -255, -3, -1, 0, 0, 0, 1, 1, 255, 255]


def test_distances_grow_with_the_gap() -> None:
    for nbits in range(1, 5):
        table = trellis.distances(nbits).long()
        entries = trellis.tables().entries[nbits - 1][trellis.reversed_bits("cpu").long()]
        gaps = (torch.arange(-255, 256)[:, None] - entries).abs()
        order = gaps.flatten().argsort()
        assert (table.flatten()[order].diff() >= 0).all()
        assert 0 <= int(table.min()) <= int(table.max()) <= 2047


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("[", "[1, ", 2),
        lambda text: json.dumps({**json.loads(text), "units": [1.0, 1.0, 1.0, 1.0]}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "parts"}),
        lambda text: "[]",
    ],
)
def test_damaged_tables_are_refused(damage) -> None:
    text = files("unsloth_spectral.codec.spectral").joinpath(trellis.TABLES_FILE).read_text(encoding="utf-8")
    trellis.parse(text)
    with pytest.raises(LoadError, match="damaged: install unsloth-spectral again"):
        trellis.parse(damage(text))
