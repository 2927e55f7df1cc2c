"""Trellis-coded quantization: what a code means depends on the bits before it.

The codes of one component follow each other along the tokens, as one stream of bits. The last 8 bits of the stream, a
token's window, name an entry of a table: the token's reconstruction. The newest ``nbits`` of a window are the token's
own, so this is a trellis of 256 states whose branches are shifts (Marcellin & Fischer 1990, "Trellis coded quantization
of memoryless and Gauss-Markov sources"; Mao 2009, "Trellis source codes based on linear congruential recursions"; QTIP
for weights, Tseng et al. 2024, arXiv:2406.11235). At equal bits the squared error of a Gaussian is 22 to 33 % less than
with the best scalar quantizer.

An entry is the sum of two parts, each from a table of 16 that a register holds: one by 4 bits of the window, one by the
exclusive or of its halves. A table of 256 free entries has 1 to 8 % less error, but takes a load for each token.

From 5 bits on the table is that of a uniform quantizer: the window's other bits do not matter.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.errors import LoadError

MAX_TRELLIS_NBITS = 4
STATES = 256
TABLES_FILE = "trellis.json"
# Steps of the uniform quantizer of least squared error on a unit Gaussian, 5 to 8 bits (Max, 1960), and that error.
_UNIFORM_STEPS = (0.1881, 0.1041, 0.0569, 0.0308)
_UNIFORM_DISTORTIONS = (0.0035, 0.00104, 0.0003, 0.00009)
# The largest entry; and the largest input, which is rounded to an integer in the entries' unit. With less room above
# the entries, training draws the tables together: what is far out no longer pulls at them.
LARGEST_ENTRY = 127
LARGEST_INPUT = 255
LARGEST_INVERSE = 1e30  # of a scale: times zero it is zero
# How far from zero the largest coefficient of a group may lie in the entries' unit, at 1 to 4 bits: keys have groups
# with a few large coefficients, which a table of fine steps does not reach at the scale of the standard deviation.
REACHES = (math.inf, 1.3 * LARGEST_ENTRY, 1.0 * LARGEST_ENTRY, 1.0 * LARGEST_ENTRY)
# A squared distance is shifted to the right, by so many bits at 1 to 4 bits. From half of the largest distance on it
# grows evenly up to that: the costs of any two states differ by less than 8 of the largest, so that 16 bits hold the
# costs of 8 more steps.
_SHIFTS = (5, 3, 1, 0)
_LARGEST_DISTANCE = 2047
_UNREACHABLE = 8 * _LARGEST_DISTANCE
# Numbers searched at a time, whose decisions fit a processor's cache. A path that may end anywhere in between loses
# next to nothing.
MOST_STEPS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Reconstructions for every width, 1 to 8 bits.

    Attributes:
        parts: ``[4, 2, 16]`` int8 on the CPU, by ``fields_of``: what the entries of the trellis' widths are sums of.
        entries: ``[8, 256]`` float32 on the CPU, by window, whose newest bit is the highest; integers up to 127 for
            widths of the trellis, else odd multiples of one half.
        units: by width, how large a standard deviation is in the entries' unit.
        distortions: by width, the mean squared error on a unit Gaussian.
    """

    parts: Tensor
    entries: Tensor
    units: tuple[float, ...]
    distortions: tuple[float, ...]


@lru_cache
def tables() -> Tables:
    """The tables, read from a file that benchmarks/trellis_tables.py made.

    Raises:
        LoadError: the file is damaged.
    """
    return parse(files("unsloth_spectral.codec.spectral").joinpath(TABLES_FILE).read_text(encoding="utf-8"))


def parse(text: str) -> Tables:
    """Tables from the text of their file.

    Raises:
        LoadError: the text is damaged.
    """
    try:
        stored = json.loads(text)
        parts, units, distortions = stored["parts"], stored["units"], stored["distortions"]
        is_intact = stored["crc32"] == checksum(parts, units, distortions)
    except (ValueError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        raise LoadError(f"{TABLES_FILE}, the file of the trellis' tables, is damaged: install unsloth-spectral again")
    return tables_of(torch.tensor(parts, dtype=torch.int8, device="cpu"), units, distortions)


def tables_of(parts: Tensor, units: Sequence[float], distortions: Sequence[float]) -> Tables:
    """Tables with the trellis' ``parts [4, 2, 16]`` int8, units and distortions of 1 to 4 bits."""
    entries = torch.empty(MAX_NBITS, STATES, dtype=torch.float32, device="cpu")
    first, second = fields_of(torch.arange(STATES, dtype=torch.int64, device="cpu"))
    entries[:MAX_TRELLIS_NBITS] = parts[:, 0, first].float() + parts[:, 1, second]
    windows = torch.arange(STATES, dtype=torch.int32, device="cpu")
    for nbits in range(MAX_TRELLIS_NBITS + 1, MAX_NBITS + 1):
        entries[nbits - 1] = (windows >> (MAX_NBITS - nbits)) - ((1 << nbits) - 1) / 2
    return Tables(
        parts,
        entries,
        (*units, *(1 / step for step in _UNIFORM_STEPS)),
        (*distortions, *_UNIFORM_DISTORTIONS),
    )


def fields_of(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the two parts of the entries that ``windows``, integers, name."""
    return windows >> 2 & 15, (windows ^ windows >> 4) & 15


def checksum(*contents: object) -> int:
    """The checksum (CRC-32) of what the tables' file holds."""
    return zlib.crc32(json.dumps(contents).encode())


@lru_cache
def entries_on(device: torch.device) -> Tensor:
    """The tables' entries ``[8, 256]`` float32 on ``device``."""
    return tables().entries.to(device)


@lru_cache
def distances(nbits: int) -> Tensor:
    """``distances_to`` the entries of the table of ``nbits``, 1 to 4, on the CPU."""
    return distances_to(tables().entries[nbits - 1], nbits)


def distances_to(entries: Tensor, nbits: int) -> Tensor:
    """``[511, 256]`` int16: of every input, -255 to 255, to the entry of every state, for integer ``entries [256]``.

    A state is a window with its bits in reverse order: what may precede it are the ``2 ** nbits`` states that lie
    ``256 >> nbits`` apart.
    """
    device = entries.device
    inputs = torch.arange(-LARGEST_INPUT, LARGEST_INPUT + 1, dtype=torch.int32, device=device)
    of_states = entries.to(torch.int32)[reversed_bits(device).long()]
    gaps = (inputs[:, None] - of_states).abs()
    squares, half = gaps.square() >> _SHIFTS[nbits - 1], _LARGEST_DISTANCE // 2
    bend = math.isqrt(half << _SHIFTS[nbits - 1])
    beyond = half + (gaps - bend) * half // (LARGEST_INPUT + LARGEST_ENTRY - bend)
    return torch.where(gaps <= bend, squares, beyond).to(torch.int16)


def reversed_bits(device: torch.device | str) -> Tensor:
    """``[256]`` uint8: every byte with its bits in reverse order."""
    numbers = torch.arange(STATES, dtype=torch.int32, device=device)
    backwards = torch.zeros_like(numbers)
    for bit in range(8):
        backwards |= (numbers >> bit & 1) << (7 - bit)
    return backwards.to(torch.uint8)


def inputs_of(x: Tensor, inverse: Tensor) -> Tensor:
    """``x * inverse`` as integers for the search: the nearest ones, halves away from zero, -255 to 255, int32."""
    twice = (x * inverse).clamp(-LARGEST_INPUT - 1, LARGEST_INPUT + 1).mul(2).to(torch.int32)
    return ((twice.abs() + 1) // 2).clamp_max(LARGEST_INPUT) * twice.sign()


def uniform_codes(x: Tensor, inverse: Tensor, nbits: int) -> Tensor:
    """Codes uint8 of ``x`` under a uniform quantizer of ``nbits`` bits whose steps are one over ``inverse``."""
    half = 1 << (nbits - 1)
    scaled = (x * inverse).clamp(-half, half)
    return (scaled + half).to(torch.int32).clamp_max(2 * half - 1).to(torch.uint8)


def search(inputs: Tensor, distances: Tensor, nbits: int, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The windows ``[N, n]`` uint8 of least cost for integers ``inputs [N, n]``, -255 to 255, at 1 to 4 bits.

    The Viterbi algorithm (Viterbi 1967), plain and slow; the kernel gives the same windows. Streams go on from the
    bytes ``before [N]`` uint8; the second result is the byte that each stream goes on from, which is free if none is
    given. Of equal costs, the state of the lower number wins. ``distances`` are those of ``distances_to``. Streams
    longer than ``MOST_STEPS`` are searched piece by piece.
    """
    first, *later = inputs.split(MOST_STEPS, dim=1)
    windows, before = _search_piece(first, distances, nbits, before)
    pieces = [windows]
    for piece in later:
        pieces.append(_search_piece(piece, distances, nbits, pieces[-1][:, -1])[0])
    return torch.cat(pieces, 1), before


def _search_piece(inputs: Tensor, distances: Tensor, nbits: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
    count, length = inputs.shape
    device = inputs.device
    to_states, table = reversed_bits(device).long(), distances.to(device).int()
    costs = torch.zeros(count, STATES, dtype=torch.int32, device=device)
    if before is not None:
        costs += _UNREACHABLE
        costs.scatter_(1, to_states[before.long()][:, None], 0)
    decisions = torch.empty(length, count, STATES >> nbits, dtype=torch.int64, device=device)
    for step in range(length):
        # Predecessors of state s: (h << (8 - nbits)) | (s >> nbits), for every h.
        least, decisions[step] = _first_least(costs.view(count, 1 << nbits, -1))
        costs = least.repeat_interleave(1 << nbits, dim=1) + table[inputs[:, step].long() + LARGEST_INPUT]
    state = _first_least(costs[..., None])[1][:, 0]
    windows = torch.empty(count, length, dtype=torch.uint8, device=device)
    rows = torch.arange(count, dtype=torch.int64, device=device)
    for step in reversed(range(length)):
        windows[:, step] = to_states[state].to(torch.uint8)
        low = state >> nbits
        state = (decisions[step][rows, low] << (8 - nbits)) | low
    return windows, to_states[state].to(torch.uint8)


def _first_least(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The least along dimension 1, and the first place where it is."""
    least = costs.amin(1)
    places = torch.arange(costs.shape[1], dtype=torch.int64, device=costs.device)[:, None]
    return least, torch.where(costs == least[:, None], places, costs.shape[1]).amin(1)
