"""The runner: every method on every case, written as it comes, and resumed after a kill at any byte."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.results import Record, read_results
from unsloth_spectral.eval.runner import Summary, run_evaluation
from unsloth_spectral.eval.tasks.base import Outcome

LOADED: Any = SimpleNamespace(name="owner/model", model=SimpleNamespace(dtype=torch.float32), tokenizer=None)


def method(name: str) -> Method:
    return Method(name, name.split()[0], lambda model: None, lambda cache: Footprint(1, 2, 3.0))


METHODS = [method("kivi 2"), method("kivi 4"), method("dense"), method("spectral small")]


@dataclass(slots=True)
class FakeTask:
    """Numbers that depend on the task, the method and the case alone."""

    name: str = "fidelity"
    num_cases: int = 3
    text: str | None = None
    fails: Callable[[str, str], BaseException | None] = field(default=lambda method, case: None, repr=False)
    calls: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def cases(self, loaded: Any) -> Sequence[str]:
        return [f"case={number} “ü”\n" for number in range(self.num_cases)]

    def run(self, loaded: Any, method: Method, case: str, on_progress: Any = None) -> Outcome:
        self.calls.append((method.name, case))
        assert torch.is_inference_mode_enabled()
        error = self.fails(method.name, case)
        if error is not None:
            raise error
        if on_progress is not None:
            on_progress("reading", 1, 1)
        numbers = random.Random(f"{self.name} {method.name} {case}")
        bits = None if method.name == "dense" else numbers.uniform(1, 4)
        return Outcome(
            {"kl": numbers.random(), "top1_agreement": numbers.random()},
            Footprint(100, 400, bits),
            [{"wanted": "a\nb", "text": method.name}],
            {"kl": [numbers.random() for _ in range(3)]},
        )


def run(folder: Path, *tasks: FakeTask, methods: Sequence[Method] = METHODS, **others: Any) -> Summary:
    return run_evaluation(LOADED, tasks or (FakeTask(),), methods, folder, **others)


def contents(folder: Path) -> tuple[list[Record], list[dict[str, Any]]]:
    """Everything that a run leaves but its times."""
    results = read_results(folder)
    records = [Record(**{**{n: getattr(r, n) for n in Record.__slots__}, "seconds": 0.0}) for r in results.records]
    return records, [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def test_every_method_on_every_case_dense_first(tmp_path: Path) -> None:
    first, second = FakeTask(), FakeTask("drift", 1)
    stages: list[tuple[str, int, int]] = []
    summary = run(tmp_path / "a", first, second, on_progress=lambda *stage: stages.append(stage))
    assert summary == Summary(16, 0, [])
    assert [name for name, _ in first.calls] == ["dense", "kivi 2", "kivi 4", "spectral small"] * 3
    assert [case for _, case in first.calls[::4]] == first.cases(None)
    assert ("fidelity", 0, 12) in stages
    assert ("fidelity", 12, 12) in stages
    assert ("reading", 1, 1) in stages
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert list(lines[0]) == ["task", "method", "family", "case", "metrics", "footprint", "series", "seconds"]
    assert lines[1]["family"] == "kivi"
    assert lines[1]["footprint"]["dense_bytes"] == 400
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["model"], config["dtype"], config["tasks"]) == ("owner/model", "float32", ["fidelity", "drift"])
    assert config["task_settings"]["drift"] == {"name": "drift", "num_cases": 1, "text": None}
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.jsonl"])
def test_a_kill_at_any_byte_changes_nothing(tmp_path: Path, name: str) -> None:
    tasks = (FakeTask(), FakeTask("drift", 2))
    run(tmp_path / "whole", *tasks)
    whole = contents(tmp_path / "whole")
    run(tmp_path / "cut", *tasks)
    source = random.Random(name)
    size = (tmp_path / "cut" / name).stat().st_size
    for place in [0, 1, size - 1, size, *(source.randrange(size) for _ in range(50))]:
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes()[:place])
        if source.random() < 0.3:
            # A kill while the other file's line was not yet written, too.
            other = ({"metrics.jsonl", "predictions.jsonl"} - {name}).pop()
            (tmp_path / "cut" / other).write_bytes((tmp_path / "whole" / other).read_bytes()[: source.randrange(size)])
        run(tmp_path / "cut", *tasks)
        assert contents(tmp_path / "cut") == whole, place


def test_a_kill_after_every_line(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    for count in range(12):
        task = FakeTask()
        task.fails = lambda *_, task=task, count=count: KeyboardInterrupt() if len(task.calls) > count else None
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(count), task)
        again = FakeTask()
        assert run(tmp_path / str(count), again) == Summary(12 - count, count, [])
        assert len(again.calls) == 12 - count, "nothing is measured twice"
        assert contents(tmp_path / str(count)) == contents(tmp_path / "whole")


def test_one_method_failing_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    def fails(name: str, case: str) -> Exception | None:
        return RuntimeError("out of\nmemory <b>") if (name, case[:6]) == ("kivi 4", "case=1") else None

    summary = run(tmp_path / "a", FakeTask(fails=fails))
    assert summary.num_measured == 12
    assert summary.failures == ["fidelity, kivi 4, case=1 “ü”\n: RuntimeError: out of memory <b>"]
    results = read_results(tmp_path / "a")
    assert len(results.records) == 11
    assert [(failure.method, failure.error) for failure in results.failures] == [
        ("kivi 4", "RuntimeError: out of memory <b>")
    ]
    mended = FakeTask()
    assert run(tmp_path / "a", mended) == Summary(1, 11, [])
    assert [name for name, _ in mended.calls] == ["kivi 4"]
    assert read_results(tmp_path / "a").failures == []


def test_an_outcome_that_is_no_json_is_a_failure(tmp_path: Path) -> None:
    class Odd(FakeTask):
        def run(self, *arguments: Any) -> Outcome:
            return Outcome({"kl": 1.0}, Footprint(1, 1, None), [{"text": object()}])

    (failure,) = run(tmp_path / "a", Odd(num_cases=1), methods=[method("dense")]).failures
    assert "TypeError" in failure
    assert "not JSON serializable" in failure


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    class Infinite(FakeTask):
        def run(self, *arguments: Any) -> Outcome:
            return Outcome({"perplexity": float("inf"), "kl": float("nan")}, Footprint(1, 1, None))

    run(tmp_path / "a", Infinite(num_cases=1), methods=[method("dense")])
    metrics = read_results(tmp_path / "a").records[0].metrics
    assert metrics["perplexity"] == float("inf")
    assert metrics["kl"] != metrics["kl"]


def test_tasks_and_methods_may_be_added(tmp_path: Path) -> None:
    run(tmp_path / "a", methods=METHODS[:1])
    assert run(tmp_path / "a", FakeTask("drift", 1), FakeTask()) == Summary(4 + 9, 3, [])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["tasks"] == ["fidelity", "drift"]
    assert config["methods"] == ["kivi 2", "dense", "kivi 4", "spectral small"]
    assert read_results(tmp_path / "a").tasks == ["fidelity", "drift"]


class TestRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        run(tmp_path / "a", settings={"seed": 0}, methods=METHODS[:1])
        return tmp_path / "a"

    def test_other_settings(self, folder: Path) -> None:
        with pytest.raises(InvalidArgumentError, match="setting seed was 0 and is now 1"):
            run(folder, settings={"seed": 1})
        with pytest.raises(InvalidArgumentError, match="setting seed was 0 and is now not given"):
            run(folder)

    def test_other_options_of_a_task(self, folder: Path) -> None:
        before = (folder / "metrics.jsonl").read_bytes(), (folder / "config.json").read_bytes()
        with pytest.raises(InvalidArgumentError, match="num_cases of fidelity was 3 and is now 4"):
            run(folder, FakeTask(num_cases=4), settings={"seed": 0})
        assert before == ((folder / "metrics.jsonl").read_bytes(), (folder / "config.json").read_bytes())

    def test_another_document(self, tmp_path: Path) -> None:
        run(tmp_path / "b", FakeTask(text="a" * 10_000), methods=METHODS[:1])
        assert "aaaa" not in (tmp_path / "b" / "config.json").read_text()
        run(tmp_path / "b", FakeTask(text="a" * 10_000), methods=METHODS[:1])
        before = hashlib.sha256(b"a" * 10_000).hexdigest()[:12]
        now = hashlib.sha256(b"a" * 9_999 + b"b").hexdigest()[:12]
        message = f"text of fidelity was the text with sha256 {before} and is now the text with sha256 {now}. Use"
        with pytest.raises(InvalidArgumentError, match=message):
            run(tmp_path / "b", FakeTask(text="a" * 9_999 + "b"), methods=METHODS[:1])
        with pytest.raises(InvalidArgumentError, match=f"the text with sha256 {before} and is now not given"):
            run(tmp_path / "b", FakeTask(), methods=METHODS[:1])

    def test_another_model_or_dtype(self, folder: Path) -> None:
        other = SimpleNamespace(**{**vars(LOADED), "name": "other", "model": SimpleNamespace(dtype=torch.bfloat16)})
        with pytest.raises(
            InvalidArgumentError, match="model was 'owner/model' and is now 'other'; dtype was 'float32'"
        ):
            run_evaluation(other, [FakeTask()], METHODS, folder, {"seed": 0})

    def test_files_and_folders_of_other_kinds(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "metrics.jsonl").write_text("")
        for folder, message in {"file": "is a file", "b": r"without their config\.json", "c/d": "cannot make"}.items():
            with pytest.raises(InvalidArgumentError, match=message):
                run(tmp_path / folder)

    def test_a_damaged_line(self, folder: Path) -> None:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        damaged = b"".join([lines[0], b"{nonsense\n", *lines[1:]])
        (folder / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(LoadError, match=r"line 2 of '.*metrics\.jsonl' is not JSON"):
            run(folder, settings={"seed": 0})
        assert (folder / "metrics.jsonl").read_bytes() == damaged


def test_another_place_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for torch_version in ("1", "1", "2"):
        monkeypatch.setattr(
            "unsloth_spectral.eval.runner.environment", lambda v=torch_version: {"date": "today", "torch": v}
        )
        run(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert record == {"date": "today", "torch": "2", "earlier": [{"date": "today", "torch": "1"}]}


def test_registry_joins_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from unsloth_spectral.eval.methods import peers, registry

    groups = {"dense": method("dense")}, {"kivi 2": method("kivi 2")}
    fake = SimpleNamespace(spectral_methods=lambda: groups[0])
    monkeypatch.setitem(sys.modules, "unsloth_spectral.eval.methods.spectral", fake)
    monkeypatch.setattr(peers, "peers", lambda: groups[1])
    monkeypatch.setattr(peers, "unavailable", lambda: {"hqq 4": "not installed"})
    assert list(registry.methods()) == ["dense", "kivi 2"]
    assert registry.unavailable() == {"hqq 4": "not installed"}
    groups[1]["dense"] = method("dense")
    with pytest.raises(AssertionError, match="share a name"):
        registry.methods()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", FakeTask(num_cases=1))
    with FileLock(tmp_path / "a" / ".lock"), pytest.raises(InvalidArgumentError, match="another run is writing to"):
        run(tmp_path / "a", FakeTask(num_cases=1))
    assert run(tmp_path / "a", FakeTask(num_cases=1)).num_skipped == 4
