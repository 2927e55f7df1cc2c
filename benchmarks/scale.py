"""``python benchmarks/scale.py > docs/scale.md``: sessions and contexts at large model shapes, from measured bits.

Bits per element are read from the results of the evaluation and of the serdes; everything else is arithmetic on the
shapes below. Nothing here was run at these sizes.
"""

import json
from dataclasses import dataclass

from harness import RESULTS

from unsloth_spectral.codec.config import SpectralConfig

GIB, GPU_GIB, NODE_GPUS, FILL = 2**30, 80, 8, 0.9
LENGTHS = (8_192, 32_768, 131_072)
NETWORKS = (10, 100)  # Gbit/s
PRESETS = ("quality", "balanced", "small")
TEXT = """\
# Large models, calculated

Nothing here was run at these sizes. Bits per element are measured on SmolLM2 (`benchmarks/results/eval`,
`benchmarks/results/lmcache_serde.json`), model shapes are published, the rest is multiplication. Activations,
fragmentation, and the time of attention over more sessions are left out, for dense and compressed caches alike.
`python benchmarks/scale.py > docs/scale.md` writes this page; do not edit it by hand.

## Bytes per token

All layers, keys and values, half precision against the presets.

{per_token}

## Sessions per GPU

GPUs of {gpu} GiB, {fill:.0%} of them used, less the weights: 8B in half precision on one GPU, 70B in half precision on
four, 405B in 8 bits on eight. A session's cache is split over the GPUs that hold the model, so a count is for the whole
group; divide it by the GPUs for one. {exact} tokens of each session count as exact: the sinks and the longest tail.

{sessions}

## Contexts per node

{gpus} GPUs of {gpu} GiB, filled with as many copies of the model as fit. Preset `small`; the other presets lie between.

{contexts}

These tables are about the cache that `SpectralCache` keeps under transformers. A vLLM engine keeps its own dense cache:
the serde of [engines.md](engines.md) only changes what is offloaded and shared, which is the next table.

## Bytes sent for a reused prefix

Bytes that another engine fetches instead of computing the prefix again, and seconds on the wire at {networks} Gbit/s.
The record is the serde's at {record_bits:g} bits per element, measured on chunks of 256 tokens.

{moved}
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A published shape; one copy is split over ``gpus``, and each parameter takes ``weight_bytes``."""

    name: str
    parameters: float
    layers: int
    key_value_heads: int
    head_dim: int
    gpus: int
    weight_bytes: int

    @property
    def elements(self) -> int:
        """Numbers in the keys and values of a token."""
        return 2 * self.layers * self.key_value_heads * self.head_dim

    @property
    def free_bytes(self) -> float:
        """Bytes of one copy's GPUs that are free for caches."""
        return self.gpus * GPU_GIB * GIB * FILL - self.parameters * self.weight_bytes


MODELS = (
    Model("8B (Llama 3.1)", 8.03e9, 32, 8, 128, 1, 2),
    Model("70B (Llama 3.1)", 70.6e9, 80, 8, 128, 4, 2),
    Model("405B (Llama 3.1)", 405.9e9, 126, 8, 128, 8, 1),
)


def measured_bits() -> dict[str, float]:
    """Bits per element of the sealed tokens for each preset, the mean over the evaluation's slices."""
    lines = (RESULTS / "eval" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == "fidelity"]
    by_preset = {}
    for preset in PRESETS:
        bits = [row["footprint"]["cold_bits_per_element"] for row in rows if row["method"] == f"spectral {preset}"]
        by_preset[preset] = sum(bits) / len(bits)
    return by_preset


def context_bytes(model: Model, tokens: int, bits: float | None) -> float:
    """Bytes of a session's cache; None as ``bits`` means dense, in half precision."""
    if bits is None:
        return tokens * model.elements * 2
    return model.elements * (exact_tokens() * 2 + (tokens - exact_tokens()) * bits / 8)


def exact_tokens() -> int:
    """The number of sink tokens, and the longest residual while decoding."""
    config = SpectralConfig()
    return config.num_sink_tokens + config.residual_length + config.block_size


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(nbytes: float) -> str:
    """A size of three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def per_token(bits: dict[str, float]) -> str:
    header = ["", "dense", *(f"{preset}, {preset_bits:.2f} bits" for preset, preset_bits in bits.items())]
    rows = [
        [
            model.name,
            size(2 * model.elements),
            *(size(model.elements * preset_bits / 8) for preset_bits in bits.values()),
        ]
        for model in MODELS
    ]
    return table(header, rows)


def sessions(bits: dict[str, float]) -> str:
    header = ["", "tokens", "dense", *bits]
    rows = []
    for model in MODELS:
        for tokens in LENGTHS:
            counts = [
                int(model.free_bytes / context_bytes(model, tokens, preset_bits))
                for preset_bits in (None, *bits.values())
            ]
            rows.append([f"{model.name}, {model.gpus} GPU", f"{tokens:,}", *(f"{count:,}" for count in counts)])
    return table(header, rows)


def contexts(bits: dict[str, float]) -> str:
    rows = []
    for model in MODELS:
        copies = NODE_GPUS // model.gpus
        cells = []
        for tokens in LENGTHS:
            dense, small = (
                copies * int(model.free_bytes / context_bytes(model, tokens, preset_bits))
                for preset_bits in (None, bits["small"])
            )
            cells.append(f"{dense:,} → {small:,}")
        rows.append([model.name, str(copies), *cells])
    return table(["", "copies", *(f"{tokens:,} tokens, dense → small" for tokens in LENGTHS)], rows)


def moved(record_bits: float, fp8_bits: float) -> str:
    kinds = {"fp16": 16.0, "LMCache fp8": fp8_bits, "spectral record": record_bits}
    rows = []
    for model in MODELS:
        for tokens in LENGTHS:
            cells = []
            for bits in kinds.values():
                nbytes = tokens * model.elements * bits / 8
                seconds = " / ".join(f"{8 * nbytes / (speed * 1e9):.2g}" for speed in NETWORKS)
                cells.append(f"{size(nbytes)}, {seconds} s")
            rows.append([model.name, f"{tokens:,}", *cells])
    return table(["", "tokens", *kinds], rows)


def main() -> None:
    bits = measured_bits()
    serdes = json.loads((RESULTS / "lmcache_serde.json").read_text(encoding="utf-8"))["rows"]
    serde_bits = {row["serde"]: row["bits_per_element"] for row in serdes if row["chunk_tokens"] == 256}
    print(
        TEXT.format(
            per_token=per_token(bits),
            sessions=sessions(bits),
            contexts=contexts(bits),
            moved=moved(serde_bits["spectral 2.5"], serde_bits["lmcache fp8"]),
            record_bits=serde_bits["spectral 2.5"],
            gpu=GPU_GIB,
            fill=FILL,
            gpus=NODE_GPUS,
            exact=exact_tokens(),
            networks=" / ".join(map(str, NETWORKS)),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
