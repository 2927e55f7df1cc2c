"""Decoding: one attention step over a long cache, and SmolLM2's tokens per second, dense against spectral.

The attention step takes layers in rotation, which exceed the processor's cache, so that every step reads memory as
decoding does. Peers: torch's sdpa on dense fp32 and bf16, plain products on dense fp32, and the library's own
QuantizedCache, which rebuilds its tensors at each step.
"""

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from harness import RESULTS, Target, Timing, alternate, arguments, finish, summarize
from smollm2 import Subject
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, StaticCache

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.attention import cpu, direct
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import Block
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.eval.methods.peers import peers
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.plots.style import blank_figure, save_figure, tidy
from unsloth_spectral.rope import Rotation

# kv heads, query heads, head_dim
SHAPES = {"SmolLM2-135M": (3, 9, 64), "Llama-3-8B": (8, 32, 128)}
LENGTHS = (1024, 4096, 8192, 32768)
DENSE = ("sdpa fp32", "sdpa bf16", "products fp32")
# Dense fp32 bytes of all layers in rotation: many times the processor's cache, and within a small machine's memory.
ROTATION_BYTES = 300e6
PEER, PEER_TOKENS = "quanto 4", 8192
BATCHES = ((1, 1024), (1, 8064), (8, 8064))  # 8,064 leaves room within the model's 8,192 positions


def sealed_layers(shape: tuple[int, int, int], length: int, count: int) -> list[list[Block]]:
    """``count`` layers' blocks: keys with a falling spectrum and a mean, sealed by the codec at preset balanced."""
    heads, query_heads, head_dim = shape
    config = SpectralConfig(preset="balanced")
    generator = torch.Generator().manual_seed(0)
    steps = 1e5 ** -(torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * steps
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None]
    rotation = Rotation.of(table, slice(0, head_dim // 2), slice(head_dim // 2, head_dim))
    spectrum = torch.arange(1, head_dim + 1) ** -0.7
    layers = []
    codec = make_codec(config, count)
    for number in range(count):
        mixing = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator)).Q
        keys = (torch.randn(1, heads, length, head_dim, generator=generator) * spectrum) @ mixing
        layer = SpectralLayer(config, codec.layer(number))
        layer.append(keys + 1, torch.randn(keys.shape, generator=generator))
        layer.observe(torch.randn(1, query_heads, length, head_dim, generator=generator), rotation)
        layer.seal()
        layers.append(layer.blocks)
    return layers


def dense_contenders(
    shape: tuple[int, int, int], length: int, count: int, query: Tensor
) -> dict[str, Callable[[], Any]]:
    heads, query_heads, head_dim = shape
    pairs = [torch.randn(2, 1, heads, length, head_dim).unbind() for _ in range(count)]
    halves = [(keys.bfloat16(), values.bfloat16()) for keys, values in pairs]
    pairs_in_rotation = {name: cycle(halves if "bf16" in name else pairs) for name in DENSE}

    def sdpa(name: str, query: Tensor) -> Any:
        keys, values = next(pairs_in_rotation[name])
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def products() -> Any:
        keys, values = next(pairs_in_rotation["products fp32"])
        grouped = query.view(1, heads, query_heads // heads, head_dim)
        return ((grouped @ keys.mT) * head_dim**-0.5).softmax(-1) @ values

    return {
        "sdpa fp32": lambda: sdpa("sdpa fp32", query),
        "sdpa bf16": lambda: sdpa("sdpa bf16", query.bfloat16()),
        "products fp32": products,
    }


def peer_contender(shape: tuple[int, int, int], length: int, count: int, query: Tensor) -> Callable[[], Any] | None:
    """A decode step's attention with the library's QuantizedCache: update, then sdpa on what it returns."""
    if PEER not in peers() or length > PEER_TOKENS:
        return None
    heads, query_heads, head_dim = shape
    config = LlamaConfig(
        num_hidden_layers=count,
        num_attention_heads=query_heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        hidden_size=query_heads * head_dim,
    )
    holder: Any = type("Model", (), {"config": config})()
    cache = peers()[PEER].make_cache(holder)
    for layer in range(count):
        cache.update(*torch.randn(2, 1, heads, length, head_dim).unbind(), layer)
    layer_numbers = cycle(range(count))

    def step() -> Any:
        keys, values = cache.update(*torch.randn(2, 1, heads, 1, head_dim).unbind(), next(layer_numbers))
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


def attention_steps(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        heads, query_heads, head_dim = shape
        for length in LENGTHS:
            count = max(2, round(ROTATION_BYTES / (length * heads * head_dim * 8)))
            count = min(count, 40)
            query = torch.randn(1, query_heads, 1, head_dim)
            options = ScoreOptions(head_dim**-0.5)
            contenders = dense_contenders(shape, length, count, query)
            peer = peer_contender(shape, length, min(count, 4), query)
            if peer is not None:
                contenders[PEER] = peer
            layers = sealed_layers(shape, length, min(count, 12))
            sealed_bytes = sum(block.nbytes for block in layers[0] if hasattr(block, "nbytes"))
            contenders["spectral"] = stepper(cpu.attend, query, layers, options)
            if length <= PEER_TOKENS:
                contenders["spectral, torch"] = stepper(direct.attend, query, layers, options)
            timings = alternate(contenders, repeats)
            dense = min(timings[contender].median for contender in DENSE)
            for contender, timing in timings.items():
                row = {"shape": name, "context": length, "contender": contender, **milliseconds(timing)}
                row["times_faster_than_dense"] = dense / timing.median
                if contender.startswith("spectral"):
                    row["bytes_read"] = sealed_bytes
                    row["gigabytes_per_s"] = sealed_bytes / timing.median / 1e6
                rows.append(row)
                print(f"{name:<13}{length:>7} {contender:<26}{timing.median:9.3f} ms {dense / timing.median:7.2f}x")
    return rows


def stepper(attend: Any, query: Tensor, layers: list[list[Block]], options: ScoreOptions) -> Callable[[], Any]:
    layers_in_rotation = cycle(layers)
    return lambda: attend(query, next(layers_in_rotation), None, options)


def milliseconds(timing: Timing) -> dict[str, float]:
    return {"ms": timing.median, "ms_lower": timing.lower_quartile, "ms_upper": timing.upper_quartile}


def read_bandwidth() -> float:
    """Gigabytes a second that a sum over a gigabyte reads, the best of several."""
    numbers = torch.ones(1 << 28)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def end_to_end(repeats: int) -> list[dict[str, Any]]:
    subject, rows = Subject(), []
    config = subject.model.config
    for batch, length in BATCHES:
        caches: dict[str, Any] = {
            "dense (DynamicCache)": DynamicCache(config=config),
            "spectral": SpectralCache(subject.model, config=SpectralConfig()),
        }
        for cache in caches.values():
            subject.prefill(subject.ids(0, length), cache)
            if batch > 1:
                cache.batch_repeat_interleave(batch)
        static = caches["dense (StaticCache)"] = StaticCache(config=config, max_cache_len=length + repeats + 8)
        for layer, filled in enumerate(caches["dense (DynamicCache)"].layers):
            static.update(filled.keys, filled.values, layer)
        token = subject.ids(length, 1).expand(batch, -1)
        steps: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(repeats):
            for name, cache in caches.items():
                started = time.perf_counter()
                with torch.inference_mode():
                    subject.model(input_ids=token, **cache_argument(cache), use_cache=True)
                steps[name].append(1e3 * (time.perf_counter() - started))
        timings = {name: summarize(measured) for name, measured in steps.items()}
        dense = min(timing.median for name, timing in timings.items() if name.startswith("dense"))
        for name, timing in timings.items():
            row = {"batch": batch, "context": length, "cache": name, **milliseconds(timing)}
            row["tokens_per_s"] = 1e3 * batch / timing.median
            row["times_faster_than_dense"] = dense / timing.median
            rows.append(row)
            print(
                f"batch {batch} {length:>6} {name:<22}{row['tokens_per_s']:8.1f} tokens/s {dense / timing.median:6.2f}x"
            )
    return rows


def targets_of(steps: list[dict[str, Any]], decoding: list[dict[str, Any]], bandwidth: float) -> list[Target]:
    targets = []
    for row in steps:
        if row["contender"] != "spectral":
            continue
        target = {1024: 1.0, 8192: 5.0, 32768: 5.0}.get(row["context"])
        place = f"{row['contender']}, {row['shape']} at {row['context']}"
        if target is not None:
            faster = row["times_faster_than_dense"]
            targets.append(Target(f"attention step over dense, {place}", target, faster, at_least=True))
        if row["context"] == LENGTHS[-1]:
            share = row["gigabytes_per_s"] / bandwidth
            targets.append(Target(f"share of the read bandwidth, {place}", 1 / 3, share, at_least=True))
    for row in decoding:
        if row["cache"].startswith("spectral"):
            target = 2.5 if row["batch"] > 1 else 1.4 if row["context"] > 4096 else 1.0
            place = f"{row['cache']}, batch {row['batch']} at {row['context']}"
            faster = row["times_faster_than_dense"]
            targets.append(Target(f"tokens/s over dense, {place}", target, faster, at_least=True))
    return targets


def draw(steps: list[dict[str, Any]]) -> None:
    """Draw the time of an attention step against context for both shapes, with the slopes in the legend."""
    figure = blank_figure(11, 4.5)
    for place, name in enumerate(SHAPES):
        axes = figure.add_subplot(1, len(SHAPES), place + 1)
        for contender in ("products fp32", "sdpa fp32", "spectral"):
            points = [(r["context"], r["ms"]) for r in steps if (r["shape"], r["contender"]) == (name, contender)]
            x, y = zip(*points, strict=True)
            slope = 1e6 * (y[-1] - y[0]) / (x[-1] - x[0])
            axes.plot(x, y, marker="o", label=f"{contender}: {slope:,.0f} ns a token")
        axes.set(title=name, xlabel="context, tokens", ylabel="attention step of a layer, ms")
        axes.legend(frameon=False)
        tidy(axes)
    save_figure(figure, RESULTS.parents[1] / "docs" / "decode.png")


def main() -> None:
    options = arguments("decode", __doc__ or "", repeats=15)
    bandwidth = read_bandwidth()
    print(f"reading memory: {bandwidth:.1f} GB/s")
    steps = attention_steps(options.repeats)
    decoding = end_to_end(options.repeats)
    draw(steps)
    results = {"benchmark": "decode", "read_bandwidth_gb_s": bandwidth, "attention": steps, "decoding": decoding}
    finish(options.json, results, targets_of(steps, decoding, bandwidth))


if __name__ == "__main__":
    main()
