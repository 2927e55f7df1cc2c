"""Compare caches: run one long document through the dense cache and through spectral caches."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.agreement import Agreement, compare_logits
from unsloth_spectral.eval.documents import tokens_of
from unsloth_spectral.eval.environment import environment
from unsloth_spectral.eval.methods.base import DENSE
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import Prompt, build_prompt, chat_frame, check_question, token_ids
from unsloth_spectral.eval.tasks.asking import answer_text, continue_on, fill, greedy_tokens, positions_of
from unsloth_spectral.integrations.huggingface import SpectralCache
from unsloth_spectral.integrations.huggingface.cache import dense_cache
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention

CONTINUATION_TOKENS = 256


@dataclass(frozen=True, slots=True)
class CacheResult:
    """The figures and the answer of one cache.

    Attributes:
        name: ``dense``, ``spectral <preset or bits>`` or ``rank <rank_keys>/<rank_values>``.
        stored_bytes, dense_bytes: of all layers after the prefill; dense bytes in the model's own dtype.
        compression_factor: ``dense_bytes / stored_bytes``.
        bits_per_element: stored bits per number of the dense cache; 16 is a half-precision cache.
        prefill_seconds: the whole prefill, sealing included.
        seal_seconds: the part of it that sealing took.
        decode_tokens_per_second: of greedy decoding after the question.
        fidelity: agreement with the dense cache on the held-out continuation.
        text: the answer.
        context_bytes: stored bytes after prefills of the lengths in the comparison's ``lengths``.
    """

    name: str
    stored_bytes: int
    dense_bytes: int
    compression_factor: float
    bits_per_element: float
    prefill_seconds: float
    seal_seconds: float
    decode_tokens_per_second: float
    fidelity: Agreement
    text: str
    context_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of a comparison; ``--json`` writes its ``to_dict``, and the plot reads it."""

    model: str
    dtype: str
    context_length: int
    start: int
    question: str
    config: dict[str, int]
    lengths: tuple[int, ...]
    caches: tuple[CacheResult, ...]
    environment: dict[str, str | int]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def compare(
    loaded: LoadedModel,
    document: str,
    configs: Sequence[CodecConfig],
    *,
    question: str,
    context_length: int = 4096,
    max_new_tokens: int = 64,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """For each cache: prefill ``context_length`` tokens of ``document``, score the continuation, answer ``question``.

    Args:
        loaded: model and tokenizer.
        document: the text; see ``eval.documents``.
        configs: one spectral cache each; the dense cache always runs first.
        question: asked after the context, in the model's chat format.
        context_length: tokens prefilled, the chat format's opening included.
        max_new_tokens: tokens decoded greedily, at least 2.
        seed: 0 starts at the document's beginning; any other number picks a random start.
        on_progress: called with (stage, done, total).

    Raises:
        InvalidArgumentError: a number is out of range, or model or document are too short for it.
        LoadError: the document is too short.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """
    prompt, start = _prompt(loaded, document, question, context_length, max_new_tokens, seed)
    torch.manual_seed(seed)
    run = _Run(loaded, prompt, max_new_tokens, on_progress)
    # Making the caches now refuses an unsupported model before any work is done.
    for config in configs:
        SpectralCache(loaded.model, config=config)
    unpatch_unsloth_attention(loaded.model)
    try:
        caches = [run.dense()]
        caches.extend(run.spectral(config) for config in configs)
    finally:
        unpatch_unsloth_attention(loaded.model)
    return Comparison(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        context_length=context_length,
        start=start,
        question=question,
        config={
            "block_size": configs[0].block_size,
            "num_sink_tokens": configs[0].num_sink_tokens,
            "residual_length": configs[0].residual_length,
        }
        if configs
        else {},
        lengths=run.lengths,
        caches=tuple(caches),
        environment=environment(),
    )


class _Run:
    """Runs one model and one prompt through one cache after another."""

    def __init__(self, loaded: LoadedModel, prompt: Prompt, max_new_tokens: int, on_progress: OnProgress | None):
        self._loaded, self._model = loaded, loaded.model
        self._max_new_tokens, self._on_progress = max_new_tokens, on_progress
        device = loaded.model.device
        self._context, self._question = prompt.context.to(device), prompt.question.to(device)
        self._continuation = prompt.continuation.to(device)
        self._dense_logits: Tensor | None = None
        self._sample: tuple[Tensor, Tensor] | None = None
        self._num_full_layers = 0
        count = self._context.shape[1]
        # The first forward pass loads the weights into memory; no cache's time should include that.
        continue_on(loaded, dense_cache(self._model), self._context[:, :32])
        self.lengths = tuple(sorted({max(1, count * step // 16) for step in range(1, 17)}))

    def dense(self) -> CacheResult:
        """The reference: transformers' dense cache and the model's own attention."""
        cache: Any = dense_cache(self._model)
        seconds = self._prefill(DENSE, cache)
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        nbytes = storage_bytes(*(tensor for layer in layers for tensor in (layer.keys, layer.values)))
        elements = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))
        full = [layer for layer in layers if layer.keys.shape[-2] == self._context.shape[1]]
        self._num_full_layers = len(full)
        self._sample = (full[0].keys.clone(), full[0].values.clone())
        per_token = self._num_full_layers * storage_bytes(*self._sample) // self._context.shape[1]
        logits = self._continue(DENSE, copy.deepcopy(cache))
        self._dense_logits = logits
        text, speed = self._decode(DENSE, cache)
        return CacheResult(
            name=DENSE,
            stored_bytes=nbytes,
            dense_bytes=nbytes,
            compression_factor=1.0,
            bits_per_element=8 * nbytes / elements,
            prefill_seconds=seconds,
            seal_seconds=0.0,
            decode_tokens_per_second=speed,
            fidelity=compare_logits(logits, logits, self._continuation[0, 1:]),
            text=text,
            context_bytes=tuple(per_token * length for length in self.lengths),
        )

    def spectral(self, config: CodecConfig) -> CacheResult:
        """A compressed cache, compared with the dense cache that ran before."""
        assert self._dense_logits is not None, "the dense cache runs first"
        name = config.title
        cache = SpectralCache(self._model, config=config)
        seconds = self._prefill(name, cache)
        stats: CacheStats = cache.stats()
        logits = self._continue(name, copy.deepcopy(cache))
        text, speed = self._decode(name, cache)
        return CacheResult(
            name=name,
            stored_bytes=stats.stored_bytes,
            dense_bytes=stats.dense_bytes,
            compression_factor=stats.compression_factor,
            bits_per_element=stats.bits_per_element,
            prefill_seconds=seconds,
            seal_seconds=stats.seal_seconds,
            decode_tokens_per_second=speed,
            fidelity=compare_logits(self._dense_logits, logits, self._continuation[0, 1:]),
            text=text,
            context_bytes=tuple(self._bytes_at(length, config) for length in self.lengths),
        )

    def _prefill(self, name: str, cache: Any) -> float:
        """Fill ``cache`` with the context; returns the seconds that this took."""
        started = time.perf_counter()
        fill(self._loaded, cache, self._context, f"{name}: prefill", self._on_progress)
        _synchronize(self._context)
        return time.perf_counter() - started

    def _continue(self, name: str, cache: Any) -> Tensor:
        """Logits ``[256, vocabulary]`` on the held-out tokens, each after the true tokens before it."""
        with layers_reported(self._model, f"{name}: continuation", self._on_progress):
            return continue_on(self._loaded, cache, self._continuation[:, :-1])

    def _decode(self, name: str, cache: Any) -> tuple[str, float]:
        """Answer the question greedily; returns the text, and tokens per second after the first token.

        Every cache decodes the same number of tokens; the text ends at the first end token.
        """
        tokens: list[int] = []
        times: list[float] = []
        stage, most = f"{name}: decode", self._max_new_tokens
        for token in greedy_tokens(self._loaded, cache, self._question, most, stage, self._on_progress):
            tokens.append(token)
            times.append(time.perf_counter())
        return answer_text(self._loaded, tokens).strip(), (len(times) - 1) / (times[-1] - times[0])

    def _bytes_at(self, length: int, config: CodecConfig) -> int:
        """Stored bytes of all full-attention layers after a prefill of ``length`` tokens.

        One layer is sealed from its real keys and values; the others have the same shapes and so about the same bytes.
        """
        assert self._sample is not None, "the dense cache runs first"
        keys, values = self._sample
        layer = SpectralLayer(config)
        layer.append(keys[:, :, :length].clone(), values[:, :, :length].clone())
        layer.seal()
        return layer.stats().stored_bytes * self._num_full_layers


def _prompt(
    loaded: LoadedModel, document: str, question: str, context_length: int, max_new_tokens: int, seed: int
) -> tuple[Prompt, int]:
    for name, value, least in (("context_length", context_length, 1), ("max_new_tokens", max_new_tokens, 2)):
        if value < least:
            raise InvalidArgumentError(f"{name} must be at least {least}, got {value}")
    if not 0 <= seed < 2**63:
        raise InvalidArgumentError(f"seed must be 0 to 2**63 - 1, got {seed}")
    check_question(question)
    needed = context_length + CONTINUATION_TOKENS + 1
    document_ids = tokens_of(document, loaded.tokenizer, needed)
    last_start = document_ids.shape[1] - needed
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(last_start + 1, (), generator=generator, dtype=torch.int64, device="cpu")) if seed else 0
    prompt = build_prompt(
        loaded.tokenizer,
        document_ids,
        question,
        context_length=context_length,
        start=start,
        continuation_length=CONTINUATION_TOKENS + 1,
    )
    answer = prompt.question.shape[1] + max_new_tokens
    following, limit = max(CONTINUATION_TOKENS, answer), positions_of(loaded)
    if limit is not None and context_length + following > limit:
        # The shortest possible context: the chat format's opening and one token of the document.
        least = token_ids(loaded.tokenizer, chat_frame(loaded.tokenizer, question)[0]).shape[1] + 1
        if least + following <= limit:
            fix = f"lower context_length to at most {limit - following}"
        elif least + CONTINUATION_TOKENS <= limit:
            fix = "lower max_new_tokens, or ask a shorter question"
        else:
            fix = "choose a model with more positions"
        raise InvalidArgumentError(
            f"context_length {context_length} needs {context_length + following} positions with what follows it, but "
            f"{loaded.name} has {limit}: {fix}"
        )
    return prompt, start


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
