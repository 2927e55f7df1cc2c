"""Every command and example of the README, the docs and the command line's help runs as it is written there."""

import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import save_checkpoint
from fake_results import FAMILIES, write_results
from transformers import PreTrainedModel

import unsloth_spectral
from unsloth_spectral import SpectralCache, cli
from unsloth_spectral.cli import app as app_module
from unsloth_spectral.cli import snapshot as snapshot_commands
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.prefill import feed
from unsloth_spectral.integrations.models import load_model
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = "unsloth-spectral"
# Inline code that begins with one of these and a space is a command.
PROGRAMS = (COMMAND, "make", "python", "pip", "lmcache", "vllm", "docker")
# What is not run here, each with the reason; a new command has to be run or to join this list.
NOT_RUN = {
    "make *": "makes environments and runs for minutes; the target must exist",
    "python benchmarks/*": "measures for minutes; the file must exist",
    "pip install *": "installs from an index",
    "lmcache server*": "needs LMCache: tests/engines runs it",
    "vllm serve *": "needs vLLM: tests/engines runs it",
    '"adapter_params": *': "a part of the options of `lmcache server`",
    f"{COMMAND} snapshot": "the name of the file format, no command",
}
NOT_RUN_BLOCKS = {"unsloth.md": "needs Unsloth: tests/real_unsloth runs the same calls"}
PLACEHOLDERS = {"MODEL": "my-model", "FILE": "report.txt", "PATH": "report.safetensors", "FOLDER": "store"}
# The committed results are outside the folder where commands run here: a small set of results stands in.
PLACEHOLDERS["benchmarks/results/eval"] = "results"
# Added where a command does not say otherwise: the tiny model in place of the embedded one, and less work.
ARGUMENTS = {
    "profile": "my-model",
    "report": "results",
    "snapshot save": "report.safetensors",
    "snapshot info": "report.safetensors",
    "snapshot verify": "report.safetensors",
}
SHORT = {"--model": "my-model", "--document": "book.txt", "--context-length": "300"}
OPTIONS = {
    "compare": {**SHORT, "--max-new-tokens": "4"},
    "spectrum": SHORT,
    "chat": {"--model": "my-model", "--max-new-tokens": "4"},
    "eval": {"--model": "my-model", "--document": "book.txt", "--method": "dense", "--starts": "0"},
    "snapshot save": SHORT,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shell_lines(body: str) -> Iterator[str]:
    """The commands of a fenced block, each on one line: a quotation or a backslash may carry one over several."""
    command = ""
    for line in body.splitlines():
        command += line.removesuffix("\\") + " "
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation is open
            continue
        if words and not line.endswith("\\"):
            yield " ".join(re.sub(r"\s#.*", "", command).split())
            command = ""
        elif not words:
            command = ""


def commands_of(text: str) -> list[str]:
    """Commands in fenced blocks and inline code."""
    commands = [
        command for language, body in FENCE.findall(text) if language in ("", "sh") for command in shell_lines(body)
    ]
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        words = code.split()
        if len(words) > 1 and words[0] in PROGRAMS:
            commands.append(" ".join(words))
    return commands


def variants(command: str) -> list[str]:
    """``a|b`` is two commands; what is in brackets may be given and is."""
    whole = re.sub(r"\[(--[^\]]+)\]", r"\1", command)
    choice = re.search(r"\b(\w+(?:\|\w+)+)\b", whole)
    if choice is None:
        return [whole]
    return [whole.replace(choice[0], word) for word in choice[0].split("|")]


def reason_not_to_run(command: str) -> str | None:
    return next((pattern for pattern in NOT_RUN if fnmatchcase(command, pattern)), None)


def completed(command: str) -> tuple[str, ...]:
    """The arguments of a command, with what it leaves open filled in; behind them what is piped in."""
    fed, _, rest_of_command = command.rpartition(" | ")
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(rest_of_command)]
    assert words.pop(0) == COMMAND, command
    depth = 2 if words[0] == "snapshot" else 1
    name = " ".join(words[:depth])
    if name in ARGUMENTS and (len(words) == depth or words[depth].startswith("-")):
        words.insert(depth, ARGUMENTS[name])
    if "--list" not in words:
        for option, value in OPTIONS.get(name, {}).items():
            words += [] if option in words else [option, value]
    return (*words, shlex.split(fed)[1] if fed else "Who built it?")


DOCUMENTED = [command for page in PAGES for command in commands_of(page.read_text("utf-8"))]
EXAMPLES = [example for module in app_module._COMMANDS.values() for example in module.EXAMPLES]
EXAMPLES += [*snapshot_commands.SAVE_EXAMPLES, *snapshot_commands.INFO_EXAMPLES, *snapshot_commands.VERIFY_EXAMPLES]
# Once each: many differ in nothing but what they leave open.
TO_RUN = {
    completed(variant): variant
    for command in [*DOCUMENTED, *EXAMPLES]
    if reason_not_to_run(command) is None
    for variant in variants(command)
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("documented")
    save_checkpoint(folder / "my-model")
    (folder / "report.txt").write_text("The lighthouse of Mara is 48 metres high. Ada Brenn built it in 1871. " * 9)
    (folder / "book.txt").write_text(" ".join(f"Chapter {number} has a thief." for number in range(3000)))
    loaded = load_model(folder / "my-model", device="cpu")
    cache = SpectralCache(loaded.model)
    feed(loaded.model, torch.randint(3, 250, (1, 220)), cache)
    cache.save(folder / "report.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("UNSLOTH_SPECTRAL_CACHE", str(place / "cache"))


def _as_parameter(completed: tuple[str, ...], command: str) -> Any:
    is_slow = "needle" in completed  # as many seconds as all others together
    return pytest.param(completed, id=command, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("completed", [_as_parameter(*item) for item in TO_RUN.items()])
def test_a_documented_command_runs(
    completed: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    *arguments, piped = completed
    if any(word.startswith("~") for word in arguments):
        monkeypatch.setenv("HOME", str(place / "home"))
    shutil.rmtree("results", ignore_errors=True)
    if arguments[0] == "report":
        write_results(Path("results"), {"kivi": FAMILIES["kivi"]}, ["fidelity"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode() + b"\n"), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capfd.readouterr()
    assert not stopped.value.code, output.err
    assert output.out or output.err


def test_the_list_of_what_is_not_run_is_no_longer_than_need_be() -> None:
    assert {reason_not_to_run(command) for command in DOCUMENTED} == {None, *NOT_RUN}


def test_named_targets_and_files_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command in DOCUMENTED:
        program, name = command.split()[:2]
        if program == "make":
            assert name in targets, command
        elif program == "python" and "<" not in name:
            assert (ROOT / name).is_file(), command


BLOCKS = [
    (page.name, number, body)
    for page in PAGES
    for number, (language, body) in enumerate(FENCE.findall(page.read_text("utf-8")))
    if language == "python" and page.name not in NOT_RUN_BLOCKS
]


@pytest.fixture
def model(place: Path) -> PreTrainedModel:
    model = load_model(place / "my-model", device="cpu").model
    # Answers of 2,000 tokens end sooner.
    model.generation_config.eos_token_id = list(range(130))
    return model


@pytest.mark.parametrize(("page", "number", "body"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_a_documented_python_block_runs(page: str, number: int, body: str, model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    document_ids, question_ids = (torch.randint(3, 250, (1, n), generator=generator) for n in (220, 9))
    cache = SpectralCache(model)
    feed(model, document_ids, cache)
    names = {name: getattr(unsloth_spectral, name) for name in unsloth_spectral.__all__}
    names |= {"torch": torch, "model": model, "cache": cache, "inputs": {"input_ids": document_ids}}
    names |= {"document_ids": document_ids, "question_ids": question_ids}
    names["prompt_ids"] = torch.cat([document_ids, question_ids], 1)
    # What a processor returns, of a prompt and of one that goes on behind it.
    pixels = torch.rand(1, 3, 8, 8, generator=generator)
    names |= {"images": [], "text": "", "longer": {"input_ids": names["prompt_ids"], "pixel_values": pixels}}
    names["processor"] = lambda images, text, return_tensors: {"input_ids": document_ids, "pixel_values": pixels}
    # The name of the argument changed between releases of transformers.
    (argument,) = cache_argument(cache)
    exec(re.sub(r"\b\w+=cache\b", f"{argument}=cache", body), names)
    unpatch_unsloth_attention(model)


def test_the_parser_sees_what_it_should() -> None:
    text = """
`make
demo` and `unsloth-spectral chat --document FILE [--store FOLDER]`, `unsloth-spectral` alone, `unsloth-spectral snapshot
save|info`.

```
make test    # a comment
pip install 'a[b]' \\
  c

vllm serve x --config '{
  "a": 1}'
```

```python
make = 1
```
"""
    assert commands_of(text) == [
        "make test",
        "pip install 'a[b]' c",
        "vllm serve x --config '{ \"a\": 1}'",
        "make demo",
        "unsloth-spectral chat --document FILE [--store FOLDER]",
        "unsloth-spectral snapshot save|info",
    ]
    assert variants("a chat [--store FOLDER]") == ["a chat --store FOLDER"]
    assert variants("a snapshot save|info x") == ["a snapshot save x", "a snapshot info x"]
    assert reason_not_to_run("unsloth-spectral anything") is None
