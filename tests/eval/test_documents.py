"""Documents: the default one, files of the user's, and what is refused."""

import logging
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval.documents import default_document, read_document, tokens_from, tokens_of


def byte_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """One token per byte, with a beginning-of-sequence token unless special tokens are left out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)


def refused(path: object) -> str:
    with pytest.raises(LoadError) as caught:
        read_document(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestDefault:
    def test_is_long_text_in_a_fixed_order(self) -> None:
        from pydoc_data.topics import topics

        document = default_document()
        assert len(document) > 200_000
        assert "with" in topics
        names = sorted(topics)
        assert document.startswith(topics[names[0]] + "\n\n" + topics[names[1]])
        assert document.endswith(topics[names[-1]])
        assert document == default_document() == read_document(None)

    def test_python_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(LoadError, match="give a text file instead"):
            default_document()


class TestRead:
    def test_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("naïve\r\n世界 🤗".encode())
        assert read_document(path) == read_document(str(path)) == "naïve\n世界 🤗"

    def test_byte_order_mark_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbftext")
        assert read_document(path) == "text"

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("text")
        assert read_document("~/a.txt") == "text"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "is empty: give a file with text"),
            (b" \n\t \r\n", "is empty: give a file with text"),
            (b"caf\xe9", "is not UTF-8 text"),
            ("text".encode("utf-16"), "is not UTF-8 text"),
            (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
            (b"abc\x00def", "is a binary file"),
        ],
    )
    def test_bad_content(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        message = refused(path)
        assert repr(str(path)) in message
        assert expected in message

    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "missing.txt"
        assert refused(path) == f"no document at {str(path)!r}: check the path"
        assert "no document at ''" in refused("")

    def test_folder(self, tmp_path: Path) -> None:
        assert f"{str(tmp_path)!r} is a folder" in refused(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
    def test_devices_and_pipes(self, tmp_path: Path) -> None:
        for device in ("/dev/zero", "/dev/full", "/dev/null"):
            assert f"{device!r} is a device" in refused(Path(device))
        pipe = tmp_path / "pipe"  # as a shell's <(command) is
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=("text",))
        writer.start()
        assert read_document(pipe) == "text"
        writer.join()

    @pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "a\nb"])
    def test_impossible_path(self, path: str) -> None:
        assert repr(path) in refused(path)

    def test_file_as_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        assert "cannot be read" in refused(tmp_path / "a.txt" / "b.txt")

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Not by chmod: tests may run as root, who can read everything.
        def deny(*args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", deny)
        message = refused("a.txt")
        monkeypatch.undo()
        assert "'a.txt' cannot be read (Permission denied): give a readable text file" in message


class TestTokens:
    def test_shape_and_no_special_tokens(self) -> None:
        tokenizer = byte_tokenizer()
        assert tokenizer("abc")["input_ids"][0] == 0
        tokens = tokens_of("abc", tokenizer, needed=3)
        assert tokens.shape == (1, 3)
        assert tokens.dtype == torch.int64
        assert tokenizer.convert_ids_to_tokens(tokens[0].tolist()) == ["a", "b", "c"]

    def test_the_whole_document_comes_back(self) -> None:
        assert tokens_of("a" * 100, byte_tokenizer(), needed=7).shape == (1, 100)

    @pytest.mark.parametrize(("document", "count"), [("abc", "3"), ("", "0"), ("a" * 1500, "1,500")])
    def test_too_short(self, document: str, count: str) -> None:
        with pytest.raises(LoadError) as caught:
            tokens_of(document, byte_tokenizer(), needed=2000)
        assert str(caught.value) == (
            f"the document has {count} tokens and 2,000 are needed: choose a shorter --context-length, or a longer "
            "document"
        )

    def test_from_each_start_on(self) -> None:
        tokenizer = byte_tokenizer()
        assert tokens_from("a" * 100, tokenizer, [0, 90], 10).shape == (1, 100)
        with pytest.raises(LoadError) as caught:
            tokens_from("a" * 100, tokenizer, [91, 0], 10)
        assert str(caught.value) == (
            "the document has 100 tokens and 101 are needed: choose --starts of at most 90, or give a longer document"
        )
        with pytest.raises(LoadError, match="has 100 tokens and 101 are needed: give a longer document"):
            tokens_from("a" * 100, tokenizer, [0], 101)

    def test_the_same_text_is_cut_once_by_a_tokenizer(self) -> None:
        calls: list[str] = []

        class Counting:
            def __init__(self, first: int) -> None:
                self.first = first

            def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
                calls.append(text)
                return {"input_ids": [self.first, *range(len(text) - 1)]}

        first, second = Counting(7), Counting(8)
        for _ in range(2):
            tokens = tokens_of("abc", first, 1)
            assert tokens.tolist() == [[7, 0, 1]]
            tokens += 1  # what is handed out is the caller's own
        assert calls == ["abc"]
        assert tokens_of("abc", second, 1).tolist() == [[8, 0, 1]]
        assert tokens_of("abcd", second, 1).shape == (1, 4)
        assert calls == ["abc", "abc", "abcd"]

    def test_no_warning_beyond_the_models_context(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = byte_tokenizer(model_max_length=8)
        # Whatever other tests and the environment have made of transformers' logger.
        caplog.set_level(logging.WARNING, logger="transformers")
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        assert tokens_of("a" * 100, tokenizer, needed=100).shape == (1, 100)
        assert caplog.messages == []
        tokenizer("a" * 100)  # the same call without the option does warn, so the check above can fail
        assert "longer than the specified maximum" in caplog.text
