"""Loading models and tokenizers; the embedded model if no name is given. No other file loads any."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.integrations.embedded import (
    EMBEDDED_NAME,
    EMBEDDED_PACKAGE,
    Progress,
    embedded_file,
    embedded_folder,
    read_gguf,
)
from unsloth_spectral.integrations.load_errors import NO_TOKENIZER, NOT_CAUSAL, PICKLED, explain, one_line
from unsloth_spectral.integrations.silence import silenced

__all__ = ["EMBEDDED_NAME", "EMBEDDED_PACKAGE", "LoadedModel", "load_model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name it was loaded by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Only safetensors weights are read (and the GGUF file of the embedded model): nothing is unpickled, and code that
    comes with a checkpoint is never run.

    Args:
        name: a local folder, a name on the Hugging Face hub, or None for the embedded model.
        device: where to put the model; None means ``cuda`` where there is one, else ``cpu``.
        dtype: of the weights, as a ``torch.dtype``, its name, or ``"auto"`` for the checkpoint's own; None means
            ``"auto"`` on cuda and float32 elsewhere.
        on_progress: called with a line of text before each step that may take long.

    Raises:
        InvalidArgumentError: ``device`` or ``dtype`` is none that torch knows.
        LoadError: the model or its tokenizer could not be loaded; the message is one line with the reason and the fix.
    """
    place = _device_of(device)
    options = {"dtype": _dtype_of(dtype, place)}
    if name is None:
        folder = embedded_folder(on_progress=on_progress)
        if folder is None:
            if on_progress is not None:
                on_progress("reading the embedded model from its GGUF file (about 20 s)")
            model: Any
            model, tokenizer = read_gguf(embedded_file())
            weights = torch.float32 if options["dtype"] == "auto" else options["dtype"]
            return LoadedModel(model.to(place, weights).eval(), tokenizer, EMBEDDED_NAME)
        try:
            return _load(str(folder), EMBEDDED_NAME, place, local=True, options=options)
        except LoadError as error:
            raise LoadError(f"{error} (the copy in {str(folder)!r} is made again if that folder is deleted)") from error
    title = os.fspath(name)
    if not title.strip():
        raise LoadError("cannot load a model with an empty name: give a folder or a hub name, or none for the embedded")
    path = os.path.expanduser(title)
    if isinstance(name, os.PathLike) or _is_path(path):
        _check_folder(title, path)
        return _load(path, title, place, local=True, options=options)
    if on_progress is not None:
        on_progress(f"looking for {title!r} in the hub's local cache and on the Hugging Face hub")
    return _load(title, title, place, local=False, options=options)


def _device_of(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"device must be one that torch knows, such as 'cuda', got {device!r}") from error
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise InvalidArgumentError(
            f"device must be present, got {device!r} where torch sees {count} of them: use 'cpu'"
        )
    return place


def _dtype_of(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype | str:
    if dtype is None:
        return "auto" if place.type == "cuda" else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if chosen == "auto" or (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        return chosen
    raise InvalidArgumentError(f"dtype must be a floating point type of torch or 'auto', got {dtype!r}")


def _is_path(name: str) -> bool:
    """True if ``name`` can only mean a folder: hub names are ``model`` or ``owner/model`` and start with no dot."""
    return (
        os.path.isabs(name)
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or os.path.exists(name)
    )


def _check_folder(title: str, path: str) -> None:
    """Raise LoadError for mistakes that transformers reports at length, or only after asking the hub."""
    if not os.path.exists(path):
        reason = "no such folder; check the path"
    elif not os.path.isdir(path):
        reason = "it is a file; give the folder that holds config.json and the safetensors weights"
    else:
        try:
            files = os.listdir(path)
        except OSError as error:
            raise LoadError(f"cannot load {title!r}: {one_line(error)}; make the folder readable") from error
        if "config.json" not in files:
            reason = "the folder has no config.json; give the folder that save_pretrained wrote"
        elif any(name.endswith(".safetensors") for name in files):
            return
        elif any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
            reason = PICKLED
        else:
            reason = "the folder has no *.safetensors weights; give the folder that save_pretrained wrote"
    raise LoadError(f"cannot load {title!r}: {reason}")


def _load(source: str, title: str, place: torch.device, *, local: bool, options: dict[str, Any]) -> LoadedModel:
    # trust_remote_code=False instead of the default None, by which a checkpoint with code asks on the terminal.
    shared: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        with silenced():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **options, **shared
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
            _check_loaded(title, model, tokenizer, info["missing_keys"])
            return LoadedModel(model.to(place).eval(), tokenizer, title)
    except LoadError:
        raise
    except Exception as error:  # the library raises nearly everything here, TypeError and RuntimeError included
        raise LoadError(f"cannot load {title!r}: {explain(error)}") from error


def _check_loaded(title: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, missing: set[str]) -> None:
    """Raise LoadError for flaws that transformers only warns of, or silently accepts."""
    names = model.config.architectures or []
    # Encoders load as causal models too, but attend in both directions. GPT-NeoX is causal, but has no `is_decoder`.
    if getattr(model.config, "is_decoder", None) is False and not any(name.endswith("ForCausalLM") for name in names):
        raise LoadError(f"cannot load {title!r}: {NOT_CAUSAL}")
    if missing:
        raise LoadError(
            f"cannot load {title!r}: {len(missing)} weights are not in the checkpoint, such as {min(missing)!r}; use a "
            "complete checkpoint of a causal language model"
        )
    # Without a vocabulary file, some tokenizers load with only their special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise LoadError(f"cannot load {title!r}: {NO_TOKENIZER}")
