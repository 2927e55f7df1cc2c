"""The command line at its edges: closed or full streams, full disks, bytes that are not text."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint import save_checkpoint

import unsloth_spectral
from unsloth_spectral import cli, files
from unsloth_spectral.cli import shared
from unsloth_spectral.cli.app import EXIT_BROKEN_PIPE, EXIT_USER_ERROR
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE
from unsloth_spectral.integrations.models import LoadedModel, load_model

LOAD = "unsloth_spectral.integrations.models.load_model"
TEXT = "The lighthouse of Mara is 48 metres high. It was built by Ada Brenn in 1871. " * 9
CHAT = ("chat", "--document", "report.txt", "--max-new-tokens", "4")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX devices and pipes")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_checkpoint(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: LoadedModel) -> None:
    monkeypatch.setattr(LOAD, lambda *_, **__: tiny)
    monkeypatch.setattr(shared.out, "width", 200)
    monkeypatch.setattr(shared.err, "width", 200)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text(TEXT)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: Any = b"") -> int:
    """The exit status; ``stdin`` is what is piped in, or the stream itself."""
    if isinstance(stdin, bytes):
        stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "argv", ["unsloth-spectral", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def command(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, where Python itself writes what is left when it exits."""
    source = str(Path(unsloth_spectral.__file__).parents[1])
    script = f"import sys; sys.path.insert(0, {source!r}); from unsloth_spectral.cli import main; main()"
    environment = {**os.environ, "NO_COLOR": "1", **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        **options,
    )


class TestStreams:
    def test_a_full_disk_behind_stdout(self) -> None:
        with open("/dev/full", "w") as full:
            run = command("--version", stdout=full)
        assert run.returncode == EXIT_USER_ERROR
        assert run.stderr.splitlines() == ["error: input or output: No space left on device"]

    def test_a_reader_that_leaves(self) -> None:
        read, write = os.pipe()
        os.close(read)
        run = command("--version", stdout=write)
        os.close(write)
        assert (run.returncode, run.stderr) == (EXIT_BROKEN_PIPE, "")

    def test_letters_that_the_encoding_lacks(self) -> None:
        run = command("--help", stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": "ascii"})
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.isascii()

    def test_a_full_disk_behind_an_answer(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(monkeypatch, *CHAT, stdin=b"Who?\n") == EXIT_USER_ERROR
        assert capfd.readouterr().err.splitlines()[-1] == "error: input or output: No space left on device"

    def test_a_reader_of_answers_that_leaves(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        read, write = os.pipe()
        os.close(read)
        broken = open(write, "w")  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", sys.stderr)  # typer puts a wrapper in its place
        assert main(monkeypatch, *CHAT, stdin=b"Who?\nWho?\n") == EXIT_BROKEN_PIPE
        with contextlib.suppress(BrokenPipeError):
            broken.close()
        assert "Traceback" not in capfd.readouterr().err

    def test_no_stdout(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "stdout", None)
        assert main(monkeypatch, "info", "--json", "a.json") == 0
        assert Path("a.json").exists()

    def test_no_stderr(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        assert main(monkeypatch, *CHAT, stdin=b"Who?\n") == 0
        assert ">" not in capfd.readouterr().out, "prompts are no answers"

    @pytest.mark.parametrize("is_there", [False, True])
    def test_a_closed_stdin(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], is_there: bool
    ) -> None:
        stdin = io.StringIO() if is_there else None
        if stdin is not None:
            stdin.close()
        assert main(monkeypatch, *CHAT, stdin=stdin) == 0
        output = capfd.readouterr()
        assert "tokens read" in output.err
        assert "Traceback" not in output.err

    def test_a_stdin_that_cannot_be_read(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stdin = io.TextIOWrapper(io.FileIO(os.open("written", os.O_WRONLY | os.O_CREAT), "r"))
        assert main(monkeypatch, *CHAT, stdin=stdin) == EXIT_USER_ERROR
        assert "error: input or output: Bad file descriptor" in capfd.readouterr().err


class TestFullDisk:
    @pytest.fixture(autouse=True)
    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", refuse)

    @pytest.mark.parametrize(
        ("arguments", "file"),
        [
            (["info", "--json", "a.json"], "a.json"),
            (["snapshot", "save", "a.safetensors", "--document", "report.txt"], "a.safetensors"),
            (["spectrum", "--document", "report.txt", "--context-length", "99", "--plot", "a.png"], "a.png"),
            (["eval", "--output", "folder", "--method", "dense", "--starts", "0"], "folder/environment.json"),
        ],
    )
    def test_one_line_names_the_file(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        tmp_path: Path,
        arguments: list[str],
        file: str,
    ) -> None:
        assert main(monkeypatch, *arguments) == EXIT_USER_ERROR
        assert capfd.readouterr().err.splitlines()[-1] == f"error: '{file}': No space left on device"
        assert not Path(file).exists()

    def test_a_store_costs_no_answer(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(monkeypatch, *CHAT, "--store", "store", stdin=b"Who?\n") == 0
        assert capfd.readouterr().out.strip()


class TestHome:
    def test_profile_is_refused_before_it_measures(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("unsloth_spectral.eval.profile.measure_profile", lambda *_, **__: pytest.fail("measured"))
        monkeypatch.setenv(CACHE_VARIABLE, "report.txt/cache")
        assert main(monkeypatch, "profile", "tiny") == EXIT_USER_ERROR
        assert f"set {CACHE_VARIABLE} to a folder that can be written to" in capfd.readouterr().err

    def test_other_commands_go_on(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv(CACHE_VARIABLE, "report.txt/cache")
        assert main(monkeypatch, *CHAT, "--store", "store", stdin=b"Who?\n") == 0
        assert capfd.readouterr().out.strip()

    def test_a_tilde_without_a_home(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(monkeypatch, *CHAT, "--store", "~nobody-here/x") == EXIT_USER_ERROR
        assert "there is no home folder for" in capfd.readouterr().err


class TestChat:
    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            (b"caf\xe9?", r"not asked: question must be text, got 'caf\udce9?'"),
            (b"\xff\xfeW\0h\0o\0", "not asked: question must be text"),
            (b"x" * 40_000, "the model has 8192: start a new conversation, or ask a shorter question"),
        ],
    )
    def test_a_question_that_cannot_be_asked_gets_a_line(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        question: bytes,
        answer: str,
    ) -> None:
        assert main(monkeypatch, *CHAT, stdin=b"Who?\n") == 0
        alone = capfd.readouterr().out
        assert main(monkeypatch, *CHAT, stdin=question + b"\nWho?\n") == 0
        output = capfd.readouterr()
        assert output.out == alone, "the conversation goes on as if it had not been asked"
        assert len([line for line in output.err.splitlines() if answer in line]) == 1

    def test_in_a_locale_without_the_letters(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stdin = io.TextIOWrapper(io.BytesIO("Où?\nWho?\n".encode()), encoding="ascii")
        assert main(monkeypatch, *CHAT, stdin=stdin) == 0
        output = capfd.readouterr()
        assert "not asked: question must be text" in output.err
        assert len(output.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--seed", str(10**30)], "Invalid value for '--seed'"),
        (["compare", "--seed", "-1"], "Invalid value for '--seed'"),
        (["compare", "--question", "caf\udce9"], r"question must be text, got 'caf\udce9'"),
        (["compare", "--question", ""], "question must not be empty"),
        (["compare", "--max-new-tokens", "1000000"], "lower max_new_tokens, or ask a shorter question"),
        (["compare", "--context-length", "9000"], "lower context_length to at most 7936"),
        (["compare", "--document", ""], "must not be empty"),
        (["compare", "--document", "/dev/zero"], "is a device"),
        (["compare", "--json", ""], "must not be empty"),
        (["compare", "--preset", ""], "preset must be one of quality, balanced, small, tiny, got ''"),
        (["spectrum", "--context-length", "9000"], "needs 9,000 positions, but"),
        (["snapshot", "save", "a.safetensors", "--context-length", "9000"], "needs 9,000 positions, but"),
        (["snapshot", "save", ""], "must not be empty"),
        (["snapshot", "info", "pipe"], "is a folder, pipe or device"),
        (["snapshot", "info", "/dev/zero"], "is a folder, pipe or device"),
        (["snapshot", "verify", "."], "is a folder, pipe or device"),
        (["eval", "--output", ""], "must not be empty"),
        (["eval", "--starts", "9" * 5000], "--starts must be whole numbers"),
        (["report", ""], "must not be empty"),
        (["report", "pipe"], "no results folder at 'pipe'"),
        ([*CHAT, "--store", ""], "must not be empty"),
        ([*CHAT, "--store", "pipe"], "cannot make the folder 'pipe'"),
        ([*CHAT, "--max-new-tokens", "9000"], "ask for shorter answers (--max-new-tokens)"),
    ],
)
def test_nonsense_ends_in_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    os.mkfifo("pipe")
    both_ends = os.open("pipe", os.O_RDWR)  # else a reader that opens it waits for good
    before = set(tmp_path.iterdir())
    try:
        assert main(monkeypatch, *arguments) == EXIT_USER_ERROR
    finally:
        os.close(both_ends)
    output = capfd.readouterr()
    assert output.out == ""
    assert message in output.err
    assert "Traceback" not in output.err
    assert set(tmp_path.iterdir()) == before


def test_a_home_in_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves the tilde of ``--json=~/a.json`` to the command."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(monkeypatch, "info", "--json=~/a.json") == 0
    assert (tmp_path / "a.json").exists()
