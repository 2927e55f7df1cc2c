"""Loading models: the embedded one, local folders, and every failure as one clear line."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.integrations import embedded
from unsloth_spectral.integrations import models as module
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE
from unsloth_spectral.integrations.models import LoadedModel, load_model

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save(model: PreTrainedModel, folder: Path, **options: object) -> None:
    """Save without the progress bar, which the tests of silence would count."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    logging.enable_progress_bar()


@pytest.fixture
def saved(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> Path:
    folder = tmp_path / "saved"
    save(tiny_llama(), folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def failure(*args: object, **kwargs: object) -> str:
    """The message of the LoadError that ``load_model`` raises, after the checks that hold for all of them."""
    with pytest.raises(LoadError) as caught:
        load_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


class TestEmbedded:
    def test_logits_are_finite(self, smollm2: LoadedModel) -> None:
        assert smollm2.name == module.EMBEDDED_NAME
        assert not smollm2.model.training
        assert smollm2.model.dtype == torch.float32
        with torch.no_grad():
            logits = smollm2.model(**smollm2.tokenizer("Hello there, world", return_tensors="pt")).logits
        assert logits.shape[-1] == len(smollm2.tokenizer)
        assert logits.isfinite().all()

    def test_greedy_continuation(self, smollm2: LoadedModel) -> None:
        prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
        tokens = smollm2.model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert "Paris" in smollm2.tokenizer.decode(tokens[0])

    @pytest.mark.parametrize(("asked", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
    def test_without_a_copy_the_gguf_file_is_read(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        tiny_llama: Callable[..., LlamaForCausalLM],
        asked: str | None,
        expected: torch.dtype,
    ) -> None:
        source, lines = tmp_path / "model.gguf", []
        source.write_bytes(b"GGUF and so on")
        monkeypatch.setenv(CACHE_VARIABLE, str(source / "cache"))
        monkeypatch.setattr(embedded, "embedded_file", lambda: source)
        monkeypatch.setattr(module, "embedded_file", lambda: source)
        model, tokenizer = tiny_llama(), word_tokenizer()
        monkeypatch.setattr(module, "read_gguf", lambda path: (model.train(), tokenizer) if path == source else None)
        loaded = load_model(device="cpu", dtype=asked, on_progress=lines.append)
        assert (loaded.name, loaded.tokenizer) == (module.EMBEDDED_NAME, tokenizer)
        assert loaded.model.dtype == expected
        assert not loaded.model.training
        assert "from its GGUF file" in lines[-1]

    def test_copy_that_does_not_load(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, cache = tmp_path / "model.gguf", tmp_path / "cache"
        source.write_bytes(b"GGUF and so on")
        monkeypatch.setenv(CACHE_VARIABLE, str(cache))
        monkeypatch.setattr(embedded, "embedded_file", lambda: source)
        monkeypatch.setattr(
            embedded, "convert_gguf", lambda _, target: shutil.copytree(saved, target, dirs_exist_ok=True)
        )
        assert load_model(device="cpu").name == module.EMBEDDED_NAME
        (folder,) = cache.iterdir()
        weights = folder / "model.safetensors"
        weights.write_bytes(b"\xff" * weights.stat().st_size)
        message = failure(device="cpu")
        assert "corrupted" in message
        assert f"{str(folder)!r} is made again if that folder is deleted" in message


class TestLocalFolder:
    def test_round_trip(
        self,
        saved: Path,
        tiny_llama: Callable[..., LlamaForCausalLM],
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        loaded = load_model(str(saved), device="cpu")
        assert loaded.name == str(saved)
        assert not loaded.model.training
        assert loaded.model.dtype == torch.float32
        ids = loaded.tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
        assert ids.tolist() == [[1, 3, 4, 5, 6, 3, 7]]
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
        assert capfd.readouterr() == ("", "")
        assert caplog.record_tuples == []

    def test_spellings_of_a_path(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(saved.parent)
        monkeypatch.setenv("HOME", str(saved.parent))
        for name in ("saved", "./saved", "saved/", "~/saved", f"../{saved.parent.name}/saved", saved):
            assert isinstance(load_model(name, device="cpu").model, LlamaForCausalLM)

    def test_dtype(self, saved: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
        save(tiny_llama().bfloat16(), saved)
        for dtype, expected in (
            (None, torch.float32),
            ("auto", torch.bfloat16),
            ("float16", torch.float16),
            (torch.bfloat16, torch.bfloat16),
        ):
            assert load_model(str(saved), device="cpu", dtype=dtype).model.dtype == expected

    @pytest.mark.parametrize("dtype", ["int8", "float31", "load", torch.int64, 3])
    def test_bad_dtype(self, saved: Path, dtype: object) -> None:
        with pytest.raises(InvalidArgumentError, match="dtype must be a floating point type"):
            load_model(str(saved), dtype=dtype)

    @pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cpu:x"])
    def test_bad_device(self, saved: Path, device: str) -> None:
        with pytest.raises(InvalidArgumentError, match="device must be"):
            load_model(str(saved), device=device)

    def test_default_device(self, saved: Path) -> None:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert load_model(str(saved)).model.device.type == expected


class TestFailures:
    @pytest.fixture(autouse=True)
    def _silence(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
        """A failure has its whole explanation in its message."""
        yield
        assert capfd.readouterr() == ("", "")
        assert caplog.record_tuples == []

    @pytest.fixture
    def _no_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name that means a folder must not get as far as the library, let alone the network."""

        def refuse(*args: object, **kwargs: object) -> None:
            pytest.fail("the library was asked")

        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", refuse)

    @pytest.mark.usefixtures("_no_hub")
    @pytest.mark.parametrize(
        "name",
        ["./missing", "../missing", "~/missing", "/no/such/folder", "a/b/c", "missing/", "a\\b", ".", Path("missing")],
    )
    def test_missing_folder(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        message = failure(name)
        assert repr(os.fspath(name)) in message
        assert ("no config.json" if name == "." else "no such folder; check the path") in message

    @pytest.mark.usefixtures("_no_hub")
    @pytest.mark.parametrize("name", ["", "  "])
    def test_empty_name(self, name: str) -> None:
        assert "empty name" in failure(name)

    @pytest.mark.usefixtures("_no_hub")
    def test_file(self, saved: Path) -> None:
        assert "it is a file" in failure(str(saved / "config.json"))

    @pytest.mark.usefixtures("_no_hub")
    def test_no_config(self, saved: Path) -> None:
        (saved / "config.json").unlink()
        assert "no config.json" in failure(str(saved))

    @pytest.mark.usefixtures("_no_hub")
    def test_no_weights(self, saved: Path) -> None:
        (saved / "model.safetensors").unlink()
        assert "no *.safetensors weights" in failure(str(saved))

    @pytest.mark.usefixtures("_no_hub")
    def test_pickled_weights(self, saved: Path) -> None:
        (saved / "model.safetensors").unlink()
        (saved / "pytorch_model.bin").write_bytes(b"anything")
        message = failure(str(saved))
        assert "pickled ones (*.bin) are never read" in message
        assert "writes safetensors" in message

    def test_pickled_weights_beside_other_safetensors(self, saved: Path) -> None:
        (saved / "model.safetensors").rename(saved / "other.safetensors")
        torch.save({}, saved / "pytorch_model.bin")
        assert "pickled ones (*.bin) are never read" in failure(str(saved))

    @pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
    def test_corrupted_weights(self, saved: Path, content: bytes | None) -> None:
        weights = saved / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2] if content is None else content)
        assert "weights are corrupted; download or save them again" in failure(str(saved))

    def test_missing_shard(self, saved: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
        (saved / "model.safetensors").unlink()
        save(tiny_llama(), saved, max_shard_size="100KB")
        shard = sorted(saved.glob("model-*.safetensors"))[-1]
        shard.unlink()
        message = failure(str(saved))
        assert shard.name in message or "not in the checkpoint" in message

    def edit_config(self, folder: Path, **changes: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_weights_that_are_not_in_the_checkpoint(self, saved: Path) -> None:
        self.edit_config(saved, num_hidden_layers=3)
        message = failure(str(saved))
        assert "9 weights are not in the checkpoint, such as 'model.layers.2." in message

    def test_weights_of_another_shape(self, saved: Path) -> None:
        self.edit_config(saved, hidden_size=128)
        assert "do not fit its config.json" in failure(str(saved))

    def test_bad_config_value(self, saved: Path) -> None:
        self.edit_config(saved, num_attention_heads="four")
        assert "num_attention_heads" in failure(str(saved))

    def test_config_that_is_no_json(self, saved: Path) -> None:
        (saved / "config.json").write_text("{")
        assert "not valid JSON" in failure(str(saved))

    def test_config_without_model_type(self, saved: Path) -> None:
        (saved / "config.json").write_text("{}")
        assert "names no model type" in failure(str(saved))

    def test_unknown_model_type(self, saved: Path) -> None:
        self.edit_config(saved, model_type="from_the_future")
        assert "does not know its model type" in failure(str(saved))

    def test_code_of_its_own(self, saved: Path, tmp_path: Path) -> None:
        (saved / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        self.edit_config(saved, model_type="own", auto_map=classes)
        assert "code of its own, which is never run" in failure(str(saved))
        assert not (tmp_path / "ran").exists()

    def test_encoder_decoder(self, saved: Path) -> None:
        (saved / "config.json").write_text('{"model_type": "t5"}')
        assert "not a causal language model" in failure(str(saved))

    @pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
    def test_encoder(self, saved: Path, kind: type) -> None:
        options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        save(kind(BertConfig(vocab_size=16, **options)), saved)
        assert "not a causal language model" in failure(str(saved))

    @pytest.mark.parametrize("empty", [False, True])
    def test_no_tokenizer(self, saved: Path, empty: bool) -> None:
        for path in saved.glob("token*"):
            path.unlink()
        if empty:  # a class that comes up with its special tokens alone
            (saved / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        assert "tokenizer is missing or incomplete" in failure(str(saved))

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        lines: list[str] = []
        for name in ("nobody/such-a-model", "such-a-model"):
            message = failure(name, on_progress=lines.append)
            assert repr(name) in message
            assert "the Hugging Face hub cannot be reached" in message
        assert len(lines) == 2

    def test_name_that_cannot_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "neither a folder nor a hub name" in failure("no such??name")

    def test_other_hub_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import errors

        def answer(kind: type[Exception]) -> str:
            def refuse(*args: object, **kwargs: object) -> None:
                raise OSError("You are trying to access\nsomething") from kind.__new__(kind)

            monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", refuse)
            return failure("owner/model")

        assert "run `hf auth login` if it is private" in answer(errors.RepositoryNotFoundError)
        assert "access is restricted" in answer(errors.GatedRepoError)
        assert "not enough memory" in answer(MemoryError)

    def test_anything_else_is_one_line_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise KeyError("\n  first\nsecond " + "x" * 1000)

        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", refuse)
        assert len(failure("owner/model")) < 300
