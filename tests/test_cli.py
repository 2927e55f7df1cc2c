"""The command line: exit statuses, streams, files, and one line for every mistake."""

import hashlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_results import FAMILIES, write_results
from typer.testing import CliRunner

import unsloth_spectral
from unsloth_spectral import cli
from unsloth_spectral.attention import gpu
from unsloth_spectral.cli import shared
from unsloth_spectral.cli.app import EXIT_USER_ERROR, app
from unsloth_spectral.cli.compare import _pair_ranks
from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.results import read_results
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.eval.tasks.needle import Needles
from unsloth_spectral.integrations.models import LoadedModel

LOAD = "unsloth_spectral.integrations.models.load_model"
SHORT = ["--context-length", "300", "--max-new-tokens", "4", "--block-size", "128"]


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
    monkeypatch.setattr(shared.out, "width", 200)
    monkeypatch.setattr(shared.err, "width", 200)
    return capfd


def test_version_and_help() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, unsloth_spectral.__version__)
    for command in ("compare", "spectrum", "eval", "report", "info"):
        help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert help_text.exit_code == 0
        assert f"unsloth-spectral {command}" in help_text.output, "an example belongs into every help"


def test_every_option_of_compare_is_there() -> None:
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    wanted = (
        "model document question context-length max-new-tokens preset rank-keys rank-values block-size json plot seed"
    )
    for option in wanted.split():
        assert re.search(rf"--{option}\b", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--rank-keys", "0"], "rank_keys must be at least 1, got 0"),
        (["compare", "--rank-keys", "16", "--block-size", "8"], "rank_keys must be at most block_size"),
        (["compare", "--block-size", "100"], "block_size must be a multiple of 128"),
        (["compare", "--preset", "huge"], "preset must be one of quality, balanced, small, tiny, got 'huge'"),
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
        (["eval", "--document", "missing.txt"], "no document at 'missing.txt'"),
        (["eval", "--document", "empty.txt"], "is empty"),
        (["eval", "--document", "binary.txt"], "is a binary file"),
        (["eval", "--starts", "5000;1"], "--starts must be whole numbers such as 5000,20000; got '5000;1'"),
        (["eval", "--starts", ""], "--starts must be whole numbers"),
        (["eval", "--starts", "0,-1"], "starts must be an integer of at least 0, got -1"),
        (["eval", "--starts", "0", "--task", "needle", "--task", "ruler"],
         "--starts has no effect on needle, ruler: leave it out, or add a task that uses it"),
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
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    before = set(tmp_path.iterdir())
    assert main(monkeypatch, *arguments) == EXIT_USER_ERROR == 2
    captured = output.readouterr()
    assert captured.out == ""
    line = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(line) == 1
    assert message in line[0]
    assert "Traceback" not in captured.err
    assert set(tmp_path.iterdir()) == before


def test_a_document_too_short(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    monkeypatch.setattr(LOAD, lambda *_, **__: smollm2)
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

    monkeypatch.setattr("unsloth_spectral.cli.app.app", fail)
    assert main(monkeypatch) == 2
    assert "error: install unsloth-spectral[plot], not [/]" in output.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LOAD, interrupted)
    target = tmp_path / "a.json"
    target.write_text("old")
    assert main(monkeypatch, "compare", "--json", str(target)) == 130
    assert "interrupted" in output.readouterr().err
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_compare(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    monkeypatch.setattr(LOAD, lambda *_, **__: smollm2)
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    ranks = ["--preset", "balanced", "--rank-keys", "16", "--rank-keys", "24", "--rank-values", "32"]
    app(["compare", *SHORT, *ranks, "--json", str(json_file), "--plot", str(plot)], standalone_mode=False)
    result = json.loads(json_file.read_text())
    assert [cache["name"] for cache in result["caches"]] == ["dense", "spectral balanced", "rank 16/32", "rank 24/32"]
    assert result["config"]["block_size"] == 128
    assert plot.read_bytes().startswith(b"\x89PNG")
    captured = output.readouterr()
    assert "KL to dense, nats" in captured.out
    assert "question: What is the text above about?" in captured.out
    assert "dense: prefill" in captured.err, "progress goes to stderr"
    assert "dense: prefill" not in captured.out


def test_spectrum(
    monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path, smollm2: LoadedModel
) -> None:
    monkeypatch.setattr(LOAD, lambda *_, **__: smollm2)
    json_file, plot = tmp_path / "a.json", tmp_path / "a.svg"
    options = ["--context-length", "200", "--block-size", "64", "--json", str(json_file), "--plot", str(plot)]
    app(["spectrum", *options], standalone_mode=False)
    assert len(json.loads(json_file.read_text())["heads"]) == 90
    assert "<svg" in plot.read_text()
    assert "keeps 95 % of the keys' variance" in output.readouterr().out


def test_info(output: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "no card here")
    app(["info", "--json", str(tmp_path / "a.json")], standalone_mode=False)
    assert json.loads((tmp_path / "a.json").read_text())["environment"]["unsloth_spectral"]
    printed = output.readouterr().out
    assert "attention paths" in printed
    assert "no: no card here" in printed


def fake_method(name: str, *, fails: bool = False) -> Method:
    def make_cache(model: Any) -> None:
        if fails:
            raise RuntimeError("no [memory]")

    return Method(name, name.split()[0], make_cache, lambda cache: Footprint(1, 4, None if name == "dense" else 2.0))


class FakeTask:
    """Says hello [to brackets]."""

    name = "fidelity"

    def cases(self, loaded: Any) -> list[str]:
        return ["a", "b"]

    def run(self, loaded: Any, method: Method, case: str, on_progress: Any) -> Outcome:
        on_progress(f"{method.name}: prefill", 1, 1)
        cache = method.make_cache(loaded.model)
        return Outcome({"kl": 0.0 if method.name == "dense" else 0.01}, method.footprint(cache))


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Method]:
    """One task and four methods in place of the real ones; what is returned may be changed."""
    methods = {name: fake_method(name) for name in ("kivi 2", "dense", "kivi 4", "spectral small")}
    tasks = SimpleNamespace(TASKS={"fidelity": FakeTask})
    monkeypatch.setitem(sys.modules, "unsloth_spectral.eval.tasks.registry", tasks)
    monkeypatch.setattr("unsloth_spectral.eval.methods.registry.methods", lambda: methods)
    monkeypatch.setattr(
        "unsloth_spectral.eval.methods.registry.unavailable", lambda: {"hqq 4": "needs the package hqq[all]"}
    )
    loaded = SimpleNamespace(name="owner/model", model=SimpleNamespace(dtype="torch.float16"))
    monkeypatch.setattr(LOAD, lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    return methods


class TestEval:
    def test_list(self, output: pytest.CaptureFixture[str], evaluation: dict[str, Method]) -> None:
        app(["eval", "--list"], standalone_mode=False)
        printed = output.readouterr().out
        for text in ("Says hello [to brackets]", "spectral small", "hqq 4", "no: needs the package hqq[all]"):
            assert text in printed

    def test_all_methods_and_again(
        self,
        monkeypatch: pytest.MonkeyPatch,
        output: pytest.CaptureFixture[str],
        evaluation: dict[str, Method],
        tmp_path: Path,
    ) -> None:
        assert main(monkeypatch, "eval", "--json", "a.json") == 0
        captured = output.readouterr()
        assert "8 measured, 0 from an earlier run; results in results" in captured.err
        assert re.search(r"kivi 4 .* 2\.00 .* 4\.0 .* 0\.0100", captured.out)
        summary = json.loads((tmp_path / "a.json").read_text())
        assert summary["tasks"]["fidelity"][0]["method"] == "dense"
        assert main(monkeypatch, "eval") == 0
        assert "0 measured, 8 from an earlier run" in output.readouterr().err

    @pytest.mark.parametrize(
        ("patterns", "wanted"),
        [
            (["kivi*"], {"dense", "kivi 2", "kivi 4"}),
            (["kivi 2", "spectral *"], {"dense", "kivi 2", "spectral small"}),
            (["dense"], {"dense"}),
            (["*"], {"dense", "kivi 2", "kivi 4", "spectral small"}),
        ],
    )
    def test_patterns(
        self,
        monkeypatch: pytest.MonkeyPatch,
        output: pytest.CaptureFixture[str],
        evaluation: dict[str, Method],
        patterns: list[str],
        wanted: set[str],
    ) -> None:
        options = [word for pattern in patterns for word in ("--method", pattern)]
        assert main(monkeypatch, "eval", *options, "--output", "out") == 0
        config = json.loads(Path("out/config.json").read_text())
        assert set(config["methods"]) == wanted

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--method", "nonsense*"], "--method 'nonsense*' matches no method; see"),
            (["--method", "hqq*"], "does not run here: 'hqq 4' needs the package hqq[all]"),
            (["--task", "nonsense"], "--task must be one of fidelity; got 'nonsense'"),
            (["--json", "a.txt"], "must end in .json"),
            (["--output", "missing/folder"], "cannot make the folder 'missing/folder'"),
        ],
    )
    def test_mistakes(
        self,
        monkeypatch: pytest.MonkeyPatch,
        output: pytest.CaptureFixture[str],
        evaluation: dict[str, Method],
        options: list[str],
        message: str,
    ) -> None:
        assert main(monkeypatch, "eval", *options) == 2
        assert message in output.readouterr().err
        assert list(Path().iterdir()) == []

    def test_a_failing_method(
        self, monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], evaluation: dict[str, Method]
    ) -> None:
        evaluation["kivi 4"] = fake_method("kivi 4", fails=True)
        assert main(monkeypatch, "eval") == 1
        captured = output.readouterr()
        assert "fidelity, kivi 4, a: RuntimeError: no [memory]" in captured.err
        assert "2 failed" in captured.err
        assert "spectral small" in captured.out
        evaluation["kivi 4"] = fake_method("kivi 4")
        assert main(monkeypatch, "eval") == 0

    def test_an_interrupt_says_how_to_go_on(
        self, monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], evaluation: dict[str, Method]
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(FakeTask, "run", interrupt)
        assert main(monkeypatch, "eval") == 130
        assert "interrupted; run the same command again to continue" in output.readouterr().err

    def test_a_document_of_the_users(
        self,
        monkeypatch: pytest.MonkeyPatch,
        output: pytest.CaptureFixture[str],
        evaluation: dict[str, Method],
        smollm2: LoadedModel,
    ) -> None:
        monkeypatch.setattr(LOAD, lambda *_, **__: smollm2)
        tasks = {"fidelity": Fidelity, "needle": partial(Needles, context_length=600)}
        monkeypatch.setattr(sys.modules["unsloth_spectral.eval.tasks.registry"], "TASKS", tasks)
        monkeypatch.setattr(Fidelity, "run", FakeTask.run)
        monkeypatch.setattr(Needles, "run", FakeTask.run)
        Path("book.txt").write_text("one two three four five six seven eight nine ten " * 1000)
        book = ["--document", "book.txt", "--method", "dense"]
        assert main(monkeypatch, "eval", *book) == 2
        printed = output.readouterr().err
        assert re.search(r"the document has ([\d,]+) tokens and 84,353 are needed: choose --starts of at most", printed)
        assert not Path("results").exists(), "nothing was begun"
        options = ["--task", "fidelity", "--task", "needle", "--starts", "10,2000,10"]
        assert main(monkeypatch, "eval", *book, *options) == 0
        settings = json.loads(Path("results/config.json").read_text())["task_settings"]
        assert settings["fidelity"]["starts"] == [10, 2000]
        digest = "sha256 " + hashlib.sha256(Path("book.txt").read_bytes()).hexdigest()
        assert settings["fidelity"]["document"] == settings["needle"]["document"] == digest
        assert len(read_results(Path("results")).of("fidelity")) == 2
        output.readouterr()
        # Other texts do not mix with it, and the message says what differs.
        assert main(monkeypatch, "eval", "--method", "dense", "--task", "needle") == 2
        assert f"document of needle was the text with {digest[:19]} and is now not given" in output.readouterr().err
        Path("book.txt").write_text("another " * 10_000)
        assert main(monkeypatch, "eval", *book, "--task", "needle") == 2
        assert f"was the text with {digest[:19]} and is now the text with sha256" in output.readouterr().err
        assert len(read_results(Path("results")).records) == 5


class TestReport:
    def test_page_and_pictures(self, output: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        evil = "<script>alert(1)</script> 2"
        few = {
            "spectral": FAMILIES["spectral"],
            "kivi": FAMILIES["kivi"],
            "<script>alert(1)</script>": {evil: (2, 0.2)},
        }
        write_results(tmp_path / "a", few)
        app(["report", str(tmp_path / "a"), "--output", str(tmp_path / "page")], standalone_mode=False)
        assert output.readouterr().out.strip() == str(tmp_path / "page" / "report.html")
        assert {file.name for file in (tmp_path / "page").iterdir()} == {
            "report.html", "frontier-fidelity.png", "frontier-needle.png", "frontier-needle-depth.png",
            "frontier-drift.png", "heatmap-needle-depth.png", "drift-drift.png", "bits-fidelity.png",
            "lengths-lengths.png",
        }  # fmt: skip
        page = (tmp_path / "page" / "report.html").read_text("utf-8")
        assert page.count("<svg") == 8
        assert "<script" not in page
        # Whatever the figures link to is within the page; an xmlns names, and loads nothing.
        assert not re.search(r"https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))
        ids = re.findall(r'\bid="([^"]*)"', page)
        assert len(ids) == len(set(ids))
        used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', page))
        assert used <= set(ids)

    def test_default_folder_and_mistakes(
        self, monkeypatch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(monkeypatch, "report", str(tmp_path / "missing")) == 2
        assert "no results folder at" in output.readouterr().err
        write_results(tmp_path / "a", {"kivi": FAMILIES["kivi"]})
        assert main(monkeypatch, "report", str(tmp_path / "a"), "--output", str(tmp_path / "b" / "c")) == 2
        assert main(monkeypatch, "report", str(tmp_path / "a")) == 0
        assert (tmp_path / "a" / "report" / "report.html").exists()
        (tmp_path / "a" / "metrics.jsonl").write_text("")
        assert main(monkeypatch, "report", str(tmp_path / "a")) == 2
        assert "holds no result yet" in output.readouterr().err


@pytest.mark.parametrize(
    ("keys", "values", "pairs"),
    [
        (None, None, []),
        ([8], None, [(8, 32)]),
        (None, [8, 9], [(16, 8), (16, 9)]),
        ([1, 2], [3], [(1, 3), (2, 3)]),
        ([1, 2], [3, 4], [(1, 3), (2, 4)]),
    ],
)
def test_pairs_of_ranks(keys: list[int] | None, values: list[int] | None, pairs: list[tuple[int, int]]) -> None:
    assert _pair_ranks(keys, values) == pairs


def test_unequal_ranks() -> None:
    with pytest.raises(InvalidArgumentError, match="got 2 and 3"):
        _pair_ranks([1, 2], [1, 2, 3])


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("unsloth-spectral")
    if not command.exists():
        pytest.skip("the package is not installed as a command")
    completed = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert (completed.returncode, completed.stdout.strip()) == (0, unsloth_spectral.__version__)
