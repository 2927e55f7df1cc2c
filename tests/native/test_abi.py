"""Python and the compiler lay out their shared structures identically, and a difference is detected."""

import ctypes
from itertools import combinations

import pytest
import torch

from unsloth_spectral.attention import cpu, naive
from unsloth_spectral.attention.dispatch import attend
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.native import abi, library

VARIANTS = [name for name in library.VARIANTS if library.load(name) is not None]
needs_kernel = pytest.mark.skipif(not VARIANTS, reason=f"no kernel here: {library.obstacle()}")
STRUCTURES = abi.STRUCTURES
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)


@pytest.fixture(autouse=True)
def _loaded_anew():
    for cached in (library.load, library.function, library.obstacle):
        cached.cache_clear()
    yield
    for cached in (library.load, library.function, library.obstacle):
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
            *abi.differences(library._opened(VARIANTS[0]))
        }
    assert library.load() is None


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
    assert any(name.startswith(structure.__name__) for name in abi.differences(library._opened(VARIANTS[0])))


@needs_kernel
def test_other_constants_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in abi._CONSTANTS.items():
        monkeypatch.setitem(abi._CONSTANTS, name, value + 1)
        assert name in abi.differences(library._opened(VARIANTS[0]))
        monkeypatch.undo()


class Older:
    """A library without ``spectral_layout``."""


@needs_kernel
def test_a_build_of_other_sources_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a checkout that was updated and not built again: the next build serves, or torch after one warning."""
    opened = library._opened
    monkeypatch.setattr(library, "_opened", lambda name: Older() if name == VARIANTS[0] else opened(name))
    assert library.load(VARIANTS[0]) is None
    assert library.chosen() == (VARIANTS[1] if len(VARIANTS) > 1 else None)
    library.load.cache_clear()
    monkeypatch.setattr(library, "_opened", lambda name: Older())
    assert library.load() is None
    message = "the kernel was compiled from another version's sources: install unsloth-spectral again"
    assert library.obstacle() == message
    library.obstacle()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"decoding runs in torch, which is slower: {message}"
    ]


@needs_kernel
def test_attention_goes_on_in_torch_beside_a_build_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_opened", lambda name: Older())
    query = torch.randn(1, 2, 1, 8)
    block = ExactBlock(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    assert cpu.obstacle(query, [block]) == library.obstacle()
    output = attend(query, [block], None, ScoreOptions(0.5))
    torch.testing.assert_close(output, naive.attend(query, [block], None, ScoreOptions(0.5)))


@every_structure
def test_names_that_are_no_fields_are_refused(structure: type[ctypes.Structure]) -> None:
    with pytest.raises(AttributeError, match="pointer"):
        structure(pointer=1)


def test_parts_of_the_other_kind_of_block_are_zeros() -> None:
    exact = abi.ExactTokens(data=1, dtype=abi.FLOAT16, batch_stride=2, head_stride=3, token_stride=4)
    block = abi.Block(num_tokens=5, count=None, is_coded=False, exact_keys=exact, exact_values=exact)
    assert (block.exact_values.token_stride, block.keys.streams, block.rotation.num_pairs) == (4, None, 0)
    exact.data = 9
    assert block.exact_keys.data == 1
