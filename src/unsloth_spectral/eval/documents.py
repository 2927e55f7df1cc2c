"""Texts to measure models on: a default text that ships with Python, or the user's file."""

import os
import stat
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from unsloth_spectral.errors import LoadError


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used here."""

    def __call__(self, text: str, /, **options: Any) -> Any:
        """Return a mapping whose ``input_ids`` are the token ids of ``text``."""

    def __hash__(self) -> int:
        """Tokens are cached by tokenizer."""


def default_document() -> str:
    """The Python language reference as the standard library carries it for ``help()``, about 465,000 characters.

    Its topics are joined in sorted order. The text differs a little from one Python release to the next.

    Raises:
        LoadError: this Python was built without it.
    """
    # Half a megabyte of text, needed only here.
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LoadError("this Python lacks pydoc_data, the default document: give a text file instead") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_document(path: str | os.PathLike[str] | None) -> str:
    """The text of the UTF-8 file at ``path``, or the default document for None.

    Raises:
        LoadError: the file is missing, a folder, a device, unreadable, not UTF-8 text, or blank.
    """
    if path is None:
        return default_document()
    title = os.fspath(path)
    # A pipe such as `<(command)` ends and is allowed; /dev/zero never ends.
    if _is_device(os.path.expanduser(title)):
        raise LoadError(f"document {title!r} is a device: give a text file")
    try:
        # utf-8-sig: a byte order mark is no part of the text.
        with open(os.path.expanduser(title), encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        raise LoadError(f"no document at {title!r}: check the path") from None
    except IsADirectoryError:
        raise LoadError(f"document {title!r} is a folder: give a text file") from None
    except UnicodeDecodeError:
        raise LoadError(f"document {title!r} is not UTF-8 text: give a plain text file saved as UTF-8") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LoadError(f"document {title!r} cannot be read ({reason}): give a readable text file") from error
    except ValueError as error:
        raise LoadError(f"document {title!r} is not a valid path: check the path") from error
    if "\0" in text:  # valid UTF-8, but no text contains it
        raise LoadError(f"document {title!r} is a binary file: give a plain text file saved as UTF-8")
    if not text.strip():
        raise LoadError(f"document {title!r} is empty: give a file with text in it")
    return text


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # `open` says what it is
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def tokens_of(
    document: str,
    tokenizer: Tokenizer,
    needed: int,
    *,
    fix: str = "choose a shorter --context-length, or a longer document",
) -> torch.Tensor:
    """Token ids of the whole document, without special tokens, as int64 of shape ``(1, n)`` with ``n >= needed``.

    Raises:
        LoadError: the document has fewer than ``needed`` tokens; the message ends in ``fix``.
    """
    ids = _ids(document, tokenizer)
    if len(ids) < needed:
        raise LoadError(f"the document has {len(ids):,} tokens and {needed:,} are needed: {fix}")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def tokens_from(document: str, tokenizer: Tokenizer, starts: Sequence[int], needed: int) -> torch.Tensor:
    """As ``tokens_of``, with at least ``needed`` tokens behind each of ``starts``.

    Raises:
        LoadError: the document ends too early.
    """
    room = len(_ids(document, tokenizer)) - needed
    lower = f"choose --starts of at most {room:,}, or " if room >= 0 else ""
    return tokens_of(document, tokenizer, max(starts) + needed, fix=f"{lower}give a longer document")


# Half a megabyte takes half a second, and every method on every case needs the same tokens.
@lru_cache(maxsize=1)
def _ids(document: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    # verbose=False: documents here are usually longer than the model's context.
    return tuple(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
