"""``python tests/families/table.py RESULTS`` prints docs/models.md from what ``pytest --matrix RESULTS`` recorded."""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from families.matrix import WAYS
from families.models import FAMILIES

MARKS = {
    "works": "✓",
    "refused by transformers": "–",
    "unsafe in transformers": "‡",
    "unsupported": "✗",
    "fails": "**fails**",
}
NOT_RUN = "?"
TEXT = """\
# Models and ways to generate

`make models` writes this page from `tests/families`, with transformers {transformers} and torch {torch}; do
not edit it by hand.

- ✓ works; – transformers refuses it with a dense cache too; ✗ `SpectralCache` refuses it in one line.
- ‡ unsafe in transformers with a dense cache too: the model's RoPE tables follow the longest text it has seen.
- Full-attention layers are compressed; sliding, chunked, linear-attention and state layers keep transformers' own
  cache.
- Rebuilt: the model computes with its keys and values itself. They are stored compressed and rebuilt at every step, one
  layer at a time: this saves memory, but no time.
- Layers on disk (`device_map`), tensor parallelism in two processes and a forward under `torch.compile` are tested on a
  Llama, in `tests/integrations`. Within a compiled forward the cache and its attention run uncompiled.
- Contrastive search is not in transformers {transformers}, which has moved it to a repository on the hub.

{table}

## How it was tested

Each cell is a tiny random model. In the columns up to "training", a spectral cache without rounding gave the tokens of
transformers' `DynamicCache`, and its logits to 1e-4. In half precision its errors were those of the dtype. With the
preset, the KL to the dense cache was a fraction of the KL of losing the sealed tokens. Tokens were really sealed in
every column except "training", which uses no cache.
"""


def table(cells: dict[str, dict[str, str]]) -> str:
    """The rows of ``cells``: family, then way, then the result."""
    lines = ["| family | rebuilt | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 2) + "|"]
    for family, row in FAMILIES.items():
        if row.refusal is None:
            outcomes = [cells.get(family, {}).get(way) for way in WAYS]
        else:
            outcomes = ["unsupported" if "unsupported" in cells.get(family, {}).values() else None] * len(WAYS)
        marks = [NOT_RUN if outcome is None else MARKS[outcome] for outcome in outcomes]
        lines.append(f"| {family} | {'yes' if row.is_materialised else ''} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def page(cells: dict[str, dict[str, str]]) -> str:
    """All of docs/models.md."""
    torch_version = torch.__version__.split("+")[0]
    return TEXT.format(transformers=transformers.__version__, torch=torch_version, table=table(cells))


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
