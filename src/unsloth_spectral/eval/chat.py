"""A conversation about a document with a compressed cache, which a store may keep between runs."""

import time
from collections.abc import Iterator
from typing import Any

from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import chat_frame, check_question, followup_frame, row_of, token_ids
from unsloth_spectral.eval.tasks.asking import positions_of
from unsloth_spectral.integrations.huggingface import PrefixStore, SpectralCache
from unsloth_spectral.integrations.huggingface.prefill import feed
from unsloth_spectral.integrations.models import LoadedModel

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # an incomplete character: some of its bytes are still to come


class Conversation:
    """Questions and answers about one document, in the model's own chat format.

    Attributes:
        document_tokens: tokens before the first question; ``restored_tokens`` of them came from the store.
        prefill_seconds: seconds until the first question could be asked.

    Args:
        loaded: model and tokenizer.
        document: the text.
        config: options of the compression.
        store: keeps the document's cache between runs; None keeps nothing.
        document_length: tokens of the document to use; None for all.
        answer_length: the most tokens of an answer.
        on_progress: called with (stage, done, total).

    Raises:
        InvalidArgumentError: the model has no room for the document and a question.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        document: str,
        *,
        config: CodecConfig,
        store: PrefixStore | None = None,
        document_length: int | None = None,
        answer_length: int = 256,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._model: Any = loaded.model
        self._tokenizer: Any = loaded.tokenizer
        self._answer_length, self._is_first = answer_length, True
        opening, _ = chat_frame(self._tokenizer, "")
        text = self._tokens(document)[:document_length]
        self._ids = [*self._tokens(opening), *text]
        self.document_tokens = len(self._ids)
        self._positions = positions_of(loaded)
        if self._positions is not None:
            most = self._positions - (self.document_tokens - len(text)) - answer_length
            advice = f"take at most {most} of the document's tokens (--context-length)"
            self._check_room(0, advice if most > 0 else "ask for shorter answers (--max-new-tokens)")
        self._stops = self._stop_tokens()
        input_ids = row_of(self._ids)
        started = time.perf_counter()
        self.restored_tokens = 0
        with layers_reported(self._model, "reading the document", on_progress):
            if store is None:
                self._cache = SpectralCache(self._model, config=config)
                # The last token is fed with the question, as with a store.
                if self.document_tokens > 1:
                    feed(self._model, input_ids[:, :-1], self._cache)
            else:
                self.restored_tokens = store.num_stored(self._model, input_ids, config=config)
                self._cache = store.prefill(self._model, input_ids, config=config)
        self.prefill_seconds = time.perf_counter() - started

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; the caller may stop early.

        Raises:
            InvalidArgumentError: the question is not text, or the model has no room for it and an answer. The
                conversation is unchanged and can continue.
        """
        check_question(question)
        frame = (
            chat_frame(self._tokenizer, question)[1] if self._is_first else followup_frame(self._tokenizer, question)
        )
        question_ids = self._tokens(frame)
        self._check_room(len(question_ids), "start a new conversation, or ask a shorter question")
        self._ids.extend(question_ids)
        self._is_first = False
        answer: list[int] = []
        shown = 0
        while len(answer) < self._answer_length:
            token = self._next()
            if token in self._stops:
                break
            answer.append(token)
            self._ids.append(token)
            text = self._tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith(_UNFINISHED):
                yield text[shown:]
                shown = len(text)

    def stats(self) -> CacheStats:
        """Statistics of the cache at this moment."""
        return self._cache.stats()

    def _next(self) -> int:
        # Tokens missing in the cache: new ones, and those of a pass that was interrupted.
        missing = row_of(self._ids[self._cache.get_seq_length() :])
        return int(feed(self._model, missing, self._cache)[0].argmax())

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = token_ids(self._tokenizer, text)[0].tolist()
        return ids

    def _stop_tokens(self) -> set[int]:
        configured = self._model.generation_config.eos_token_id
        stops = configured if isinstance(configured, list) else [configured]
        return {token for token in [*stops, self._tokenizer.eos_token_id] if token is not None}

    def _check_room(self, more: int, fix: str) -> None:
        needed = len(self._ids) + more + self._answer_length
        if self._positions is not None and needed > self._positions:
            raise InvalidArgumentError(
                f"the document, the conversation and an answer need {needed} tokens, and the model has "
                f"{self._positions}: {fix}"
            )
