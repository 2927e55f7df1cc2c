"""Python and the compiler lay out their shared structures identically, and a difference is detected."""

import ctypes
from itertools import combinations

import pytest

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import abi, library

VARIANTS = [name for name in library.VARIANTS if library.load(name) is not None]
needs_kernel = pytest.mark.skipif(not VARIANTS, reason=f"no kernel here: {library.obstacle()}")
STRUCTURES = abi.STRUCTURES
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)


@pytest.fixture(autouse=True)
def _checked_anew():
    for cached in (library._checked, library.function):
        cached.cache_clear()
    yield
    for cached in (library._checked, library.function):
        cached.cache_clear()


def redeclared(structure: type[ctypes.Structure], fields: list[tuple]) -> type[ctypes.Structure]:
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


def with_replaced(structure: type[ctypes.Structure], other: type[ctypes.Structure]) -> tuple:
    return tuple(other if declared is structure else declared for declared in STRUCTURES)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiler_lays_out_structures_as_python_does(variant: str) -> None:
    compiled = abi.compiled_layout(library.load(variant))
    assert compiled == abi.declared_layout()
    assert {"Block", "Call", "KeyEncoding", "ValueEncoding"} <= {structure for structure, _ in compiled}
    library.function("spectral_attend", variant)


@needs_kernel
@every_structure
def test_any_two_fields_that_are_swapped_are_found(
    structure: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, second in combinations(range(len(structure._fields_)), 2):
        fields = list(structure._fields_)
        fields[first], fields[second] = fields[second], fields[first]
        monkeypatch.setattr(abi, "STRUCTURES", with_replaced(structure, redeclared(structure, fields)))
        # One of the two may stay where it is, beside padding.
        assert {f"{structure.__name__}.{fields[place][0]}" for place in (first, second)} & {
            *abi.differences(library.load())
        }
    with pytest.raises(InvalidArgumentError, match="of another version: install unsloth-spectral again"):
        library.function("spectral_attend")


@needs_kernel
@every_structure
@pytest.mark.parametrize("change", ["lacks the first", "lacks the last", "has one more"])
def test_missing_and_further_fields_are_found(
    structure: type[ctypes.Structure], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = list(structure._fields_)
    fields = {"lacks the first": fields[1:], "lacks the last": fields[:-1]}.get(
        change, [*fields, ("further", ctypes.c_int32)]
    )
    monkeypatch.setattr(abi, "STRUCTURES", with_replaced(structure, redeclared(structure, fields)))
    assert any(name.startswith(structure.__name__) for name in abi.differences(library.load()))


@needs_kernel
def test_other_constants_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in abi._CONSTANTS.items():
        monkeypatch.setitem(abi._CONSTANTS, name, value + 1)
        assert name in abi.differences(library.load())
        monkeypatch.undo()


@needs_kernel
def test_a_library_that_cannot_tell_is_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """A library without ``spectral_layout``."""

    monkeypatch.setattr(library, "load", lambda variant=None: Older())
    with pytest.raises(InvalidArgumentError, match="of another version: install unsloth-spectral again"):
        library.function("spectral_attend")


@every_structure
def test_names_that_are_no_fields_are_refused(structure: type[ctypes.Structure]) -> None:
    with pytest.raises(AttributeError, match="pointer"):
        structure(pointer=1)


def test_parts_of_the_other_kind_of_block_are_zeros() -> None:
    exact = abi.ExactTokens(data=1, dtype=abi.FLOAT16, batch_stride=2, head_stride=3, token_stride=4)
    block = abi.Block(num_tokens=5, is_coded=False, exact_keys=exact, exact_values=exact)
    assert (block.exact_values.token_stride, block.keys.planes, block.rotation.num_pairs) == (4, None, 0)
    exact.data = 9
    assert block.exact_keys.data == 1
