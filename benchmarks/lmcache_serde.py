"""LMCache's serdes and the spectral one on a prefix: bytes, error, and agreement of the model's continuation.

A prefix of 4,096 tokens (SmolLM2's real keys and values) goes through each serde completely, in chunks as LMCache
stores them; then the model continues on the decoded prefix. LMCache's own fp8 and CacheGen are its own code, on the
CPU. Its kivi returns chunks unchanged, and its TurboQuant needs CUDA: this library's reference implementations of both
papers stand in. ``--repeats`` are the slices of text. Needs the model's profile (``unsloth-spectral profile``) and the
engines' environment: ``make bench-engines``.
"""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from harness import Target, arguments, finish
from lmcache.storage_backend.serde.cachegen_basics import CacheGenGPUEncoderOutput
from lmcache.storage_backend.serde.cachegen_decoder import decode_function_gpu, do_dequantize
from lmcache.storage_backend.serde.cachegen_encoder import encode_function
from lmcache.v1.distributed.serde.fp8 import Fp8QuantizationDeserializer, Fp8QuantizationSerializer
from lmcache.v1.storage_backend.naive_serde.cachegen_basics import CacheGenConfig
from serde_rows import HEAD_DIM, HEADS, Row, Serde, spectral
from smollm2 import PREFIX, Slice, Subject, mean_fidelity
from torch import Tensor

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.eval.agreement import Agreement
from unsloth_spectral.eval.environment import version_of
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.methods.lloyd_max import LloydMax
from unsloth_spectral.integrations.embedded import embedded_folder

CACHE_BITS = 2.5


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
    profile = subject.profile()
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
