"""A document and a question about it, in the model's own chat format."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, each ``[1, n]``.

    Attributes:
        context: the tokens to prefill: the chat format's opening, then the document's tokens.
        continuation: the document's next tokens, held out.
        question: the question and the chat format's closing, up to where the answer begins.
    """

    context: Tensor
    continuation: Tensor
    question: Tensor


def build_prompt(
    tokenizer: Any, document_ids: Tensor, question: str, *, context_length: int, start: int, continuation_length: int
) -> Prompt:
    """Cut ``document_ids [1, n]`` from token ``start`` so that the context has ``context_length`` tokens in all.

    Raises:
        InvalidArgumentError: the context has no room for the chat format's opening, or the document ends too early.
    """
    opening, closing = chat_frame(tokenizer, question)
    opening_ids, closing_ids = token_ids(tokenizer, opening), token_ids(tokenizer, closing)
    if context_length <= opening_ids.shape[1]:
        raise InvalidArgumentError(
            f"context_length must exceed the {opening_ids.shape[1]} tokens of the chat format's opening, "
            f"got {context_length}"
        )
    stop = start + context_length - opening_ids.shape[1]
    if stop + continuation_length > document_ids.shape[1]:
        raise InvalidArgumentError(
            f"the document has {document_ids.shape[1]} tokens, {stop + continuation_length} are needed from token "
            f"{start} on: lower context_length or give a longer document"
        )
    return Prompt(
        context=torch.cat([opening_ids, document_ids[:, start:stop]], dim=1),
        continuation=document_ids[:, stop : stop + continuation_length],
        question=closing_ids,
    )


def check_question(question: str) -> None:
    """Refuse a question that cannot be tokenized.

    Raises:
        InvalidArgumentError: the question is empty, or holds bytes that are invalid in the terminal's encoding.
    """
    if not question.strip():
        raise InvalidArgumentError("question must not be empty")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidArgumentError(
            f"question must be text, got {question!r:.60}, which is invalid in the terminal's encoding: write it in "
            "that encoding, usually UTF-8"
        ) from None


def chat_frame(tokenizer: Any, question: str) -> tuple[str, str]:
    """The text before the document and the text after it."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", f"\n\nQuestion: {question}\nAnswer:"
    messages = [{"role": "user", "content": f"{_MARK}\n\n{question}"}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opening, _, closing = text.partition(_MARK)
    return opening, closing


def followup_frame(tokenizer: Any, question: str) -> str:
    """The text between an answer and the next one: the end of the answer, then the next question."""
    if not getattr(tokenizer, "chat_template", None):
        return f"\n\nQuestion: {question}\nAnswer:"
    messages = [
        {"role": "user", "content": _MARK},
        {"role": "assistant", "content": _MARK},
        {"role": "user", "content": question},
    ]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.split(_MARK, 2)[2]


def token_ids(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: the caller checks whether the model has room.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return row_of(ids)


def row_of(tokens: list[int]) -> Tensor:
    """``tokens`` as one sequence, ``[1, n]`` int64, on the CPU."""
    return torch.tensor([tokens], dtype=torch.int64, device="cpu")
