"""``unsloth-spectral chat`` and ``unsloth-spectral snapshot``, with the embedded model."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from unsloth_spectral import SpectralCache, cli
from unsloth_spectral.cli import shared
from unsloth_spectral.cli.app import app
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

LOAD = "unsloth_spectral.integrations.models.load_model"
TEXT = "The lighthouse of Mara is 48 metres high. It was built by Ada Brenn in 1871. " * 9


@pytest.fixture
def document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> Path:
    monkeypatch.setattr(LOAD, lambda *_, **__: smollm2)
    monkeypatch.setattr(shared.out, "width", 200)
    monkeypatch.setattr(shared.err, "width", 200)
    (tmp_path / "document.txt").write_text(TEXT)
    return tmp_path / "document.txt"


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unsloth-spectral", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def test_help() -> None:
    for arguments in (["chat"], ["snapshot", "save"], ["snapshot", "info"], ["snapshot", "verify"]):
        result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0
        assert f"unsloth-spectral {' '.join(arguments)}" in result.output, "an example belongs into every help"


def test_chat_from_a_pipe(
    monkeypatch: pytest.MonkeyPatch, document: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for start in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\nHow high is the lighthouse?\n"))
        options = ["--document", str(document), "--store", str(tmp_path / "store"), "--max-new-tokens", "12"]
        assert main(monkeypatch, "chat", *options) == 0
        captured = capfd.readouterr()
        answers.append(captured.out)
        assert "How high is the lighthouse?" in captured.err
        memory = [line for line in captured.err.splitlines() if "cache: " in line and "dense" in line]
        assert len(memory) == 2, "after the document and after the answer"
        restored = "0 of them from the store" in captured.err
        assert restored == (start == 0)
    assert answers[0] == answers[1]
    assert "48" in answers[0]
    assert len(answers[0].splitlines()) == 1, "answers alone go to stdout"


def test_chat_without_a_store_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, document: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = sorted(document.parent.rglob("*"))
    assert main(monkeypatch, "chat", "--document", str(document)) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "--store FOLDER" in captured.err
    assert sorted(document.parent.rglob("*")) == before


def test_snapshot(
    monkeypatch: pytest.MonkeyPatch,
    document: Path,
    tmp_path: Path,
    smollm2: LoadedModel,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, json_file = tmp_path / "a.safetensors", tmp_path / "a.json"
    options = ["--document", str(document), "--preset", "small", "--context-length", "210"]
    app(["snapshot", "save", str(path), *options], standalone_mode=False)
    assert "210 tokens written" in capfd.readouterr().err
    input_ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids
    assert SpectralCache.load(path, smollm2.model, input_ids).get_seq_length() == 210

    app(["snapshot", "info", str(path), "--json", str(json_file)], standalone_mode=False)
    assert "spectral small" in capfd.readouterr().out
    record = json.loads(json_file.read_text())
    assert (record["tokens"], record["sequences"], record["model"]) == (210, 1, "LlamaForCausalLM")
    assert record["file_bytes"] == path.stat().st_size

    app(["snapshot", "verify", str(path), "--model", "any"], standalone_mode=False)
    assert "checksums are right, and it fits any" in capfd.readouterr().out
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(monkeypatch, "snapshot", "verify", str(path)) == 2
    assert "was altered: the checksum of tensor" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--document", "missing.txt"], "no document at 'missing.txt'"),
        (
            ["chat", "--document", "document.txt", "--preset", "huge"],
            "preset must be one of quality, balanced, small, tiny",
        ),
        (["chat", "--document", "document.txt", "--store", "document.txt"], "cannot make the folder 'document.txt'"),
        (["chat", "--document", "document.txt", "--max-new-tokens", "9000"], "and the model has 8192"),
        (["snapshot", "save", "a.bin"], "must end in .safetensors"),
        (["snapshot", "save", "missing/a.safetensors"], "does not exist"),
        (["snapshot", "info", "missing.safetensors"], "no snapshot at 'missing.safetensors'"),
        (["snapshot", "info", "document.txt"], "'document.txt' is truncated, or no safetensors file"),
        (["snapshot", "verify", "document.txt"], "'document.txt' is truncated, or no safetensors file"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    document: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(document.parent)
    assert main(monkeypatch, *arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_snapshot_of_another_model(
    monkeypatch: pytest.MonkeyPatch, document: Path, smollm2: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    path = document.parent / "a.safetensors"
    cache = SpectralCache(smollm2.model)
    with torch.no_grad():
        smollm2.model(torch.tensor([[5, 6, 7]]), **cache_argument(cache))
    cache.save(path)
    monkeypatch.setattr(smollm2.model.config, "rms_norm_eps", 1e-3)
    assert main(monkeypatch, "snapshot", "verify", str(path), "--model", "x") == 2
    assert "there and 0.001 here" in capfd.readouterr().err
