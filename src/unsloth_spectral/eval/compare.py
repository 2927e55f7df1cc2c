"""The main job: one long document through the dense cache and through spectral ones, side by side."""

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
from unsloth_spectral.eval.documents import tokens_of
from unsloth_spectral.eval.environment import environment
from unsloth_spectral.eval.fidelity import Fidelity, compare_logits
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import Prompt, build_prompt, chat_frame, check_question, token_ids
from unsloth_spectral.eval.tasks.asking import positions_of
from unsloth_spectral.integrations.huggingface import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention

CONTINUATION_TOKENS = 256


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What one cache did.

    Attributes:
        name: ``dense``, ``spectral <preset or bits>`` or ``rank <rank_keys>/<rank_values>``.
        stored_bytes, dense_bytes: after the prefill, all layers; dense in the model's own dtype.
        compression_factor: ``dense_bytes / stored_bytes``.
        bits_per_element: stored bits per number of the dense cache; 16 is a half-precision cache.
        prefill_seconds: the whole prefill, sealing included; ``seal_seconds`` of it were sealing.
        decode_tokens_per_second: greedy decoding after the question.
        fidelity: against the dense cache on the held-out continuation.
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
    fidelity: Fidelity
    text: str
    context_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole run; ``to_dict`` is what ``--json`` writes and the plot reads."""

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
    """Prefill ``context_length`` tokens of ``document``, score the continuation, answer ``question``: for each cache.

    Args:
        loaded: model and tokenizer.
        document: the text; see ``eval.documents``.
        configs: one spectral cache each; the dense cache runs in any case, first.
        question: asked after the context, in the model's chat format.
        context_length: tokens prefilled, the chat format's opening included.
        max_new_tokens: tokens decoded greedily, at least 2.
        seed: 0 starts at the document's beginning; any other number picks a place in it.
        on_progress: called with (stage, done, total).

    Raises:
        InvalidArgumentError: a number is out of range, or model or document are too short for it.
        LoadError: the document is too short.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """
    prompt, start = _prompt(loaded, document, question, context_length, max_new_tokens, seed)
    torch.manual_seed(seed)
    run = _Run(loaded, prompt, max_new_tokens, on_progress)
    # A fresh cache made now raises for an unsupported model before any work is done.
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
    """One model and one prompt, through one cache after another."""

    def __init__(self, loaded: LoadedModel, prompt: Prompt, max_new_tokens: int, on_progress: OnProgress | None):
        self._model: Any = loaded.model
        self._tokenizer: Any = loaded.tokenizer
        self._max_new_tokens, self._on_progress = max_new_tokens, on_progress
        device = loaded.model.device
        self._context, self._question = prompt.context.to(device), prompt.question.to(device)
        self._continuation = prompt.continuation.to(device)
        self._dense_logits: Tensor | None = None
        self._sample: tuple[Tensor, Tensor] | None = None
        self._num_full_layers = 0
        count = self._context.shape[1]
        # The first forward pass pages the weights in, which is no cache's doing.
        self._model(input_ids=self._context[:, :32])
        self.lengths = tuple(sorted({max(1, count * step // 16) for step in range(1, 17)}))

    def dense(self) -> CacheResult:
        """The reference: the library's own cache and the model's own attention."""
        cache, seconds = self._prefill("dense", None)
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        nbytes = storage_bytes(*(tensor for layer in layers for tensor in (layer.keys, layer.values)))
        elements = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))
        full = [layer for layer in layers if layer.keys.shape[-2] == self._context.shape[1]]
        self._num_full_layers = len(full)
        self._sample = (full[0].keys.clone(), full[0].values.clone())
        per_token = self._num_full_layers * storage_bytes(*self._sample) // self._context.shape[1]
        logits = self._continue("dense", copy.deepcopy(cache))
        self._dense_logits = logits
        text, speed = self._decode("dense", cache)
        return CacheResult(
            name="dense",
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
        """A compressed cache, against the dense one run before."""
        assert self._dense_logits is not None, "the dense cache runs first"
        name = config.title
        cache, seconds = self._prefill(name, SpectralCache(self._model, config=config))
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

    def _prefill(self, name: str, cache: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        with layers_reported(self._model, f"{name}: prefill", self._on_progress):
            output = self._model(input_ids=self._context, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        _synchronize(self._context)
        return cache_of(output), time.perf_counter() - started

    def _continue(self, name: str, cache: Any) -> Tensor:
        """Logits ``[256, vocabulary]`` of the held-out tokens, each seeing the true ones before it."""
        with layers_reported(self._model, f"{name}: continuation", self._on_progress):
            output = self._model(input_ids=self._continuation[:, :-1], **cache_argument(cache))
        return output.logits[0]

    def _decode(self, name: str, cache: Any) -> tuple[str, float]:
        """Answer the question greedily; the text, and tokens per second after the first."""
        streamer = _Stopwatch(f"{name}: decode", self._max_new_tokens, self._on_progress)
        input_ids = torch.cat([self._context, self._question], dim=1)
        # An end token outside the vocabulary: every cache decodes the same number of tokens. What follows the real end
        # is not shown.
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            **cache_argument(cache),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=self._model.get_input_embeddings().num_embeddings,
            pad_token_id=0,
            streamer=streamer,
        )
        tokens = output[0, input_ids.shape[1] :].tolist()
        end = self._tokenizer.eos_token_id
        answer = tokens[: tokens.index(end)] if end in tokens else tokens
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()
        return text, streamer.tokens_per_second

    def _bytes_at(self, length: int, config: CodecConfig) -> int:
        """Stored bytes of all full-attention layers after a prefill of ``length`` tokens.

        Sealed for one layer from its real keys and values; the layers' shapes, and so their bytes, are alike.
        """
        assert self._sample is not None, "the dense cache runs first"
        keys, values = self._sample
        layer = SpectralLayer(config)
        layer.append(keys[:, :, :length].clone(), values[:, :, :length].clone())
        layer.seal()
        return layer.stats().stored_bytes * self._num_full_layers


class _Stopwatch:
    """A streamer for ``generate`` that notes when each token came."""

    def __init__(self, stage: str, total: int, on_progress: OnProgress | None) -> None:
        self._stage, self._total, self._on_progress = stage, total, on_progress
        self._times: list[float] = []
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if not self._seen_prompt:  # generate hands over the prompt first
            self._seen_prompt = True
            return
        self._times.append(time.perf_counter())
        if self._on_progress is not None:
            self._on_progress(self._stage, len(self._times), self._total)

    def end(self) -> None:
        """Part of the streamer protocol; there is nothing to flush."""

    @property
    def tokens_per_second(self) -> float:
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


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
        # The least that a context can be: the chat format's opening and a token of the document.
        least = token_ids(loaded.tokenizer, chat_frame(loaded.tokenizer, question)[0]).shape[1] + 1
        if least + following <= limit:
            fix = f"lower context_length to at most {limit - following}"
        elif least + CONTINUATION_TOKENS <= limit:
            fix = "lower max_new_tokens, or ask a shorter question"
        else:
            fix = "take a model with more"
        raise InvalidArgumentError(
            f"context_length {context_length} needs {context_length + following} positions with what follows it, but "
            f"{loaded.name} has {limit}: {fix}"
        )
    return prompt, start


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
