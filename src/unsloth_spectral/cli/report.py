"""``unsloth-spectral report``."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unsloth_spectral.cli.shared import PATH, err, out, plain
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from unsloth_spectral.eval.results import Mean, Results

EXAMPLES = ("unsloth-spectral report results", "unsloth-spectral report results --output page")
_DENSE_BITS = {"float32": 32, "float64": 64}


def command(
    results: Annotated[Path, typer.Argument(help="Folder that `unsloth-spectral eval --output` wrote.", **PATH)],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the page and the pictures. Default: `report` inside the results.", **PATH),
    ] = None,
) -> None:
    """Draw the results of `eval` as one self-contained page, report.html, and as .png pictures."""
    from unsloth_spectral import plots
    from unsloth_spectral.eval.report import Picture, render
    from unsloth_spectral.eval.results import read_results

    loaded_results = read_results(results)
    if not loaded_results.records:
        raise InvalidArgumentError(
            f"{str(results)!r} holds no result yet: run `unsloth-spectral eval` again until a case is finished"
        )
    folder = output or results / "report"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error
    pictures: list[Picture] = []
    for task, kind, caption, figure in _figures(loaded_results):
        file = folder / f"{_file_name(f'{kind}-{task}')}.png"
        plots.check_figure_target(file)
        plots.save_figure(figure, file)
        pictures.append(Picture(task, caption, plots.inline_svg(figure, f"figure-{len(pictures)}")))
        err.print(f"plot written to {plain(file)}", highlight=False)
    page = folder / "report.html"
    with replacing(page) as temporary:
        temporary.write_text(render(loaded_results, pictures), encoding="utf-8")
    out.print(plain(page), highlight=False, soft_wrap=True)


def _figures(results: "Results") -> Iterator[tuple[str, str, str, "Figure"]]:
    """Task, kind, caption and figure of each picture that the results have numbers for."""
    from unsloth_spectral import plots
    from unsloth_spectral.eval.metrics import lower_is_better, primary_metric
    from unsloth_spectral.eval.results import frontier

    model = Path(results.config["model"]).name
    bits = _DENSE_BITS.get(results.config.get("dtype", ""), 16)
    for task in results.tasks:
        means = results.means(task)
        metric = primary_metric(means)
        if metric is None:
            continue
        name = "KL from the dense cache, nats" if metric == "kl" else metric.replace("_", " ")
        curves = _by_length(results, task, means)
        if curves:
            caption = "Compression factor and KL from the dense cache, by tokens of the prefix"
            yield task, "lengths", caption, plots.lengths_figure(curves, title=f"{task}: by length, {model}")
        # Bits change with the length: a mean over lengths is no point of a frontier.
        points = [] if curves else frontier(means, metric)
        if points:
            dense = next((mean.metrics.get(metric) for mean in means if mean.family == "dense"), None)
            yield (
                task,
                "frontier",
                f"{name} against bits per element, all methods; a line joins the settings of a family",
                plots.frontier_figure(points, title=f"{task}: quality against bytes, {model}", metric=name,
                                      lower_is_better=lower_is_better(metric), dense=dense, dense_bits=bits),
            )  # fmt: skip
        shares: dict[str, dict[str, float]] = {}
        for record in results.of(task):
            if metric in record.metrics and plots.place_of(record.case) is not None:
                shares.setdefault(record.method, {})[record.case] = record.metrics[metric]
        if shares:
            caption = f"{name} by length of the text and depth of the needle: pale cells were found, dark red ones lost"
            yield task, "heatmap", caption, plots.heatmap_figure(shares, title=f"{task}: {model}", metric=name)
        rows = [(mean.method, mean.family, mean.series["kl"]) for mean in means if any(mean.series.get("kl", []))]
        if rows:
            caption = "KL along the generation, averaged over windows of tokens; all other methods in grey"
            yield task, "drift", caption, plots.drift_figure(rows, title=f"{task}: KL along the generation, {model}")
        layers = {
            mean.method: {side: row for side in ("keys", "values") if (row := mean.series.get(f"bits_{side}"))}
            for mean in means
        }
        layers = {method: sides for method, sides in layers.items() if sides}
        if layers:
            caption = "Bits per element in each layer"
            yield task, "bits", caption, plots.allocation_figure(layers, title=f"{task}: bits by layer, {model}")


def _by_length(
    results: "Results", task: str, means: "list[Mean]"
) -> list[tuple[str, str, dict[int, float], dict[int, float]]]:
    """Method, family, factor by length and KL by length, for a task whose cases have a length and a factor."""
    from unsloth_spectral import plots

    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in results.of(task):
        length = plots.length_of(record.case)
        if length is not None and "factor" in record.metrics:
            for name, value in record.metrics.items():
                values.setdefault((record.method, name), {}).setdefault(length, []).append(value)

    def average(method: str, name: str) -> dict[int, float]:
        return {length: sum(row) / len(row) for length, row in sorted(values.get((method, name), {}).items())}

    curves = [(mean.method, mean.family, average(mean.method, "factor"), average(mean.method, "kl")) for mean in means]
    return [curve for curve in curves if curve[2]]


def _file_name(text: str) -> str:
    """``text`` reduced to letters, digits and hyphens, since task names may contain any character."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
