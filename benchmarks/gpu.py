"""Everything that a GPU is needed to measure, the most important first, within a given time.

A cell is one measurement. Each runs in a process of its own, and its result is written before the next begins; a cell
that the results have already is skipped, one that failed is tried again. So a run that a limit ends loses one cell, and
the next run goes on. ``--small`` takes sizes of a moment, to try the script itself, on a CPU too.

The model has Llama-3.2-3B's shapes and random weights: bytes and milliseconds do not depend on the weights. Steps are
timed from one call of a logits processor to the next. Cells of Unsloth load the model in 4 bits and need Unsloth.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu" / "cells.json"
CELL_SECONDS = 240.0  # a cell that takes longer failed
HEADS, GROUP, HEAD_DIM = 8, 4, 128
REPEATS, NEW_TOKENS, WARM_STEPS = 20, 40, 6
CONTENDERS = ("patched", "dense", "patched, compiled", "static, compiled", "Unsloth, patched", "Unsloth, dense")


@dataclass(frozen=True, slots=True)
class Cell:
    """``batch`` sequences of ``length`` tokens."""

    kind: str
    contender: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.contender + ', ' if self.contender else ''}{self.batch} x {self.length}"


def cells(is_small: bool) -> list[Cell]:
    """All cells, the most important first."""
    long, short, longest = (600, 300, 900) if is_small else (32_000, 4096, 131_072)
    first = [Cell("decoding", name, 1, short) for name in CONTENDERS]
    then = [Cell("attention", "", 1, long), Cell("sealing", "", 1, short)]
    later = [Cell("decoding", name, batch, length) for batch, length in ((1, long), (8, short)) for name in CONTENDERS]
    last = [Cell("attention", "", 1, short), Cell("attention", "", 8, short), Cell("attention", "", 1, longest)]
    return [*first, *then, *later, *last, Cell("sealing", "", 1, long), Cell("decoding", "patched, compiled", 8, long)]


def milliseconds(run: Callable[[], Any], device: Any) -> float:
    """The median time of ``run``."""
    import statistics

    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for number in range(REPEATS + 3):
        wait()
        started = time.perf_counter()
        run()
        wait()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def sealed(batch: int, length: int, device: Any) -> tuple[Any, Any, Any]:
    """A layer's tokens with a falling spectrum, exact; their rotation; and the block that they become."""
    import torch

    from unsloth_spectral.codec.block import ExactBlock
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.codec.observed import Observed
    from unsloth_spectral.codec.registry import make_codec
    from unsloth_spectral.rope import Rotation

    torch.manual_seed(0)
    keys, values = torch.randn(2, batch, HEADS, length, HEAD_DIM, device=device)
    spectrum = torch.arange(1, HEAD_DIM + 1, device=device) ** -0.7
    dense = ExactBlock((keys * spectrum + 0.5).bfloat16(), values.bfloat16())
    half = HEAD_DIM // 2
    angles = torch.arange(length)[:, None] * torch.logspace(0, -4, half, dtype=torch.float64)
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None].to(device)
    rotation = Rotation.of(table, slice(0, half), slice(half, HEAD_DIM))

    def seal() -> Any:
        return make_codec(SpectralConfig(preset="balanced"), 1).layer(0).seal(dense, None, Observed(rotation))

    return dense, seal, seal()


def attention(cell: Cell, device: Any) -> dict[str, Any]:
    """Milliseconds of one layer's attention: by the kernels, by torch on the codes, by torch's SDPA on dense tokens."""
    import torch

    from unsloth_spectral.attention import direct, dispatch
    from unsloth_spectral.attention.scores import ScoreOptions
    from unsloth_spectral.codec.block import ExactBlock

    dense, _, block = sealed(cell.batch, cell.length, device)
    query = torch.randn(cell.batch, HEADS * GROUP, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
    few = (ExactBlock(*torch.randn(2, cell.batch, HEADS, n, HEAD_DIM, device=device).bfloat16()) for n in (4, 90))
    first, newest = few
    blocks, options = [first, block, newest], ScoreOptions(HEAD_DIM**-0.5)

    def by_kernels() -> Any:
        return dispatch.attend(query, blocks, None, options)

    timed: Callable[[], Any] = by_kernels
    if device.type == "cuda":
        by_kernels()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            by_kernels()
        timed = graph.replay
    exact = direct.attend(query, blocks, None, options)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "kernels_ms": milliseconds(timed, device),
        "torch_ms": milliseconds(lambda: direct.attend(query, blocks, None, options), device),
        "dense_ms": milliseconds(lambda: sdpa(query, dense.keys, dense.values, enable_gqa=True), device),
        "difference": float((by_kernels().float() - exact).norm() / exact.norm()),
    }


def sealing(cell: Cell, device: Any) -> dict[str, Any]:
    """Milliseconds that sealing takes a layer."""
    _, seal, block = sealed(cell.batch, cell.length, device)
    return {
        "ms": milliseconds(seal, device),
        "bits_per_element": 8 * block.nbytes / (2 * HEADS * cell.length * HEAD_DIM),
    }


def decoding(cell: Cell, device: Any, is_small: bool) -> dict[str, Any]:
    """One call of ``generate``: prefill, median step, bytes of the cache and the peak above the weights."""
    is_unsloth = cell.contender.startswith("Unsloth")
    unsloth = importlib.import_module("unsloth") if is_unsloth else None  # before transformers, as it requires
    import statistics

    import torch
    from transformers import CompileConfig, LogitsProcessor

    from unsloth_spectral import SpectralCache, patch_unsloth_attention

    class Clock(LogitsProcessor):
        """Records the time at which each step's logits are ready."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return scores

    model = _model(device, is_small) if unsloth is None else _unsloth_model(unsloth, device, is_small)
    weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    options: dict[str, Any] = {}
    if "patched" in cell.contender:
        patch_unsloth_attention(model, preset="balanced")
    if "compiled" in cell.contender:
        options["compile_config"] = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
        options["compile_config"]._compile_all_devices = True
    elif not is_unsloth:
        options["disable_compile"] = True
    if cell.contender.startswith("static"):
        options["cache_implementation"] = "static"
    ids = torch.randint(3, 500, (cell.batch, cell.length), generator=torch.Generator().manual_seed(0)).to(device)
    clock, started = Clock(), time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=[clock],
        **options,
    )
    steps = [1e3 * (b - a) for a, b in zip(clock.times[WARM_STEPS:], clock.times[WARM_STEPS + 1 :], strict=False)]
    cache = next((held for held in output.values() if isinstance(held, SpectralCache)), None)
    stats = None if cache is None else cache.stats()
    return {
        "prefill_s": clock.times[0] - started,
        "step_ms": statistics.median(steps),
        "tokens_per_s": 1e3 * cell.batch / statistics.median(steps),
        "is_compiled": "compiled" in cell.contender and (cache is None or cache.is_compileable),
        "peak_mb": (torch.cuda.max_memory_allocated() - weights) / 1e6 if device.type == "cuda" else None,
        "stored_mb": None if stats is None else stats.stored_bytes / 1e6,
        "dense_mb": None if stats is None else stats.dense_bytes / 1e6,
    }


def _model(device: Any, is_small: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512 if is_small else 128_256,
        hidden_size=256 if is_small else 3072,
        intermediate_size=256 if is_small else 8192,
        num_hidden_layers=2 if is_small else 28,
        num_attention_heads=4 if is_small else 24,
        num_key_value_heads=2 if is_small else 8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=140_000,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with device:
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _unsloth_model(unsloth: Any, device: Any, is_small: bool) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        _model(device, is_small).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        model, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=140_000, load_in_4bit=True)
    unsloth.FastLanguageModel.for_inference(model)
    return model


def measure(cell: Cell, is_small: bool) -> dict[str, Any]:
    """The result of one cell, in this process."""
    if cell.contender.startswith("Unsloth"):
        importlib.import_module("unsloth")
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not is_small:
        raise SystemExit("this needs a GPU that torch's CUDA knows; --small tries the script without one")
    with torch.no_grad():
        if cell.kind == "attention":
            return attention(cell, device)
        return sealing(cell, device) if cell.kind == "sealing" else decoding(cell, device, is_small)


def run_cell(cell: Cell, is_small: bool, seconds: float) -> dict[str, Any]:
    """The result of one cell, from a process of its own, or the reason why there is none."""
    command = [sys.executable, __file__, "--cell", cell.name, *(["--small"] if is_small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go, and come from")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell runs on behind this time")
    parser.add_argument("--small", action="store_true", help="sizes of a moment, to try the script itself")
    parser.add_argument("--cell", help="measure this cell alone, and print its result")
    options = parser.parse_args()
    by_name = {cell.name: cell for cell in cells(options.small)}
    if options.cell:
        print(json.dumps(measure(by_name[options.cell], options.small)))
        return
    from unsloth_spectral.eval.environment import environment
    from unsloth_spectral.files import check_target, replacing

    check_target(options.json, (".json",))
    end = time.monotonic() + 60 * options.minutes
    record: dict[str, Any] = {"benchmark": "gpu", "cells": {}}
    if options.json.exists():
        record = json.loads(options.json.read_text(encoding="utf-8"))
    for name, cell in by_name.items():
        seconds = min(CELL_SECONDS, end - time.monotonic())
        if "error" not in record["cells"].get(name, {"error": "not run"}) or seconds <= 0:
            continue
        found = run_cell(cell, options.small, seconds)
        record["cells"][name], record["environment"] = found, environment()
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, found, flush=True)
    missing = [name for name in by_name if "error" in record["cells"].get(name, {"error": "not run"})]
    print(f"{len(by_name) - len(missing)} of {len(by_name)} cells measured; missing: {'; '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
