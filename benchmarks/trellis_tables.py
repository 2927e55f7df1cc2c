"""Train the tables of the trellis on a unit Gaussian and write them: codec/spectral/trellis.json.

Paths of least cost and centroids in turn (Linde, Buzo & Gray 1980). Seeded: the same numbers come out each time.
"""

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral import kernel, trellis
from unsloth_spectral.codec.spectral.packing import unpack

FILE = Path(trellis.__file__).with_name(trellis.TABLES_FILE)
ROUNDS, STREAMS, TOKENS = 40, 1024, 512


def drawn(generator: torch.Generator) -> Tensor:
    """``[STREAMS, TOKENS]``, in groups of 128 of exactly unit variance, as the encoder scales them."""
    x = torch.randn(STREAMS, TOKENS // 128, 128, generator=generator)
    return (x / x.square().mean(-1, keepdim=True).sqrt()).flatten(1)


def windows_of(x: Tensor, entries: Tensor, unit: float, nbits: int) -> Tensor:
    """The windows, int64, of the paths of least cost for ``x`` through a table of integer ``entries [256]``."""
    all_entries = torch.zeros(trellis.MAX_NBITS, trellis.STATES)
    all_entries[nbits - 1] = entries
    tables = trellis.Tables(all_entries, (unit,) * trellis.MAX_NBITS, (0.0,) * trellis.MAX_NBITS)
    widths = (nbits,) * len(x)
    for cached in (trellis.distances, kernel._trellis):
        cached.cache_clear()
    with patch.object(trellis, "tables", lambda: tables):
        encoded = kernel.encode_keys(x[None], widths, (1.0,))
    return unpack(encoded.streams, encoded.carries, widths)[0].long()


def trained(nbits: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Integer entries ``[256]`` by window, and the size of a standard deviation in their unit."""
    entries = torch.randn(trellis.STATES, generator=generator)
    for _ in range(ROUNDS):
        x, unit = drawn(generator), trellis.LARGEST_ENTRY / float(entries.abs().max())
        flat = windows_of(x, (entries * unit).round(), unit, nbits).flatten()
        counts = torch.bincount(flat, minlength=trellis.STATES)
        sums = torch.bincount(flat, x.flatten().double(), minlength=trellis.STATES).float()
        entries = torch.where(counts > 0, sums / counts.clamp_min(1), entries)
    unit = trellis.LARGEST_ENTRY / float(entries.abs().max())
    return (entries * unit).round(), unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="where the tables go")
    options = parser.parse_args()
    entries, units, distortions = [], [], []
    for nbits in range(1, trellis.MAX_TRELLIS_NBITS + 1):
        generator = torch.Generator().manual_seed(nbits)
        table, unit = trained(nbits, generator)
        x = drawn(generator)
        error = float((table[windows_of(x, table, unit, nbits)] / unit - x).square().mean())
        entries.append([int(entry) for entry in table.tolist()])
        units.append(round(unit, 4))
        distortions.append(round(error, 6))
        print(f"{nbits} bits: squared error {error:.4f} of a unit Gaussian", flush=True)
    contents = {"entries": entries, "units": units, "distortions": distortions}
    text = json.dumps({**contents, "crc32": trellis.checksum(*contents.values())})
    options.output.write_text(text.replace("], [", "],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
