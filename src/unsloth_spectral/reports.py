"""Results as tables for people to read in a terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def human_bytes(count: float) -> str:
    """``25_300_000`` as ``25.3 MB``: decimal units, three digits."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def comparison_table(result: dict[str, Any]) -> RenderableType:
    """The table of ``compare``: a column a cache, so that it fits a narrow terminal."""
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
        "spectral 16/32: rank 16 for the keys, 32 for the values. A half-precision cache has 16\n"
        "bits per element. KL, top-1 and perplexity: on the 256 tokens after the context.",
        style="dim",
    )
    return Group(table, notes)


def comparison_answers(result: dict[str, Any]) -> RenderableType:
    """Each cache's answer to the question."""
    panels = [
        Panel(Text(cache["text"] or "(nothing but an end of text)"), title=cache["name"], title_align="left")
        for cache in result["caches"]
    ]
    return Group(Text(f"\nquestion: {result['question']}"), *panels)


def spectrum_table(report: Any) -> RenderableType:
    """The table of ``spectrum``: a row a layer and head, and what ranks keep."""
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
