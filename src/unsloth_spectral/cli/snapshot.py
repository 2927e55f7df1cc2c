"""``unsloth-spectral snapshot save``, ``info`` and ``verify``."""

from pathlib import Path
from typing import Annotated

import typer

from unsloth_spectral.cli.shared import (
    PATH,
    DocumentOption,
    JsonOption,
    ModelOption,
    PresetOption,
    check_outputs,
    err,
    load,
    out,
    plain,
    progress_shown,
    write_json,
)

SAVE_EXAMPLES = ("unsloth-spectral snapshot save report.safetensors --document report.txt",)
INFO_EXAMPLES = ("unsloth-spectral snapshot info report.safetensors --json report.json",)
VERIFY_EXAMPLES = (
    "unsloth-spectral snapshot verify report.safetensors",
    "unsloth-spectral snapshot verify report.safetensors --model ./my-model",
)

FileArgument = Annotated[Path, typer.Argument(help="A snapshot, .safetensors.", **PATH)]


def save(
    path: Annotated[Path, typer.Argument(help="The .safetensors file to write.", **PATH)],
    document: DocumentOption = None,
    model: ModelOption = None,
    preset: PresetOption = "balanced",
    context_length: Annotated[
        int, typer.Option("--context-length", min=1, help="Most tokens of the document to read.")
    ] = 4096,
) -> None:
    """Prefill a document and save its cache.

    The tokens are those of `tokenizer(document)`, special tokens included.
    """
    from unsloth_spectral.cache.snapshot import check_path
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.eval.documents import read_document
    from unsloth_spectral.eval.snapshot import prefill_document

    check_path(path)
    config, text = SpectralConfig(preset=preset), read_document(document)
    with progress_shown() as report:
        # A variable keeps the model alive until the cache is saved; the cache itself does not.
        loaded = load(model, report)
        cache, input_ids = prefill_document(loaded, text, context_length, config, report)
        cache.save(path, input_ids)
    err.print(f"{input_ids.shape[1]:,} tokens written to {plain(path)}", highlight=False, soft_wrap=True)


def info(path: FileArgument, json_file: JsonOption = None) -> None:
    """Show a snapshot's tokens, codec, model and bytes. Its record is checked; its tensors are not read."""
    from unsloth_spectral import reports
    from unsloth_spectral.eval.snapshot import describe

    check_outputs(json_file)
    description = describe(path)
    out.print(reports.snapshot_table(description))
    write_json(description, json_file)


def verify(
    path: FileArgument,
    model: Annotated[
        str | None, typer.Option("--model", help="Also check that it fits this model: a hub name or local folder.")
    ] = None,
) -> None:
    """Compare all checksums; with --model, load the snapshot too. Exit status 2: something differs."""
    from unsloth_spectral.cache import snapshot
    from unsloth_spectral.integrations.huggingface import SpectralCache

    opened = snapshot.read(path)
    result = f"{opened.num_tensors} checksums are right"
    if model is not None:
        with progress_shown() as report:
            SpectralCache.load(path, load(model, report).model)
        result += f", and it fits {model}"
    out.print(plain(f"{path}: {result}"), highlight=False, soft_wrap=True)
