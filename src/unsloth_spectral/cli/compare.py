"""``unsloth-spectral compare``."""

from typing import Annotated

import typer

from unsloth_spectral.cli.shared import (
    BlockOption,
    ContextOption,
    DocumentOption,
    JsonOption,
    ModelOption,
    PlotOption,
    check_outputs,
    load,
    out,
    progress_shown,
    write_json,
    write_plot,
)
from unsloth_spectral.errors import InvalidArgumentError

EXAMPLES = (
    "unsloth-spectral compare --plot compare.png",
    "unsloth-spectral compare --preset balanced --rank-keys 16",
    "unsloth-spectral compare --document book.txt --question 'Who is the thief?' --rank-keys 16 --rank-keys 32 "
    "--rank-values 48",
)
_DEFAULT_RANKS = (16, 32)
_PRESETS = ("quality", "balanced", "small", "tiny")


def command(
    model: ModelOption = None,
    document: DocumentOption = None,
    question: Annotated[str, typer.Option(help="Question after the document.")] = "What is the text above about?",
    context_length: ContextOption = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode with each cache.")] = 64,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="quality, balanced, small or tiny; repeat for several caches. Default without ranks: all four."
        ),
    ] = None,
    rank_keys: Annotated[
        list[int] | None, typer.Option(help="Rank codec: rank of the keys; repeat for several caches.")
    ] = None,
    rank_values: Annotated[
        list[int] | None, typer.Option(help="Rank codec: rank of the values; as often as --rank-keys, or once for all.")
    ] = None,
    block_size: BlockOption = 512,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="0 starts at the document's beginning; other numbers pick a random start."
        ),
    ] = 0,
) -> None:
    """Run one long document through the dense cache and spectral caches; compare bytes, speed, fidelity and answers."""
    from unsloth_spectral import plots, reports
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.eval.compare import compare as run
    from unsloth_spectral.eval.documents import read_document
    from unsloth_spectral.eval.prompt import check_question

    check_outputs(json_file, plot)
    check_question(question)
    ranks = _pair_ranks(rank_keys, rank_values)
    presets = preset or ([] if ranks else _PRESETS)
    configs = [SpectralConfig(preset=name, block_size=block_size) for name in presets]
    configs += [SpectralConfig(rank_keys=keys, rank_values=values, block_size=block_size) for keys, values in ranks]
    text = read_document(document)
    with progress_shown() as report:
        loaded = load(model, report)
        result = run(
            loaded,
            text,
            configs,
            question=question,
            context_length=context_length,
            max_new_tokens=max_new_tokens,
            seed=seed,
            on_progress=report,
        ).to_dict()
    out.print(reports.comparison_table(result))
    out.print(reports.comparison_answers(result))
    write_json(result, json_file)
    if plot is not None:
        write_plot(plots.comparison_figure(result), plot)


def _pair_ranks(rank_keys: list[int] | None, rank_values: list[int] | None) -> list[tuple[int, int]]:
    if not rank_keys and not rank_values:
        return []
    keys = rank_keys or [_DEFAULT_RANKS[0]]
    values = rank_values or [_DEFAULT_RANKS[1]]
    count = max(len(keys), len(values))
    if len(keys) not in (1, count) or len(values) not in (1, count):
        raise InvalidArgumentError(
            f"--rank-keys and --rank-values must be given equally often, or one of them once; got {len(keys)} and "
            f"{len(values)}"
        )
    keys, values = keys * (count // len(keys)), values * (count // len(values))
    return list(zip(keys, values, strict=True))
