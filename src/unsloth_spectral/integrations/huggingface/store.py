"""A folder of caches of prompt prefixes, looked up by their tokens."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral.cache import snapshot
from unsloth_spectral.cache.token_hash import check_tokens, token_hashes
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError, SpectralError
from unsloth_spectral.files import expanded
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.identity import identify
from unsloth_spectral.integrations.huggingface.media import placeholders_in
from unsloth_spectral.integrations.huggingface.prefill import feed
from unsloth_spectral.integrations.huggingface.support import check_model, unwrapped
from unsloth_spectral.integrations.options import config_of
from unsloth_spectral.log import logger, warn_once

_LOCK = ".lock"
# A process that waits longer for others to finish writing continues without storing its cache.
_LOCK_SECONDS = 60.0
_PREFIX = "prefix-"
_NAME = re.compile(rf"{_PREFIX}([0-9a-f]{{16}})-([0-9]+)-([0-9a-f]{{32}})\.safetensors")


class PrefixStore:
    """A folder of snapshots, each of a prompt's prefix, for one process or several at once.

    A snapshot is found by a hash of its tokens, for the same model, options and profile only. The least recently used
    snapshots are deleted when all together exceed ``max_bytes``.

    Args:
        folder: created if missing, for the user alone, because snapshots reveal the prompts.
        max_bytes: limit for all snapshots together; the one being written comes on top.

    Raises:
        InvalidArgumentError: the folder cannot be made, or ``max_bytes`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 10_000_000_000) -> None:
        self.folder, self.max_bytes = expanded(folder), max_bytes
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise InvalidArgumentError(f"max_bytes must be a positive number of bytes, got {max_bytes!r}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"cannot make the folder {str(folder)!r}: {error.strerror or error}; give one that can be written to"
            ) from error

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        preset: str | None = None,
        config: CodecConfig | None = None,
    ) -> SpectralCache:
        """A cache of all of ``input_ids [1, n]`` but the last token, from which ``generate`` then starts.

        The longest stored prefix is loaded, the rest is fed to the model, and the result is stored. So pass the part
        that prompts have in common, such as a document, and generate from it and a question::

            cache = store.prefill(model, document_ids)
            model.generate(torch.cat([document_ids, question_ids], 1), cache=cache)

        A broken snapshot is deleted; one that cannot be read or written is left alone. Both are logged, and cost only
        time.

        Args:
            model: as for ``SpectralCache``, which has ``preset`` and ``config`` too.
            input_ids: one sequence without padding.
            preset, config: how to compress; they must not both be given.

        Raises:
            InvalidArgumentError: ``input_ids`` are not one sequence of the model's tokens, or some stand for images,
                video or audio; or an option is out of its range.
            UnsupportedModelError: the model cannot carry a spectral cache, or its weights cannot be read.
        """
        chosen, model = config_of(config, preset=preset), unwrapped(model)
        _check(model, chosen, input_ids)
        fresh = SpectralCache(model, config=chosen)
        key, count = _key(model, fresh), input_ids.shape[1] - 1
        cache = self._load_longest(model, input_ids[:, :count], key) or fresh
        num_stored = cache.get_seq_length()
        if num_stored < count:
            feed(model, input_ids[:, num_stored:count], cache)
            self._keep(cache, input_ids, key)
        return cache

    def num_stored(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        preset: str | None = None,
        config: CodecConfig | None = None,
    ) -> int:
        """How many tokens of ``input_ids [1, n]`` ``prefill`` would load instead of computing them.

        Raises:
            InvalidArgumentError, UnsupportedModelError: as ``prefill``.
        """
        chosen, model = config_of(config, preset=preset), unwrapped(model)
        _check(model, chosen, input_ids)
        key = _key(model, SpectralCache(model, config=chosen))
        return next((count for count, _ in self._stored_prefixes(input_ids[:, :-1], key)), 0)

    def _stored_prefixes(self, input_ids: Tensor, key: str) -> Iterator[tuple[int, Path]]:
        """Stored prefixes of ``input_ids``, the longest first."""
        try:
            names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        except OSError as error:
            warn_once("no prefix is loaded from %s: %s", self.folder, error)
            return
        stored = {(int(name[2]), name[3]): name[0] for name in names if name is not None and name[1] == key}
        hashes = token_hashes(input_ids, [count for count, _ in stored])
        for count in sorted(hashes, reverse=True):
            name = stored.get((count, hashes[count][:32]))
            if name is not None:
                yield count, self.folder / name

    def _load_longest(self, model: PreTrainedModel, input_ids: Tensor, key: str) -> SpectralCache | None:
        for _, path in self._stored_prefixes(input_ids, key):
            try:
                cache = SpectralCache.load(path, model, input_ids)
            except LoadError as error:
                try:
                    path.unlink()
                    logger.warning("%s; it is deleted", str(error))
                except FileNotFoundError:
                    pass  # another process has just deleted it
                except OSError as obstacle:
                    warn_once("%s; it cannot be deleted: %s", error, obstacle)
                continue
            with contextlib.suppress(OSError):  # deleted meanwhile: its bytes stay while they are mapped
                os.utime(path)
            return cache
        return None

    def _keep(self, cache: SpectralCache, input_ids: Tensor, key: str) -> None:
        count = cache.get_seq_length()
        path = self.folder / f"{_PREFIX}{key}-{count}-{token_hashes(input_ids, [count])[count][:32]}.safetensors"
        try:
            # One process writes at a time, so that all together stay within the limit.
            with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                for partial_file in self.folder.glob(f".{_PREFIX}*"):  # left by a killed process
                    partial_file.unlink(missing_ok=True)
                cache.save(path, input_ids)
                self._evict(path)
        # SpectralError: the folder is gone or read-only; NotImplementedError: its file system has no locks.
        except (OSError, Timeout, SpectralError, NotImplementedError) as error:
            logger.warning("a prefix of %d tokens was not stored in %s: %s", count, self.folder, str(error))

    def _evict(self, newest: Path) -> None:
        """Delete the least recently used snapshots until the rest fits the limit; only ``newest``, if it alone exceeds
        it."""
        sizes = {path: path.stat() for path in self.folder.iterdir() if _NAME.fullmatch(path.name)}
        if sizes[newest].st_size > self.max_bytes:
            logger.warning("a snapshot of %d bytes exceeds max_bytes and was not stored", sizes[newest].st_size)
            newest.unlink()
            return
        total = sum(status.st_size for status in sizes.values())
        for path in sorted(sizes, key=lambda path: (path == newest, sizes[path].st_mtime_ns)):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(PermissionError):  # Windows does not delete mapped files
                path.unlink(missing_ok=True)
                total -= sizes[path].st_size


def _check(model: PreTrainedModel, config: CodecConfig, input_ids: Tensor) -> None:
    check_model(model, config)
    check_tokens(input_ids)
    if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
        fix = "give input_ids[None]" if input_ids.ndim == 1 else "call once for each"
        raise InvalidArgumentError(f"input_ids must be one sequence, [1, n], got shape {tuple(input_ids.shape)}: {fix}")
    placeholders = placeholders_in(model, input_ids)
    if placeholders is not None:
        raise InvalidArgumentError(
            f"input_ids must be text, as a store knows tokens alone, got {placeholders}: feed them to the model with a "
            "SpectralCache, then cache.save(path, input_ids, model_inputs)"
        )
    vocab_size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if vocab_size is not None and not 0 <= lowest <= highest < vocab_size:
        raise InvalidArgumentError(
            f"input_ids must be from 0 to {vocab_size - 1}, got {lowest if lowest < 0 else highest}: use this model's "
            "tokenizer"
        )


def _key(model: PreTrainedModel, fresh: SpectralCache) -> str:
    """Sixteen digits, a hash of everything that a cache depends on besides its tokens."""
    profile = None if fresh.profile is None else fresh.profile.digest
    record = json.dumps([snapshot.VERSION, identify(model), asdict(cast(Any, fresh.config)), profile], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()[:16]
