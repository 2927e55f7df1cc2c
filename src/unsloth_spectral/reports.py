"""Results as tables for a terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.metrics import best_of, figure_text
from unsloth_spectral.eval.results import Mean

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def human_bytes(count: float) -> str:
    """``25_300_000`` as ``25.3 MB``: decimal units, three digits."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def comparison_table(result: dict[str, Any]) -> RenderableType:
    """The table of ``compare``, one column per cache, to fit a narrow terminal."""
    caches = result["caches"]
    table = Table(title=f"{result['model']}, {result['context_length']:,} tokens of context, {result['dtype']}")
    table.add_column("")
    for cache in caches:
        table.add_column(cache["name"].replace(" ", "\n"), justify="right")

    def row(label: str, form: Callable[[dict[str, Any]], str], *, dense: bool = True, end: bool = False) -> None:
        cells = [form(cache) if dense or cache["name"] != "dense" else "" for cache in caches]
        table.add_row(label, *cells, end_section=end)

    row("stored bytes", lambda cache: human_bytes(cache["stored_bytes"]))
    row(f"dense bytes ({result['dtype']})", lambda cache: human_bytes(cache["dense_bytes"]))
    row("compression factor", lambda cache: f"{cache['compression_factor']:.2f}x")
    row("bits per element", lambda cache: f"{cache['bits_per_element']:.2f}", end=True)
    row("prefill s, sealing included", lambda cache: f"{cache['prefill_seconds']:.1f}")
    row("seal s", lambda cache: f"{cache['seal_seconds']:.2f}", dense=False)
    row("decode tokens/s", lambda cache: f"{cache['decode_tokens_per_second']:.1f}", end=True)
    row("KL to dense, nats", lambda cache: f"{cache['fidelity']['kl']:.4f}", dense=False)
    row("top-1 agreement", lambda cache: f"{100 * cache['fidelity']['top1_agreement']:.1f} %", dense=False)
    row("perplexity", lambda cache: f"{cache['fidelity']['perplexity']:.2f}")
    row("change of perplexity", lambda cache: f"{cache['fidelity']['perplexity_change']:+.2f}", dense=False)
    notes = Text(
        "A half-precision cache has 16 bits per element; the exact first and newest tokens count too.\n"
        "KL, top-1 and perplexity: on the 256 tokens after the context.",
        style="dim",
    )
    return Group(table, notes)


def snapshot_table(description: dict[str, Any]) -> RenderableType:
    """The table of ``snapshot info``."""
    table = Table(title=Text(description["path"]), show_header=False)
    model = f"{description['model']}, {description['dtype']}"
    for name, value in {
        "tokens": f"{description['tokens']:,}",
        "sequences": str(description["sequences"]),
        "token SHA-256": description["token_sha256"] or "none: saved without input_ids",
        "codec": description["codec"] + (", with a profile" if description["has_profile"] else ""),
        "file": f"{human_bytes(description['file_bytes'])}, {description['num_tensors']} tensors",
        "model": model,
        "embedding SHA-256": description["embedding_sha256"],
        "first attention SHA-256": description["first_attention_sha256"],
        "format": f"{description['format']}, written by unsloth-spectral {description['written_by']}",
    }.items():
        table.add_row(name, Text(str(value)))
    return table


def comparison_answers(result: dict[str, Any]) -> RenderableType:
    """Each cache's answer to the question."""
    panels = [
        Panel(Text(cache["text"] or "(the model ended the text at once)"), title=cache["name"], title_align="left")
        for cache in result["caches"]
    ]
    return Group(Text(f"\nquestion: {result['question']}"), *panels)


def spectrum_table(report: Any) -> RenderableType:
    """The table of ``spectrum``: one row per layer and head, then the variance that ranks keep."""
    table = Table(title=f"spectra of blocks of {report.block_size} tokens, {report.num_tokens:,} tokens in all")
    table.add_column("layer", justify="right")
    table.add_column("head", justify="right")
    for side in ("keys", "values"):
        for heading in ("rank at 95%", "entropy", "top-16 share", "largest s.v."):
            table.add_column(f"{side}\n{heading}", justify="right")
    for head in report.heads:
        cells = []
        for side in (head.keys, head.values):
            cells += [
                str(side.effective_rank),
                f"{side.entropy:.2f}",
                f"{side.top16_share:.1%}",
                f"{side.singular_values[0]:.3g}",
            ]
        table.add_row(str(head.layer_idx), str(head.head_idx), *cells)
    keys95, values95 = report.rank_for(0.95)
    lines = [f"mean over heads: rank {keys95} keeps 95 % of the keys' variance, rank {values95} of the values'"]
    for rank in (8, 16, 32, 48):
        if rank <= report.head_dim:
            keys, values = report.kept_variance(rank)
            lines.append(
                f"  rank {rank:>2} keeps {100 * keys:.1f} % of the keys' and {100 * values:.1f} % of the values'"
            )
    return Group(table, Text("\n".join(lines)))


def info_table(collected: dict[str, Any]) -> RenderableType:
    """The tables of ``info``."""
    facts = Table(title="environment", show_header=False)
    for name, value in collected["environment"].items():
        facts.add_row(name, str(value))
    for name, version in collected["packages"].items():
        facts.add_row(name, version or Text("not installed", style="dim"))
    embedded = collected["embedded_model"]
    facts.add_row(
        "embedded model", "available" if embedded["available"] else Text(embedded["obstacle"], style="yellow")
    )
    paths = Table(title="attention paths")
    for heading in ("path", "serves", "available"):
        paths.add_column(heading)
    for path in collected["attention_paths"]:
        available = Text("yes", style="green") if path["available"] else Text(f"no: {path['obstacle']}", style="yellow")
        paths.add_row(path["name"], path["serves"], available)
    return Group(facts, paths)


def evaluation_table(task: str, means: list[Mean]) -> RenderableType:
    """The table of one task of ``eval``: one row per method, the best of each column in bold."""
    names = list(dict.fromkeys(name for mean in means for name in mean.metrics))
    best = best_of(means)
    table = Table(title=task)
    table.add_column("method")
    for heading in ("bits per\nelement", "times\nsmaller", *(name.replace("_", "\n") for name in names), "cases"):
        table.add_column(Text(heading), justify="right")
    for mean in means:
        bits = "" if mean.cold_bits_per_element is None else f"{mean.cold_bits_per_element:.2f}"
        cells = [Text(bits), Text(f"{mean.compression_factor:.1f}")]
        for name in names:
            style = "bold green" if mean.method in best.get(name, ()) else ""
            cells.append(Text(figure_text(mean.metrics[name]) if name in mean.metrics else "", style=style))
        cells.append(Text(str(mean.num_cases), style="" if mean.complete else "red"))
        table.add_row(Text(mean.method), *cells)
    return table


def choices_table(tasks: dict[str, str], methods: dict[str, Method], unavailable: dict[str, str]) -> RenderableType:
    """The tables of ``eval --list``."""
    first = Table("task", "measures", title="tasks")
    for name, text in tasks.items():
        first.add_row(Text(name), Text(text))
    second = Table("method", "family", "runs here", title="methods")
    for name, method in methods.items():
        second.add_row(Text(name), Text(method.family), Text("yes", style="green"))
    for name, obstacle in unavailable.items():
        second.add_row(Text(name), "", Text(f"no: {obstacle}", style="yellow"))
    return Group(first, second)


def profile_table(model: str, profile: ModelProfile) -> RenderableType:
    """The table of ``profile``: one row per layer, with bars that show its sensitivities."""
    table = Table(title=f"{model}: KL in nats from coarse values and keys")
    table.add_column("layer", justify="right")
    table.add_column("values at one bit", justify="right")
    table.add_column("")
    table.add_column("keys per unit of score variance lost, largest of the heads", justify="right")
    table.add_column("")
    keys = [max(heads) for heads in profile.key_sensitivities]
    rows = zip(profile.value_sensitivities, keys, strict=True)
    most = max(profile.value_sensitivities) or 1.0, max(keys) or 1.0
    for layer, row in enumerate(rows):
        bars = [
            Text("#" * round(20 * damage / largest), style="blue") for damage, largest in zip(row, most, strict=True)
        ]
        table.add_row(str(layer), f"{row[0]:.5f}", bars[0], f"{row[1]:.5f}", bars[1])
    return table
