"""The positions of the residual's tokens, until they are sealed."""

from dataclasses import dataclass, replace

from torch import Tensor

from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import Rotation, join_rotations

_MOST_PIECES = 64  # decoding adds a piece per token; joined, all take a few numbers


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive tokens; ``rotation`` is None if their positions are unknown."""

    num_tokens: int
    rotation: Rotation | None


class PositionLog:
    """Rotations of consecutive tokens, oldest first."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self._pieces)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the log; blocks and other layers may share them."""
        return [tensor for piece in self._pieces if piece.rotation is not None for tensor in piece.rotation.tensors]

    def append(self, rotation: Rotation | None, num_tokens: int) -> None:
        """Add the newest ``num_tokens`` tokens."""
        if num_tokens > 0:
            # A new list, because copies of the log share the old one.
            self._pieces = [*self._pieces, _Piece(num_tokens, rotation)]
        if len(self._pieces) > _MOST_PIECES:
            self._keep(0, self.num_tokens)

    def go_on(self, num_tokens: int) -> None:
        """Add ``num_tokens`` tokens, each one place behind the one before."""
        if num_tokens <= 0:
            return
        rotation = self._pieces[-1].rotation if self._pieces else None
        self.append(None if rotation is None else rotation.continued(num_tokens), num_tokens)

    def range(self, start: int, stop: int) -> Rotation | None:
        """Rotations of tokens ``start`` to ``stop``; None unless all their positions are known."""
        rotations, begin = [], 0
        for piece in self._pieces:
            end = begin + piece.num_tokens
            if begin < stop and end > start:
                if piece.rotation is None:
                    return None
                rotations.append(piece.rotation.slice(max(start - begin, 0), min(stop, end) - begin))
            begin = end
        if not rotations or begin < stop:
            return None
        return rotations[0] if len(rotations) == 1 else join_rotations(rotations)

    def drop(self, num_tokens: int) -> None:
        """Forget the oldest ``num_tokens`` tokens."""
        self._keep(num_tokens, self.num_tokens)

    def crop(self, num_tokens: int) -> None:
        """Keep the oldest ``num_tokens`` tokens."""
        self._keep(0, num_tokens)

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` along the batch dimension."""
        self._pieces = [
            piece if piece.rotation is None else replace(piece, rotation=piece.rotation.map_batch(function))
            for piece in self._pieces
        ]

    def to_fields(self) -> dict[str, Field]:
        return {
            "pieces": [
                {
                    "num_tokens": piece.num_tokens,
                    "rotation": None if piece.rotation is None else piece.rotation.to_fields(),
                }
                for piece in self._pieces
            ]
        }

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "PositionLog":
        log = cls()
        for piece in fields.subs("pieces"):
            num_tokens, rotation = piece.integer("num_tokens", 1), None
            if piece.has("rotation"):
                rotation = Rotation.from_fields(piece.sub("rotation"), shape.key_dim, shape.batch, num_tokens)
            log._pieces.append(_Piece(num_tokens, rotation))
        return log

    def _keep(self, start: int, stop: int) -> None:
        pieces, begin = [], 0
        for piece in self._pieces:
            first, last = max(start - begin, 0), min(stop - begin, piece.num_tokens)
            if first < last:
                rotation = None if piece.rotation is None else piece.rotation.slice(first, last)
                pieces.append(_Piece(last - first, rotation))
            begin += piece.num_tokens
        rotations = [piece.rotation for piece in pieces if piece.rotation is not None]
        if len(rotations) == len(pieces) > 1:
            pieces = [_Piece(sum(piece.num_tokens for piece in pieces), join_rotations(rotations))]
        self._pieces = pieces
