"""The command line: exit statuses, streams, files, and one line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import unsloth_spectral
from unsloth_spectral import cli
from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.integrations.models import LoadedModel

SHORT = ["--context-length", "300", "--max-new-tokens", "4", "--block-size", "64"]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the entry point."""
    monkeypatch.setattr(sys, "argv", ["unsloth-spectral", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What is printed; rich must not wrap it."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "out", cli.Console(width=200))
    monkeypatch.setattr(cli, "err", cli.Console(stderr=True, width=200))
    return capfd


def test_version_and_help() -> None:
    found = CliRunner().invoke(cli.app, ["--version"])
    assert (found.exit_code, found.output.strip()) == (0, unsloth_spectral.__version__)
    for command in ("compare", "spectrum", "info"):
        help_text = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert help_text.exit_code == 0
        assert f"unsloth-spectral {command}" in help_text.output, "an example belongs into every help"


def test_every_option_of_compare_is_there() -> None:
    text = CliRunner().invoke(cli.app, ["compare", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    wanted = "model document question context-length max-new-tokens rank-keys rank-values block-size json plot seed"
    for option in wanted.split():
        assert re.search(rf"--{option}\b", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--rank-keys", "0"], "rank_keys must be at least 1, got 0"),
        (["compare", "--block-size", "8"], "rank_keys must be at most block_size"),
        (["compare", "--rank-keys", "1", "--rank-keys", "2", "--rank-values", "1", "--rank-values", "2",
          "--rank-values", "3"], "must be given equally often"),
        (["compare", "--json", "a.txt"], "must end in .json"),
        (["compare", "--plot", "a.gif"], "must end in .png or .svg or .pdf"),
        (["compare", "--json", "missing/a.json"], "does not exist"),
        (["compare", "--document", "missing.txt"], "no document at 'missing.txt'"),
        (["compare", "--document", "empty.txt"], "is empty"),
        (["compare", "--document", "."], "is a folder"),
        (["compare", "--model", "./missing"], "./missing"),
        (["spectrum", "--document", "missing.txt"], "no document at 'missing.txt'"),
        (["spectrum", "--plot", "a.gif"], "must end in .png"),
        (["info", "--json", "missing/a.json"], "does not exist"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    output: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    before = set(tmp_path.iterdir())
    assert main(monkeypatch, *arguments) == cli.EXIT_USER_ERROR == 2
    found = output.readouterr()
    assert found.out == ""
    line = [line for line in found.err.splitlines() if "error:" in line]
    assert len(line) == 1
    assert message in line[0]
    assert "Traceback" not in found.err
    assert set(tmp_path.iterdir()) == before


def test_a_document_too_short(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    monkeypatch.setattr(cli, "_load", lambda *_: smollm2)
    assert main(monkeypatch, "compare", "--document", str(tmp_path / "short.txt")) == 2
    assert "and 4,353 are needed" in output.readouterr().err


def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]) -> None:
    for arguments in (["compare", "--nonsense"], ["compare", "--context-length", "many"], ["nonsense"]):
        assert main(monkeypatch, *arguments) == 2
        assert "Traceback" not in output.readouterr().err


def test_an_error_with_brackets_is_shown_whole(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise SpectralError("install unsloth-spectral[plot], not [/]")

    monkeypatch.setattr(cli, "app", fail)
    assert main(monkeypatch) == 2
    assert "error: install unsloth-spectral[plot], not [/]" in output.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    target = tmp_path / "a.json"
    target.write_text("old")
    assert main(monkeypatch, "compare", "--json", str(target)) == 130
    assert "interrupted" in output.readouterr().err
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_compare(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_: smollm2)
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    ranks = ["--rank-keys", "16", "--rank-keys", "24", "--rank-values", "32"]
    cli.app(["compare", *SHORT, *ranks, "--json", str(json_file), "--plot", str(plot)], standalone_mode=False)
    result = json.loads(json_file.read_text())
    assert [cache["name"] for cache in result["caches"]] == ["dense", "spectral 16/32", "spectral 24/32"]
    assert result["config"]["block_size"] == 64
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = output.readouterr()
    assert "KL to dense, nats" in found.out
    assert "question: What is the text above about?" in found.out
    assert "dense: prefill" in found.err, "progress goes to stderr"
    assert "dense: prefill" not in found.out


def test_spectrum(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_: smollm2)
    json_file, plot = tmp_path / "a.json", tmp_path / "a.svg"
    options = ["--context-length", "200", "--block-size", "64", "--json", str(json_file), "--plot", str(plot)]
    cli.app(["spectrum", *options], standalone_mode=False)
    assert len(json.loads(json_file.read_text())["heads"]) == 90
    assert "<svg" in plot.read_text()
    assert "keeps 95 % of the keys' variance" in output.readouterr().out


def test_info(output: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.app(["info", "--json", str(tmp_path / "a.json")], standalone_mode=False)
    assert json.loads((tmp_path / "a.json").read_text())["environment"]["unsloth_spectral"]
    found = output.readouterr().out
    assert "attention paths" in found
    assert "no compiled kernel" in found


@pytest.mark.parametrize(
    ("keys", "values", "pairs"),
    [
        (None, None, [(16, 32), (24, 40), (32, 48)]),
        ([8], None, [(8, 32)]),
        (None, [8, 9], [(16, 8), (16, 9)]),
        ([1, 2], [3], [(1, 3), (2, 3)]),
        ([1, 2], [3, 4], [(1, 3), (2, 4)]),
    ],
)
def test_pairs_of_ranks(keys: list[int] | None, values: list[int] | None, pairs: list[tuple[int, int]]) -> None:
    assert cli._pair_ranks(keys, values) == pairs


def test_unequal_ranks() -> None:
    with pytest.raises(InvalidArgumentError, match="got 2 and 3"):
        cli._pair_ranks([1, 2], [1, 2, 3])


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("unsloth-spectral")
    if not command.exists():
        pytest.skip("the package is not installed as a command")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, unsloth_spectral.__version__)
