"""Settings that results depend on: written beside them, and compared before a run adds more."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.tasks.base import Task
from unsloth_spectral.integrations.models import LoadedModel

_LONGEST_OPTION, _DIGEST = 200, "sha256 "


def run_config(
    loaded: LoadedModel, tasks: Sequence[Task], methods: Sequence[Method], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Model, dtype, settings, tasks with their options, and methods, in the form that JSON gives back."""
    config = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "settings": dict(settings),
        "tasks": [task.name for task in tasks],
        "task_settings": {task.name: _options_of(task) for task in tasks},
        "methods": [method.name for method in methods],
    }
    # Tuples become lists, keys text.
    result: dict[str, Any] = json.loads(json.dumps(config))
    return result


def _options_of(task: Any) -> dict[str, Any]:
    """The plain public fields of a task that is a dataclass, without the fields that cache results.

    A long text, such as a document, is replaced by its digest.
    """
    if not is_dataclass(task):
        return {}
    options = [option for option in fields(task) if option.repr and option.name[0] != "_"]
    values = {option.name: getattr(task, option.name) for option in options}
    return {name: _brief(value) for name, value in values.items() if _is_plain(value)}


def _brief(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_OPTION:
        return _DIGEST + hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def check_same(folder: Path, earlier: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse to add to results of other settings.

    Raises:
        InvalidArgumentError: the settings differ; the message names every difference.
    """
    # Only tasks that both ran are compared.
    tasks = [task for task in config["task_settings"] if task in earlier.get("task_settings", {})]
    was, now = _facts(earlier, tasks), _facts(config, tasks)
    different = [
        f"{name} was {_shown(was.get(name))} and is now {_shown(now.get(name))}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    if different:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds results of other settings: {'; '.join(different)}. Use another folder, or "
            "the same settings"
        )


def _facts(config: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Settings by readable names."""
    facts = {name: config.get(name) for name in ("model", "dtype")}
    facts |= {f"setting {name}": value for name, value in config.get("settings", {}).items()}
    for task in tasks:
        facts |= {f"{name} of {task}": value for name, value in config["task_settings"][task].items()}
    return facts


def _shown(option: Any) -> str:
    if isinstance(option, str) and option.startswith(_DIGEST):
        return f"the text with {option[: len(_DIGEST) + 12]}"
    return "not given" if option is None else repr(option)
