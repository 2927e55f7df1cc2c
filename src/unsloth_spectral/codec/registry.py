"""All codecs by name. A new codec is a folder beside this file and an entry here."""

from typing import Any

from unsloth_spectral.codec.block import Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.codec import Codec, CodecConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.rank.codec import RankCodec
from unsloth_spectral.codec.spectral.codec import SpectralCodec
from unsloth_spectral.codec.tensors import TokenShape
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.fields import Field, Fields

_CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (RankCodec, SpectralCodec)}


def register(codec: type[Codec]) -> type[Codec]:
    """Make ``codec`` known by its name; usable as a decorator.

    Raises:
        InvalidArgumentError: another codec has its name, or a block of another codec the ``kind`` of one of its blocks.
    """
    others = {name: other for name, other in _CODECS.items() if other is not codec}
    if codec.name in others:
        raise InvalidArgumentError(
            f"a codec's name must be its own, {codec.name!r} is that of {others[codec.name].__name__}"
        )
    taken = {block.kind: block for other in others.values() for block in other.block_types}
    for block in codec.block_types:
        other_block = {**taken, ExactBlock.kind: ExactBlock}.get(block.kind)
        if other_block is not None and other_block is not block:
            raise InvalidArgumentError(
                f"a block's kind must be its own, {block.kind!r} is that of {other_block.__name__}"
            )
    _CODECS[codec.name] = codec
    return codec


def codecs() -> tuple[type[Codec], ...]:
    """Every codec."""
    return tuple(_CODECS.values())


def codec_of(config: CodecConfig) -> type[Codec]:
    """The codec whose options ``config`` holds."""
    return _CODECS[config.codec]


def make_codec(config: CodecConfig, num_layers: int, profile: ModelProfile | None = None) -> Codec:
    """The codec of a cache of ``num_layers`` layers."""
    return codec_of(config)(config, num_layers, profile)


def is_config(config: Any) -> bool:
    """True if ``config`` holds the options of the registered codec that it names."""
    codec = _CODECS.get(getattr(config, "codec", ""))
    return codec is not None and isinstance(config, codec.config_type)


def config_type_of(name: str, fields: Fields) -> type:
    """The class of the options of the codec ``name``, which was read from ``fields``.

    Raises:
        LoadError: no codec has that name.
    """
    fields.require(name in _CODECS, f"a codec among {', '.join(_CODECS)}")
    return _CODECS[name].config_type


def block_to_fields(block: Block) -> dict[str, Field]:
    """The stored form of a block, with its ``kind``."""
    return {"kind": block.kind, **block.to_fields()}


def block_from_fields(fields: Fields, shape: TokenShape) -> Block:
    """The block that ``block_to_fields`` stored, with tokens of ``shape``.

    Raises:
        LoadError: it is of no known kind, or a field is missing or does not fit the others.
    """
    types: list[type[ExactBlock] | type[SealedBlock]] = [ExactBlock]
    types += [block for codec in codecs() for block in codec.block_types]
    by_kind = {block.kind: block for block in types}
    kind = fields.text("kind")
    fields.require(kind in by_kind, f"a kind of block among {', '.join(by_kind)}")
    block: Block = by_kind[kind].from_fields(fields, shape)
    return block
