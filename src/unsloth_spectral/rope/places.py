"""Places of tokens as integers, for each row of a batch, axis and token.

Text has one axis. Models that see images have three (time, height and width), which are equal in text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.fields import Field, Fields

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Places of consecutive tokens, for ``R`` rows and ``A`` axes. Immutable, so layers can share it.

    Attributes:
        first: the place of token 0 per row and axis, if every token is one place behind the token before; else empty.
        table: ``[R, A, n]`` int32 on the CPU, the places of all tokens; None if ``first`` is given.
    """

    first: tuple[tuple[int, ...], ...] = ((0,),)
    table: Tensor | None = None

    @classmethod
    def of(cls, numbers: Tensor) -> "Places":
        """From ``numbers [R, A, n]`` int64, at most ``LARGEST``; equal rows and equal axes are stored once."""
        if bool((numbers == numbers[:, :1]).all()):
            numbers = numbers[:, :1]
        if bool((numbers == numbers[:1]).all()):
            numbers = numbers[:1]
        if bool((numbers.diff() == 1).all()):
            return cls(tuple(map(tuple, numbers[..., 0].tolist())))
        return cls((), numbers.to(torch.int32).contiguous())

    @property
    def num_rows(self) -> int:
        return len(self.first) if self.table is None else len(self.table)

    @property
    def num_axes(self) -> int:
        return len(self.first[0]) if self.table is None else self.table.shape[1]

    @property
    def num_tokens(self) -> int | None:
        """The number of tokens; None if ``first`` serves any number."""
        return None if self.table is None else self.table.shape[-1]

    def numbers(self, start: int, stop: int) -> Tensor:
        """``[R, A, stop - start]`` int64 on the CPU, the places of tokens ``start`` to ``stop``."""
        if self.table is not None:
            return self.table[..., start:stop].long()
        first = torch.tensor(self.first, dtype=torch.int64, device="cpu")
        return first[..., None] + torch.arange(start, stop, dtype=torch.int64, device="cpu")

    def to_fields(self) -> dict[str, Field]:
        return {"first": self.first, "table": self.table}

    @classmethod
    def from_fields(cls, fields: Fields) -> "Places":
        """The places that ``to_fields`` stored.

        Raises:
            LoadError: they are neither a first place per row and axis nor a table.
        """
        first, table = fields.integer_lists("first", -LARGEST, LARGEST), None
        if fields.has("table"):
            table = fields.tensor("table", torch.int32, (None, None, None), on_host=True)
        is_one_kind = not first and table.numel() > 0 if table is not None else bool(first and first[0])
        fields.require(is_one_kind, "either first places or a table of them")
        fields.require(all(len(row) == len(first[0]) for row in first), "as many axes in every row")
        return cls(first, table)
