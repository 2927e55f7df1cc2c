"""Texts of different kinds, from which a model's basis is measured."""

import importlib.util
import json
import random
from collections.abc import Callable
from importlib.resources import files

# Modules of the standard library, for source code. Code evaluations take others.
_MODULES = ("textwrap", "heapq")
_ROWS = 70
_SEED = 0


def texts_by_kind(document: str) -> dict[str, str]:
    """Texts by their kind, the most different ones first; ``document`` is one of them."""
    kinds: dict[str, Callable[[], str]] = {
        "prose": lambda: _written("prose"),
        "code": lambda: source_of(_MODULES[0]),
        "dialogue": lambda: _written("dialogue"),
        "languages": lambda: _written("languages"),
        "table": lambda: _table(random.Random(_SEED)),
        "reference": lambda: document,
        "log": lambda: _log(random.Random(_SEED)),
        "more code": lambda: source_of(_MODULES[1]),
    }
    made = {kind: make() for kind, make in kinds.items()}
    return {kind: text for kind, text in made.items() if text}


def _written(name: str) -> str:
    return files("unsloth_spectral.eval").joinpath("texts").joinpath(f"{name}.txt").read_text(encoding="utf-8")


def source_of(module: str) -> str:
    """The source of a module of the standard library; empty where Python was installed without sources."""
    spec = importlib.util.find_spec(module)
    get_source = getattr(spec.loader if spec else None, "get_source", None)
    return (get_source(module) if get_source else None) or ""


def _table(generator: random.Random) -> str:
    draw = generator.choice
    rows = ["region | product | units | price | date | status", "--- | --- | ---: | ---: | --- | ---"]
    for _ in range(_ROWS):
        place, thing = draw(("north", "south", "east", "west")), draw(("chair", "desk", "lamp", "mirror", "shelf"))
        date = f"20{generator.randint(10, 29)}-{generator.randint(1, 12):02}-{generator.randint(1, 28):02}"
        cells = (place, thing, generator.randint(1, 900), f"{generator.uniform(3, 900):.2f}", date)
        rows.append(" | ".join(map(str, (*cells, draw(("open", "paid", "late"))))))
    return "\n".join(rows)


def _log(generator: random.Random) -> str:
    draw, lines = generator.choice, []
    for _ in range(_ROWS):
        clock = ":".join(f"{generator.randint(0, 59):02}" for _ in range(2))
        details = {
            "id": generator.randint(1000, 9999),
            "user": draw(("ana", "bo", "chen", "dev")),
            "ms": round(generator.expovariate(0.02), 1),
            "ok": generator.random() < 0.8,
        }
        source, level = draw(("auth", "cache", "db", "http")), draw(("DEBUG", "ERROR", "INFO", "WARN"))
        lines.append(f"2024-05-{generator.randint(1, 28):02}T09:{clock}Z {level} {source} {json.dumps(details)}")
    return "\n".join(lines)
