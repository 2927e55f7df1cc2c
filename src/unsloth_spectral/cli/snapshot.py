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
        int, typer.Option("--context-length", min=1, help="Take at most so many tokens of the document.")
    ] = 4096,
) -> None:
    """Prefill a document and save its cache.

    Its tokens are those of `tokenizer(document)`, special ones included.
    """
    from unsloth_spectral.cache.snapshot import check_path
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.eval.documents import read_document
    from unsloth_spectral.eval.snapshot import prefill_document

    check_path(path)
    config, text = SpectralConfig(preset=preset), read_document(document)
    with progress_shown() as report:
        # Named, and so alive until the cache is saved: the cache itself does not keep its model.
        loaded = load(model, report)
        cache, input_ids = prefill_document(loaded, text, context_length, config, report)
        cache.save(path, input_ids)
    err.print(f"{input_ids.shape[1]:,} tokens written to {plain(path)}", highlight=False, soft_wrap=True)


def info(path: FileArgument, json_file: JsonOption = None) -> None:
    """What a snapshot is of: tokens, codec, model, bytes. Its record is checked, its tensors are not read."""
    from unsloth_spectral import reports
    from unsloth_spectral.eval.snapshot import describe

    check_outputs(json_file)
    found = describe(path)
    out.print(reports.snapshot_table(found))
    write_json(found, json_file)


def verify(
    path: FileArgument,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub name or local folder that it must fit, too.")
    ] = None,
) -> None:
    """Compare all checksums, and with --model load it too. Exit status 2 where anything differs."""
    from unsloth_spectral.cache import snapshot
    from unsloth_spectral.integrations.huggingface import SpectralCache

    found = snapshot.read(path)
    said = f"{found.num_tensors} checksums are right"
    if model is not None:
        with progress_shown() as report:
            SpectralCache.load(path, load(model, report).model)
        said += f", and it is of {model}"
    out.print(plain(f"{path}: {said}"), highlight=False, soft_wrap=True)
