"""A tokenizer that needs no file: one token per character."""

from typing import Any

import pytest
import torch


class CharacterTokenizer:
    """Characters to ids below 128 and back; no chat format unless one is set."""

    bos_token = "^"
    eos_token_id = 2
    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> Any:
        ids = [3 + ord(character) % 120 for character in text]

        class Encoding(dict[str, Any]):
            input_ids = ids

        return Encoding(input_ids=ids)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"<user>{messages[0]['content']}</user><assistant>"


@pytest.fixture
def character_tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


@pytest.fixture
def document() -> str:
    """A text of 3,000 characters that does not repeat itself."""
    codes = torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    return "".join(map(chr, codes))
