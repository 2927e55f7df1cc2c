"""Train the tables of the trellis on a unit Gaussian and write them: codec/spectral/trellis.json.

Paths of least cost and least squares in turn (after Linde, Buzo & Gray 1980), from several starts, of which the best
is kept. Seeded: the same numbers come out each time.
"""

import argparse
import json
import math
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from unsloth_spectral.codec.spectral import kernel, trellis
from unsloth_spectral.codec.spectral.packing import unpack

FILE = Path(trellis.__file__).with_name(trellis.TABLES_FILE)
STARTS, ROUNDS, STREAMS, TOKENS = 32, 40, 256, 512


def drawn(generator: torch.Generator) -> Tensor:
    """``[STREAMS, TOKENS]``, in groups of 128 of exactly unit variance, as the encoder scales them."""
    x = torch.randn(STREAMS, TOKENS // 128, 128, generator=generator)
    return (x / x.square().mean(-1, keepdim=True).sqrt()).flatten(1)


def rounded(parts: Tensor) -> tuple[Tensor, float]:
    """``parts [2, 16]`` as integers, int8, whose largest sum is the largest entry; and that entry's unit."""
    # What one part gains the other may lose: neither has a mean of its own.
    parts = torch.stack([parts[0] - parts[0].mean(), parts[1] + parts[0].mean()])
    first, second = trellis.fields_of(torch.arange(trellis.STATES))
    unit = (trellis.LARGEST_ENTRY - 1) / float((parts[0, first] + parts[1, second]).abs().max())
    return (parts * unit).round().to(torch.int8), unit


def windows_of(x: Tensor, parts: Tensor, unit: float, nbits: int) -> tuple[Tensor, Tensor]:
    """The windows, int64, of the paths of least cost for ``x`` through the table of ``parts``, and its entries."""
    all_parts = torch.zeros(trellis.MAX_TRELLIS_NBITS, 2, 16, dtype=torch.int8)
    all_parts[nbits - 1] = parts
    zeros = (0.0,) * trellis.MAX_TRELLIS_NBITS
    tables = trellis.tables_of(all_parts, (unit,) * trellis.MAX_TRELLIS_NBITS, zeros)
    widths = (nbits,) * len(x)
    kernel._trellis.cache_clear()
    # At the scale of the deviation, whatever the largest number.
    free = patch.object(trellis, "REACHES", (math.inf,) * trellis.MAX_TRELLIS_NBITS)
    with free, patch.object(trellis, "tables", lambda: tables):
        encoded = kernel.encode_keys(x[None], widths, (1.0,))
    return unpack(encoded.streams, encoded.carries, widths)[0].long(), tables.entries[nbits - 1]


def error_of(x: Tensor, parts: Tensor, unit: float, nbits: int) -> float:
    """The mean squared error of ``x`` coded by ``parts``."""
    windows, entries = windows_of(x, parts, unit, nbits)
    return float((entries[windows] / unit - x).square().mean())


def trained(nbits: int, seed: int) -> tuple[Tensor, float]:
    """Parts ``[2, 16]`` int8, and the size of a standard deviation in their unit."""
    generator = torch.Generator().manual_seed(seed)
    first, second = trellis.fields_of(torch.arange(trellis.STATES))
    # Least squares hardly changes how far many levels spread, so they begin as the numbers to be coded do.
    parts = torch.randn(2, 16, generator=generator)
    parts -= parts.mean(1, keepdim=True)
    parts /= (parts[0, first] + parts[1, second]).std()
    # Of each window, which numbers add up to its entry.
    design = torch.cat([functional.one_hot(first, 16), functional.one_hot(second, 16)], 1).double()
    for _ in range(ROUNDS):
        x = drawn(generator)
        flat = windows_of(x, *rounded(parts), nbits)[0].flatten()
        counts = torch.bincount(flat, minlength=trellis.STATES).double()
        sums = torch.bincount(flat, x.flatten().double(), minlength=trellis.STATES)
        # Least squares; the small number settles what the two parts share, and rows without a window.
        normal = design.T @ (design * counts[:, None]) + 1e-3 * torch.eye(32, dtype=torch.float64)
        parts = torch.linalg.solve(normal, design.T @ sums).float().view(2, 16)
    return rounded(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="where the tables go")
    options = parser.parse_args()
    parts, units, distortions = [], [], []
    for nbits in range(1, trellis.MAX_TRELLIS_NBITS + 1):
        x = drawn(torch.Generator().manual_seed(0))
        candidates = (trained(nbits, seed) for seed in range(1, STARTS + 1))
        error, best, unit = min(((error_of(x, *each, nbits), *each) for each in candidates), key=lambda found: found[0])
        parts.append(best.tolist())
        units.append(round(unit, 4))
        distortions.append(round(error, 6))
        print(f"{nbits} bits: squared error {error:.4f} of a unit Gaussian", flush=True)
    contents = {"parts": parts, "units": units, "distortions": distortions}
    text = json.dumps({**contents, "crc32": trellis.checksum(*contents.values())})
    options.output.write_text(text.replace("]], [", "]],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
