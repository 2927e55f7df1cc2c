"""One-line messages with the fix, for errors that other libraries raise while a model is loaded."""

import os

import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

NOT_CAUSAL = "it is not a causal language model; use one that generates text, such as a Llama or Qwen checkpoint"
NO_TOKENIZER = "its tokenizer is missing or incomplete; save it into the same folder with tokenizer.save_pretrained"
PICKLED = (
    "it has no safetensors weights, and pickled ones (*.bin) are never read, since they can run code; load and save it "
    "with a recent transformers, which writes safetensors"
)
_UNREACHABLE = "no such folder, and the Hugging Face hub cannot be reached for it; check the path or the network"
_REASONS_BY_TYPE: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((hub_errors.GatedRepoError,), "access is restricted; ask for it on the model's page, then run `hf auth login`"),
    (
        (hub_errors.RepositoryNotFoundError,),
        "no such public model on the hub; check the spelling, or run `hf auth login` if it is private",
    ),
    ((hub_errors.HFValidationError,), "neither a folder nor a hub name such as 'owner/model'; check the spelling"),
    (
        (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError),
        _UNREACHABLE,
    ),
    ((SafetensorError,), "its safetensors weights are corrupted; download or save them again"),
    ((MemoryError, torch.OutOfMemoryError), "not enough memory; use a smaller model or dtype=torch.bfloat16"),
)
_REASONS_BY_TEXT = (
    ("couldn't connect", _UNREACHABLE),
    ("Unrecognized configuration class", NOT_CAUSAL),
    ("custom code", "it needs code of its own, which is never run; use a model that transformers itself supports"),
    ("does not recognize this architecture", "transformers does not know its model type; try a newer transformers"),
    ("Unrecognized model", "its config.json names no model type; give a folder that save_pretrained wrote"),
    ("not a valid JSON file", "its config.json is not valid JSON; download or save it again"),
    ("model.safetensors", PICKLED),
    ("ignore_mismatched_sizes", "the shapes of its weights do not fit its config.json; use matching files"),
    ("backend tokenizer", NO_TOKENIZER),
    ("Can't load tokenizer", NO_TOKENIZER),
    ("can't allocate memory", "not enough memory; use a smaller model or dtype=torch.bfloat16"),
)


def explain(error: BaseException) -> str:
    """The reason for ``error`` and the fix, by the types of the error and its causes, else by the wording."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    for types, reason in _REASONS_BY_TYPE:
        if any(isinstance(cause, types) for cause in causes):
            return reason
    for wording, reason in _REASONS_BY_TEXT:
        if wording in str(error):
            return reason
    return f"{one_line(error)}; check that it is a complete checkpoint of a causal language model"


def one_line(error: BaseException) -> str:
    """The first line of the error's message, at most 160 characters; for a system error, its reason and file."""
    if isinstance(error, OSError) and error.strerror:
        return (
            error.strerror if error.filename is None else f"{error.strerror} ({os.path.basename(str(error.filename))})"
        )
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split()).rstrip(".:;") if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
