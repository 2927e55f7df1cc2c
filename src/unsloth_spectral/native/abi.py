"""The structures and constants of native/abi.h, which the compiled kernel uses, for ctypes."""

import ctypes
from collections.abc import Iterable
from ctypes import c_char_p, c_float, c_int64, c_void_p
from itertools import count

MAX_SMOOTH = 16  # smooth functions that Rotation.mixing has room for
FULL_WAVE = 32767  # stands for 1 in Rotation.waves
# Values of ExactTokens.dtype.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
_CONSTANTS = {
    "MAX_SMOOTH": MAX_SMOOTH,
    "FULL_WAVE": FULL_WAVE,
    "FLOAT32": FLOAT32,
    "BFLOAT16": BFLOAT16,
    "FLOAT16": FLOAT16,
}

# Offset and size of each field, by the names of structure and field. As in abi.cpp, an entry without a field is a whole
# structure, and an entry without a structure is a constant, with its value as the size.
Layout = dict[tuple[str, str], tuple[int, int]]


class _Structure(ctypes.Structure):
    """A structure that refuses names without a field, which ctypes alone would make attributes.

    It is filled by keyword, completely or not at all (zeros), except parts of a block; tests/test_source.py checks
    that.
    """

    __slots__ = ()


class ExactTokens(_Structure):
    __slots__ = ()
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]


class CodedKeys(_Structure):
    __slots__ = ()
    _fields_ = [
        ("streams", c_void_p),
        ("carries", c_void_p),
        ("scales", c_void_p),
        ("vectors", c_void_p),
        ("rows", c_void_p),
        ("vector_scales", c_void_p),
        ("mean", c_void_p),
        ("counts", c_void_p),
        ("num_components", c_int64),
        ("num_rows", c_int64),
    ]


class Rotation(_Structure):
    __slots__ = ()
    _fields_ = [
        ("num_pairs", c_int64),
        ("num_fast", c_int64),
        ("num_waves", c_int64),
        ("first_anchored", c_int64),
        ("first", c_void_p),
        ("second", c_void_p),
        ("start", c_void_p),
        ("start_stride", c_int64),
        ("step", c_void_p),
        ("tile_step", c_void_p),
        ("waves", c_void_p),
        ("mixing", c_void_p),
        ("reach", c_void_p),
    ]


class CodedValues(_Structure):
    __slots__ = ()
    _fields_ = [
        ("streams", c_void_p),
        ("carries", c_void_p),
        ("scales", c_void_p),
        ("largest", c_void_p),
        ("nbits", c_int64),
    ]


class Block(_Structure):
    __slots__ = ()
    _fields_ = [
        ("num_tokens", c_int64),
        ("count", c_void_p),
        ("is_coded", c_int64),
        ("exact_keys", ExactTokens),
        ("exact_values", ExactTokens),
        ("keys", CodedKeys),
        ("rotation", Rotation),
        ("values", CodedValues),
    ]


class Call(_Structure):
    __slots__ = ()
    _fields_ = [
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("last", c_void_p),
        ("query", c_void_p),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_query", c_int64),
        ("sink_logits", c_void_p),
        ("hadamard", c_void_p),
        ("output", c_void_p),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("num_rows", c_int64),
        ("query_length", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("num_threads", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("key_levels", c_void_p),
        ("value_levels", c_void_p),
        ("parts", c_void_p),
    ]


class Trellis(_Structure):
    __slots__ = ()
    _fields_ = [
        ("entries", c_void_p),
        ("units", c_void_p),
        ("reaches", c_void_p),
        ("distances", c_void_p),
    ]


class KeyEncoding(_Structure):
    __slots__ = ()
    _fields_ = [
        ("coefficients", c_void_p),
        ("widths", c_void_p),
        ("rows", c_void_p),
        ("streams", c_void_p),
        ("carries", c_void_p),
        ("energies", c_void_p),
        ("overlaps", c_void_p),
        ("squares", c_void_p),
        ("clips", c_void_p),
        ("inverses", c_void_p),
        ("batch", c_int64),
        ("num_components", c_int64),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("num_clips", c_int64),
        ("num_threads", c_int64),
        ("is_free", c_int64),
        ("trellis", Trellis),
    ]


class ValueEncoding(_Structure):
    __slots__ = ()
    _fields_ = [
        ("values", c_void_p),
        ("streams", c_void_p),
        ("carries", c_void_p),
        ("energies", c_void_p),
        ("overlaps", c_void_p),
        ("squares", c_void_p),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
        ("num_tokens", c_int64),
        ("nbits", c_int64),
        ("num_threads", c_int64),
        ("is_free", c_int64),
        ("trellis", Trellis),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    ExactTokens,
    CodedKeys,
    Rotation,
    CodedValues,
    Block,
    Call,
    Trellis,
    KeyEncoding,
    ValueEncoding,
)


class _LayoutEntry(ctypes.Structure):
    _fields_ = [
        ("structure", c_char_p),
        ("field", c_char_p),
        ("offset", c_int64),
        ("size", c_int64),
    ]


def declared_layout(structures: Iterable[type[ctypes.Structure]] = STRUCTURES) -> Layout:
    """The layout of ``structures`` in ctypes, and the constants."""
    layout = {("", name): (0, value) for name, value in _CONSTANTS.items()}
    for structure in structures:
        layout[structure.__name__, ""] = (0, ctypes.sizeof(structure))
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            layout[structure.__name__, name] = (field.offset, field.size)
    return layout


def compiled_layout(library: ctypes.CDLL) -> Layout:
    """The compiler's layout of abi.h; empty for a library that is too old to have the table."""
    try:
        function = library.spectral_layout
    except AttributeError:
        return {}
    function.restype, function.argtypes = ctypes.POINTER(_LayoutEntry), []
    layout: Layout = {}
    entries = function()
    for place in count():
        entry = entries[place]
        if entry.structure is None:
            return layout
        layout[entry.structure.decode(), entry.field.decode()] = (entry.offset, entry.size)
    raise AssertionError("the table has an end")


def differences(library: ctypes.CDLL) -> list[str]:
    """Names of fields, structures and constants that differ between this module and ``library``."""
    declared, compiled = declared_layout(STRUCTURES), compiled_layout(library)
    names = sorted(declared.keys() | compiled.keys())
    return [".".join(filter(None, name)) for name in names if declared.get(name) != compiled.get(name)]
