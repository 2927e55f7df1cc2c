"""Blocks as they are stored: each under the name of its kind."""

from unsloth_spectral.codec.block import Block, ExactBlock, RankBlock
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.tensors import TokenShape
from unsloth_spectral.fields import Field, Fields

_KINDS = {kind.kind: kind.from_fields for kind in (ExactBlock, RankBlock, SpectralBlock)}


def block_to_fields(block: Block) -> dict[str, Field]:
    return {"kind": block.kind, **block.to_fields()}


def block_from_fields(fields: Fields, shape: TokenShape) -> Block:
    """The block whose tokens are of ``shape``.

    Raises:
        LoadError: it is of no known kind, or a field is missing or does not fit the others.
    """
    kind = fields.text("kind")
    fields.require(kind in _KINDS, f"a kind of block among {', '.join(_KINDS)}")
    return _KINDS[kind](fields, shape)
