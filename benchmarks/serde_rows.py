"""Rows of the benchmarks of serdes: SmolLM2's keys and values of a prefix, through a serde and back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

import torch
from smollm2 import PREFIX, Slice, Subject, mean_fidelity
from torch import Tensor
from transformers import DynamicCache

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Planes
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.eval.agreement import Agreement

THETA, HEADS, HEAD_DIM = 100_000.0, 3, 64
# From a chunk ``[2, layers, tokens, heads * head_dim]`` to the decoded chunk, the bytes of its record, and the seconds
# of encoding, 0 if they are not measured alone.
Serde: TypeAlias = Callable[[Tensor], tuple[Tensor, int, float]]


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

    @property
    def encode_seconds(self) -> float:
        """Of a chunk, the median."""
        return median(self.encoding)

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
            **({"encode_ms_per_chunk": 1e3 * self.encode_seconds} if any(self.encoding) else {}),
            **mean_fidelity(self.fidelities),
        }
