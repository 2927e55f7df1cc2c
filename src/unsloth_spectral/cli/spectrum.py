"""``unsloth-spectral spectrum``."""

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

EXAMPLES = (
    "unsloth-spectral spectrum --plot spectrum.png",
    "unsloth-spectral spectrum --model ./my-model --document book.txt --json spectrum.json",
)


def command(
    model: ModelOption = None,
    document: DocumentOption = None,
    context_length: ContextOption = 4096,
    block_size: BlockOption = 512,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Measure singular values of every layer and head on a document, to choose ranks by."""
    from unsloth_spectral import plots, reports
    from unsloth_spectral.eval.documents import read_document, tokens_of
    from unsloth_spectral.eval.spectrum import measure_spectrum
    from unsloth_spectral.eval.tasks.asking import check_positions

    check_outputs(json_file, plot)
    text = read_document(document)
    with progress_shown() as report:
        loaded = load(model, report)
        check_positions(loaded, context_length)
        input_ids = tokens_of(text, loaded.tokenizer, context_length)[:, :context_length]
        measured = measure_spectrum(
            loaded.model, input_ids.to(loaded.model.device), block_size=block_size, on_progress=report
        )
    result = {"model": loaded.name, **measured.to_dict()}
    out.print(reports.spectrum_table(measured))
    write_json(result, json_file)
    if plot is not None:
        write_plot(plots.spectrum_figure(result), plot)
