"""LMCache's serdes and the spectral one on a prefix: bytes, error, and agreement of the model's continuation.

A prefix of 4,096 tokens (SmolLM2's real keys and values) goes through each serde completely, in chunks as LMCache
stores them; then the model continues on the decoded prefix. LMCache's own fp8 and CacheGen are its own code, on the
CPU. Its kivi returns chunks unchanged, and its TurboQuant needs CUDA: this library's reference implementations of both
papers stand in. ``--repeats`` are the slices of text. Needs the model's profile (``unsloth-spectral profile``) and the
engines' environment: ``make bench-engines``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from harness import Target, arguments, finish
from lmcache.storage_backend.serde.cachegen_basics import CacheGenGPUEncoderOutput
from lmcache.storage_backend.serde.cachegen_decoder import decode_function_gpu, do_dequantize
from lmcache.storage_backend.serde.cachegen_encoder import encode_function
from lmcache.v1.distributed.serde.fp8 import Fp8QuantizationDeserializer, Fp8QuantizationSerializer
from lmcache.v1.storage_backend.naive_serde.cachegen_basics import CacheGenConfig
from smollm2 import PREFIX, Slice, Subject, mean_fidelity
from torch import Tensor
from transformers import DynamicCache

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Planes
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.eval.agreement import Agreement
from unsloth_spectral.eval.environment import version_of
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.methods.lloyd_max import LloydMax
from unsloth_spectral.integrations.embedded import embedded_folder
from unsloth_spectral.integrations.huggingface.fingerprint import profile_of

THETA, HEADS, HEAD_DIM = 100_000.0, 3, 64
CACHE_BITS = 2.5
# From a chunk ``[2, layers, tokens, heads * head_dim]`` to the decoded chunk, the bytes of its record, and the seconds
# of encoding, 0 if they are not measured alone.
Serde: TypeAlias = Callable[[Tensor], tuple[Tensor, int, float]]


def fp8(chunk: Tensor) -> tuple[Tensor, int, float]:
    stored, back = torch.empty(chunk.numel(), dtype=torch.uint8), torch.empty_like(chunk)
    source, record, target = (SimpleNamespace(tensor=tensor) for tensor in (chunk, stored, back))
    count = Fp8QuantizationSerializer().serialize(source, record, None)
    Fp8QuantizationDeserializer().deserialize(record, target, None)
    return back, int(count), 0.0


class CacheGen:
    """CacheGen, called as by CacheGenSerializer and CacheGenDeserializer, which themselves run on CUDA only."""

    def __init__(self) -> None:
        self.config = CacheGenConfig.from_model_name(str(embedded_folder()))
        self.key_bins, self.value_bins = (self._bins(specs) for specs in (self.config.kspecs, self.config.vspecs))

    def _bins(self, specs: Any) -> Tensor:
        bins = torch.zeros(self.config.nlayers)
        for spec in specs:
            bins[spec.start_layer : spec.end_layer] = spec.bins
        return bins

    def __call__(self, chunk: Tensor) -> tuple[Tensor, int, float]:
        layers, tokens, hidden = chunk.shape[1:]
        shaped = chunk.view(2, layers, tokens, HEADS, HEAD_DIM).transpose(0, 1)
        record = encode_function(shaped, self.config, self.key_bins, self.value_bins, tokens).to_bytes()
        read = CacheGenGPUEncoderOutput.from_bytes(record)
        buffer = torch.zeros(tokens, 2 * layers * hidden, dtype=torch.uint8)
        keys, values = decode_function_gpu(read.cdf, read.data_chunks, layers, tokens, buffer)
        keys = do_dequantize(keys, self.key_bins, read.max_tensors_key)
        values = do_dequantize(values, self.value_bins, read.max_tensors_value)
        return torch.stack([keys, values]).view_as(chunk).to(chunk.dtype), len(record), 0.0


def reference(codec: Kivi | LloydMax) -> Serde:
    def serde(chunk: Tensor) -> tuple[Tensor, int, float]:
        by_head = chunk.unflatten(-1, (HEADS, HEAD_DIM)).transpose(2, 3)
        keys, values, bits = codec(by_head[0], by_head[1])
        return torch.stack([keys, values]).transpose(2, 3).flatten(3), bits // 8, 0.0

    return serde


def spectral(bits: float, theta: float | None = THETA, profile: ModelProfile | None = None) -> Serde:
    codec = ChunkCodec(bits, Planes(HEAD_DIM), theta, profile)

    def serde(chunk: Tensor) -> tuple[Tensor, int, float]:
        started = time.perf_counter()
        record = codec.encode(chunk)
        seconds = time.perf_counter() - started
        return codec.decode(record, chunk.shape, chunk.dtype), len(record), seconds

    return serde


@dataclass
class Row:
    """The results of one serde over the slices."""

    name: str
    serde: Serde
    tokens: int = 256
    nbytes: int = 0
    numbers: int = 0
    lost: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    whole: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    fidelities: list[Agreement] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    encoding: list[float] = field(default_factory=list)

    def add(self, subject: Subject, text_slice: Slice) -> None:
        both = torch.stack([text_slice.keys, text_slice.values])[:, :, 0].transpose(2, 3).flatten(3)
        back = torch.empty_like(both)
        for start in range(0, PREFIX, self.tokens):
            chunk = both[:, :, start : start + self.tokens].contiguous()
            started = time.perf_counter()
            back[:, :, start : start + self.tokens], nbytes, encoding = self.serde(chunk)
            self.seconds.append((time.perf_counter() - started) / self.tokens)
            self.encoding.append(encoding)
            self.nbytes += nbytes
        self.numbers += both.numel()
        self.lost += (back - both).double().square().sum((1, 2, 3))
        self.whole += both.double().square().sum((1, 2, 3))
        cache = DynamicCache(config=subject.model.config)
        by_head = back.unflatten(-1, (HEADS, HEAD_DIM)).transpose(2, 3)
        for layer, keys, values in zip(cache.layers, by_head[0], by_head[1], strict=True):
            layer.update(keys[None], values[None])  # type: ignore[union-attr]
        self.fidelities.append(subject.fidelity(text_slice, cache))

    def to_dict(self) -> dict[str, Any]:
        bits = 8 * self.nbytes / self.numbers
        key_error, value_error = (self.lost / self.whole).sqrt().tolist()
        return {
            "serde": self.name,
            "chunk_tokens": self.tokens,
            "bits_per_element": bits,
            "smaller_than_fp16": 16 / bits,
            "relative_error": float((self.lost.sum() / self.whole.sum()).sqrt()),
            "key_error": key_error,
            "value_error": value_error,
            "round_trip_ms_per_1k_tokens": 1e6 * median(self.seconds),
            **({"encode_ms_per_chunk": 1e3 * median(self.encoding)} if any(self.encoding) else {}),
            **mean_fidelity(self.fidelities),
        }


def as_a_cache(subject: Subject, text_slice: Slice) -> Agreement:
    """The codec as a cache uses it, with queries, positions and one basis, on the same prefix."""
    config = SpectralConfig(bits_per_element=CACHE_BITS, num_sink_tokens=1, residual_length=0)
    cache = SpectralCache(subject.model, config=config, use_profile=False)
    subject.prefill(text_slice.input_ids[:, :PREFIX], cache)
    return subject.fidelity(text_slice, cache)


def main() -> None:
    options = arguments("lmcache_serde", __doc__ or "", repeats=3)
    rows = [Row("lmcache cachegen", CacheGen()), Row("lmcache fp8", fp8), Row("spectral 8", spectral(8.0))]
    rows += [Row("spectral 2.5", spectral(2.5)), Row("spectral 2.25", spectral(2.25))]
    rows += [Row("turboquant 2, reference", reference(LloydMax(2))), Row("kivi 2, reference", reference(Kivi(2)))]
    rows += [Row("spectral 3", spectral(3.0)), Row("spectral 2.5", spectral(2.5), 1024)]
    rows += [Row("spectral 2.5, keys left rotated", spectral(2.5, None))]
    rows += [Row("kivi 4, reference", reference(Kivi(4))), Row("spectral 5", spectral(5.0))]
    caches: list[Agreement] = []
    subject, number = Subject(), 0
    profile = profile_of(subject.model, subject.model.config.num_hidden_layers)
    if profile is None:
        raise SystemExit("the model has no profile: run `unsloth-spectral profile` first")
    for bits, tokens in ((2.25, 256), (2.5, 256), (3.0, 256), (5.0, 256), (2.5, 1024)):
        rows.append(Row(f"spectral {bits:g}, with profile", spectral(bits, profile=profile), tokens))
    with torch.inference_mode():
        for number, text_slice in enumerate(islice(subject.slices(), options.repeats), start=1):
            for row in rows:
                row.add(subject, text_slice)
                print(text_slice.start, row.name, row.tokens, f"{row.fidelities[-1].kl:.5f}", flush=True)
                if row.name == "lmcache cachegen" and number == 1:
                    # At its bytes exactly: a record is a little smaller, never larger.
                    rows.append(Row("spectral, cachegen's bytes", spectral(8 * row.nbytes / row.numbers)))
            caches.append(as_a_cache(subject, text_slice))
    results = [row.to_dict() for row in rows]
    by_name = {(row["serde"], row["chunk_tokens"]): row for row in results}
    at_fp8, small, theirs = by_name["spectral 8", 256], by_name["spectral 2.5", 256], by_name["lmcache fp8", 256]
    cachegen, same = by_name["lmcache cachegen", 256], by_name["spectral, cachegen's bytes", 256]
    known = by_name["spectral 2.5, with profile", 256]
    two_bits, at_two = by_name["turboquant 2, reference", 256], by_name["spectral 2.25", 256]
    targets = [
        Target("times smaller than fp16, spectral 2.5", 6, small["smaller_than_fp16"], True),
        Target("error over fp8's at its bytes", 1, at_fp8["relative_error"] / theirs["relative_error"], False),
        Target("KL over fp8's at its bytes", 1, at_fp8["kl"] / theirs["kl"], False),
        Target("error over cachegen's at its bytes", 1, same["relative_error"] / cachegen["relative_error"], False),
        Target("KL over cachegen's at its bytes", 1, same["kl"] / cachegen["kl"], False),
        Target("KL with a profile over KL without, 2.5 bits", 1, known["kl"] / small["kl"], False),
        Target(
            "times faster encoding with a profile, 2.5 bits",
            10,
            small["encode_ms_per_chunk"] / known["encode_ms_per_chunk"],
            True,
        ),
        Target("KL over turboquant's at its bytes, 2.25 bits", 1, at_two["kl"] / two_bits["kl"], False),
    ]
    record = {
        "benchmark": "lmcache_serde",
        "lmcache": version_of("lmcache"),
        "slices": number,
        "rows": results,
        "as_a_cache": {"bits_per_element": CACHE_BITS, **mean_fidelity(caches)},
    }
    finish(options.json, record, targets)


if __name__ == "__main__":
    main()
