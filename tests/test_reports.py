"""Tables say what the results say, and fit a terminal of 80 columns."""

from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from unsloth_spectral import reports


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def cache(name: str, stored: int, kl: float, **others: Any) -> dict[str, Any]:
    return {
        "name": name,
        "stored_bytes": stored,
        "dense_bytes": 188_743_680,
        "compression_factor": 188_743_680 / stored,
        "bits_per_element": 32 * stored / 188_743_680,
        "prefill_seconds": 10.04,
        "seal_seconds": 0.47,
        "decode_tokens_per_second": 12.34,
        "fidelity": {"kl": kl, "top1_agreement": 0.93, "perplexity": 14.26, "perplexity_change": 0.4},
        "text": f"the answer of {name}",
        **others,
    }


@pytest.fixture
def comparison() -> dict[str, Any]:
    caches = [cache("dense", 188_743_680, 0.0), cache("spectral 16/32", 42_998_400, 0.0244)]
    caches += [cache("spectral 24/40", 49_400_000, 0.0099), cache("spectral 32/48", 55_900_000, 0.0057)]
    return {"model": "SmolLM2", "context_length": 4096, "dtype": "float32", "question": "Why?", "caches": caches}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (25_300_000, "25.3 MB"),
        (2_000_000_000, "2 GB"),
        (1.5e12, "1.5e+03 GB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert reports.human_bytes(count) == text


def test_comparison_table(comparison: dict[str, Any]) -> None:
    text = printed(reports.comparison_table(comparison))
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if line.startswith("│")}
    cells = {label: [cell.strip() for cell in row] for label, row in lines.items()}
    assert cells["stored bytes"] == ["189 MB", "43 MB", "49.4 MB", "55.9 MB"]
    assert cells["compression factor"][:2] == ["1.00x", "4.39x"]
    assert cells["KL to dense, nats"] == ["", "0.0244", "0.0099", "0.0057"]
    assert cells["change of perplexity"] == ["", "+0.40", "+0.40", "+0.40"]
    assert max(map(len, text.splitlines())) <= 80
    assert "SmolLM2, 4,096 tokens of context, float32" in text


def test_answers(comparison: dict[str, Any]) -> None:
    comparison["caches"][1]["text"] = ""
    comparison["caches"][2]["text"] = "an [bold]odd[/bold] answer [/]"
    text = printed(reports.comparison_answers(comparison))
    assert "question: Why?" in text
    assert "the answer of dense" in text
    assert "(the model ended the text at once)" in text
    assert "an [bold]odd[/bold] answer [/]" in text


def test_spectrum_table(smollm2: Any) -> None:
    from unsloth_spectral.eval.spectrum import measure_spectrum

    ids = torch.arange(200)[None] % smollm2.model.config.vocab_size
    report = measure_spectrum(smollm2.model, ids, block_size=64)
    text = printed(reports.spectrum_table(report), 120)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 30 * 3
    first = [cell.strip() for cell in rows[0].split("│")[1:-1]]
    assert first[:3] == ["0", "0", str(report.heads[0].keys.effective_rank)]
    assert f"rank {report.rank_for(0.95)[0]} keeps 95 % of the keys'" in text


def test_info_table() -> None:
    collected = {
        "environment": {"torch": "2.13.0", "threads": 2},
        "packages": {"gguf": "0.17", "unsloth": None},
        "attention_paths": [
            {"name": "direct", "serves": "decoding", "available": True, "obstacle": None},
            {"name": "native", "serves": "decoding", "available": False, "obstacle": "no compiler [x]"},
        ],
        "embedded_model": {"available": False, "obstacle": "pip install it"},
    }
    text = printed(reports.info_table(collected))
    for expected in ("2.13.0", "0.17", "not installed", "no: no compiler [x]", "pip install it", "yes"):
        assert expected in text
