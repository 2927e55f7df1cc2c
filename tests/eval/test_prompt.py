"""How a document and a question are cut and framed."""

from typing import Any

import pytest
import torch

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.prompt import build_prompt, check_question


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text).input_ids


def test_plain_frame(character_tokenizer: Any, document: str) -> None:
    document_ids = torch.tensor([ids(character_tokenizer, document)])
    prompt = build_prompt(
        character_tokenizer, document_ids, "Why?", context_length=100, start=7, continuation_length=20
    )
    assert prompt.context.tolist() == [ids(character_tokenizer, "^" + document[7:106])]
    assert prompt.continuation.tolist() == [ids(character_tokenizer, document[106:126])]
    assert prompt.question.tolist() == [ids(character_tokenizer, "\n\nQuestion: Why?\nAnswer:")]


def test_chat_frame(character_tokenizer: Any, document: str) -> None:
    character_tokenizer.chat_template = "a template"
    document_ids = torch.tensor([ids(character_tokenizer, document)])
    prompt = build_prompt(
        character_tokenizer, document_ids, "Why?", context_length=100, start=0, continuation_length=20
    )
    assert prompt.context.tolist() == [ids(character_tokenizer, "<user>" + document[:94])]
    assert prompt.question.tolist() == [ids(character_tokenizer, "\n\nWhy?</user><assistant>")]


def test_the_document_may_end_exactly_there(character_tokenizer: Any) -> None:
    document_ids = torch.tensor([ids(character_tokenizer, "x" * 119)])
    options = {"context_length": 100, "start": 0}
    build_prompt(character_tokenizer, document_ids, "Why?", continuation_length=20, **options)
    with pytest.raises(InvalidArgumentError, match="has 119 tokens, 120 are needed"):
        build_prompt(character_tokenizer, document_ids, "Why?", continuation_length=21, **options)


def test_no_room_for_the_opening(character_tokenizer: Any) -> None:
    document_ids = torch.tensor([ids(character_tokenizer, "x" * 119)])
    with pytest.raises(InvalidArgumentError, match="must exceed the 1 tokens"):
        build_prompt(character_tokenizer, document_ids, "Why?", context_length=1, start=0, continuation_length=1)


@pytest.mark.parametrize(("question", "message"), [("", "empty"), (" \n", "empty"), ("caf\udce9", r"got 'caf\\udce9'")])
def test_what_is_no_question(question: str, message: str) -> None:
    check_question("café \0?")
    with pytest.raises(InvalidArgumentError, match=message):
        check_question(question)
