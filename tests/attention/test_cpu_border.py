"""The compiled attention kernel gets only tensors of the dtype, size and device that it reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coded import coded_block, exact, random
from torch.overrides import TorchFunctionMode

from unsloth_spectral.attention import cpu
from unsloth_spectral.attention.rotary_tables import WaveTables
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.keys import KeyCodes
from unsloth_spectral.codec.spectral.values import ValueCodes
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import library
from unsloth_spectral.rope import Rotation

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=f"no kernel here: {library.obstacle()}")

OTHER_DTYPE = {
    torch.float32: torch.float16,
    torch.float16: torch.float32,
    torch.float64: torch.float32,
    torch.uint8: torch.int16,
    torch.int8: torch.int16,
    torch.int16: torch.int32,
    torch.int32: torch.int64,
}
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda tensor: tensor.to(OTHER_DTYPE[tensor.dtype]),
    "size": lambda tensor: tensor[..., :-1],
    "device": lambda tensor: tensor.to("meta"),
}
STORED = [
    *(("keys", name) for name in KeyCodes.content()),
    *(("values", name) for name in ValueCodes.content()),
]
TABLES = [name for name, kind in WaveTables.__annotations__.items() if kind is torch.Tensor and name != "order"]
every_wrong = pytest.mark.parametrize("wrong", WRONG)


@pytest.fixture
def block() -> SpectralBlock:
    return coded_block(2, 2, 64, 300, rows=2, widths=torch.arange(128).view(2, 64) % 9)


@pytest.fixture(autouse=True)
def _constants_of_this_test() -> Any:
    cpu._constants.cache_clear()
    yield
    cpu._constants.cache_clear()


def attend(*blocks: Any, mask: torch.Tensor | None = None, sink_logits: torch.Tensor | None = None) -> torch.Tensor:
    return cpu.attend(random(2, 4, 1, 64), blocks, mask, ScoreOptions(0.125, None, sink_logits))


def refuses(*blocks: Any, **options: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
        attend(*blocks, **options)


def part_replaced(block: SpectralBlock, part: str, **changes: Any) -> SpectralBlock:
    return dataclasses.replace(block, **{part: dataclasses.replace(getattr(block, part), **changes)})


@every_wrong
@pytest.mark.parametrize(("part", "name"), STORED)
def test_what_a_block_stores(block: SpectralBlock, part: str, name: str, wrong: str) -> None:
    attend(block)
    refuses(part_replaced(block, part, **{name: WRONG[wrong](getattr(getattr(block, part), name))}))


@pytest.mark.parametrize("wrong", ["size", "device", "rows"])
def test_the_first_rotation(block: SpectralBlock, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = block.keys.rotation.start
    start = start.expand(3, 2, -1, -1).flatten(0, 1) if wrong == "rows" else WRONG[wrong](start)
    monkeypatch.setattr(Rotation, "start", start)
    refuses(block)


def test_rotary_dimensions_that_do_not_exist(block: SpectralBlock) -> None:
    beyond = dataclasses.replace(block.keys.rotation, second=slice(40, 72))
    refuses(part_replaced(block, "keys", rotation=beyond))


@pytest.mark.parametrize("change", [lambda spans: spans[1:], lambda spans: (128, *spans[1:-1], 0)])
def test_spans_that_are_not_one_for_each_pair_and_longer_for_slower_ones(block: SpectralBlock, change: Any) -> None:
    refuses(part_replaced(block, "keys", spans=change(block.keys.spans)))


def test_keys_that_are_their_own_anchors_are_left_to_others(block: SpectralBlock) -> None:
    codes = dataclasses.replace(block.keys, spans=(1,) * len(block.keys.spans))
    assert cpu.obstacle(random(2, 4, 1, 64), [dataclasses.replace(block, keys=codes)]) == "keys un-rotated one by one"


@every_wrong
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_angles(block: SpectralBlock, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"reach", "mixing", "waves"} <= set(TABLES)
    original = cpu.wave_tables
    monkeypatch.setattr(
        cpu,
        "wave_tables",
        lambda step: original(step)._replace(**{name: WRONG[wrong](getattr(original(step), name))}),
    )
    refuses(block)


@every_wrong
@pytest.mark.parametrize("name", ["hadamard", "_levels"])
def test_constants(block: SpectralBlock, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = cpu.values if name == "hadamard" else cpu
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda size: WRONG[wrong](original(size)))
    refuses(block)


@every_wrong
@pytest.mark.parametrize("factory", [torch.empty, torch.tensor], ids=["output", "counts"])
def test_tensors_that_are_made_for_the_call(
    block: SpectralBlock, factory: Any, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if torch's default dtype had decided their dtype."""
    monkeypatch.setattr(Rotation, "start", block.keys.rotation.start)  # made for the call too, but not by the kernel

    class Spoiling(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return WRONG[wrong](result) if function is factory else result

    with Spoiling():
        refuses(block)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to(torch.int8),
        lambda tensor: tensor[..., :-1],
        lambda tensor: tensor[:1],
        lambda tensor: tensor[:, :1],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.to("meta"),
    ],
    ids=["float64", "int8", "head_dim", "batch", "heads", "gaps", "device"],
)
def test_exact_tokens(block: SpectralBlock, side: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tokens = exact(2, 2, 9, 64)
    refuses(block, dataclasses.replace(tokens, **{side: change(getattr(tokens, side))}))


def test_fewer_exact_values_than_keys(block: SpectralBlock) -> None:
    tokens = exact(2, 2, 9, 64)
    refuses(block, ExactBlock(tokens.keys, tokens.values[..., :-1, :]))


def test_query_mask_and_sink_logits(block: SpectralBlock) -> None:
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    attend(block, mask=mask, sink_logits=random(4))
    for other in (mask[..., :-1], mask[..., None, :], mask.expand(-1, 2, -1, -1), mask.repeat(2, 1, 1, 1)):
        refuses(block, mask=other)
    for other in (mask.to("meta"), mask.float().to("meta")):
        refuses(block, mask=other)
    assert torch.equal(attend(block, sink_logits=random(8)[::2]), attend(block, sink_logits=random(8)[::2].clone()))
    for sink_logits in (random(3), random(8), random(4).to("meta")):
        refuses(block, sink_logits=sink_logits)
    for query in (random(2, 4, 1, 64).to("meta"), random(1, 4, 1, 64), random(2, 4, 1, 32), random(2, 3, 1, 64)):
        with pytest.raises(InvalidArgumentError, match="for the compiled kernel, got"):
            cpu.attend(query, [block], None, ScoreOptions(0.125))
