"""A serving engine's chunks as records, and a count of the chunks that were stored raw.

A chunk is one tensor per group of equal layers. A group that the codec cannot encode is stored raw, which is
counted and logged with its reason.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.log import logger


class EngineRecords:
    """Encodes chunks into records, and decodes them.

    Args:
        codecs: one for each group of layers that a chunk has; None for a group to store raw.
        size_option: the option that has one number for each group, for messages.
    """

    def __init__(self, codecs: Sequence[ChunkCodec | None], size_option: str) -> None:
        self._codecs, self._size_option = tuple(codecs), size_option
        self._raw = _RawChunks()

    def nbytes(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
        """The exact bytes of the record of a chunk whose groups have these shapes and dtypes."""
        sizes = zip(shapes, dtypes, self._plan(shapes, dtypes), strict=True)
        return sum(_group_nbytes(shape, dtype, plan) for shape, dtype, plan in sizes)

    def encode(self, groups: Sequence[Tensor], record: Tensor) -> int:
        """Fill ``record``, uint8 of ``nbytes`` or more; returns ``nbytes``.

        Raises:
            InvalidArgumentError: a number in a coded group is not finite, or is beyond those of float16.
        """
        place, reasons = 0, []
        for group, plan in zip(groups, self._plan_of(groups), strict=True):
            if isinstance(plan, str):
                reasons.append(plan)
                encoded = _bytes_of(group)
            else:
                encoded = plan.encode(group.cpu())
            record[place : place + len(encoded)] = encoded
            place += len(encoded)
        self._raw.count(reasons)
        return place

    def decode(self, record: Tensor, groups: Sequence[Tensor]) -> None:
        """Fill ``groups`` from a ``record`` uint8 of at least their ``nbytes``.

        Raises:
            LoadError: the record is altered, or was made with other options or of other shapes.
        """
        place = 0
        for group, plan in zip(groups, self._plan_of(groups), strict=True):
            end = place + _group_nbytes(group.shape, group.dtype, plan)
            encoded, place = record[place:end], end
            if isinstance(plan, str):
                _bytes_of(group).copy_(encoded)
            else:
                group.copy_(plan.decode(encoded, group.shape, group.dtype))

    def stats(self) -> dict[str, Any]:
        """``chunks`` stored, how many of them ``raw`` in whole or in part, and ``raw_because``: chunks by reason."""
        return self._raw.stats()

    def close(self) -> None:
        """Log how many chunks were stored raw."""
        self._raw.log_totals()

    def _plan_of(self, groups: Sequence[Tensor]) -> list[ChunkCodec | str]:
        return self._plan([group.shape for group in groups], [group.dtype for group in groups])

    def _plan(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[ChunkCodec | str]:
        """For each group its codec, or the reason why it is stored raw."""
        if len(shapes) != len(self._codecs):
            # Pages of recurrent layers come in the same shape as keys and values: only the options can tell them apart.
            reason = (
                f"chunks have {len(shapes)} groups of layers, of shapes {[tuple(shape) for shape in shapes]}, and "
                f"{self._size_option} is for {len(self._codecs)}: write a list with a number for each group, or null "
                "for one of recurrent layers"
            )
            return [reason] * len(shapes)
        plans: list[ChunkCodec | str] = []
        for place, (codec, shape, dtype) in enumerate(zip(self._codecs, shapes, dtypes, strict=True)):
            if codec is None:
                plans.append(f"{self._size_option} is null for group {place} of the layers, {tuple(shape)}")
            else:
                plans.append(codec.obstacle(shape, dtype) or codec)
        return plans


class _RawChunks:
    """Thread-safe counts of stored chunks, of those stored raw, and of the reasons."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks = self._raw = 0
        self._reasons: Counter[str] = Counter()

    def count(self, reasons: Sequence[str]) -> None:
        """Count a chunk whose groups were stored raw for ``reasons``; logs the 1st, 10th, 100th ... for each reason."""
        with self._lock:
            self._chunks += 1
            self._raw += bool(reasons)
            self._reasons.update(set(reasons))
            chunks, counts = self._chunks, {reason: self._reasons[reason] for reason in set(reasons)}
        for reason, count in counts.items():
            if str(count).strip("0") == "1":
                logger.warning("stored raw: %d of %d chunks so far: %s", count, chunks, reason)

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {"chunks": self._chunks, "raw": self._raw, "raw_because": dict(self._reasons)}

    def log_totals(self) -> None:
        stats = self.stats()
        for reason, count in stats["raw_because"].items():
            logger.warning("stored raw: %d of %d chunks in all: %s", count, stats["chunks"], reason)


def _group_nbytes(shape: Sequence[int], dtype: torch.dtype, plan: ChunkCodec | str) -> int:
    return torch.Size(shape).numel() * dtype.itemsize if isinstance(plan, str) else plan.nbytes(shape)


def _bytes_of(group: Tensor) -> Tensor:
    return group.view(-1).view(torch.uint8)
