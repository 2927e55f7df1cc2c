"""The tables of rotary angles: waves and mixing make up the cosines and sines, on the CPU and the GPU alike."""

import pytest
import torch

from unsloth_spectral.attention.rotary_tables import cosines_and_sines, wave_tables
from unsloth_spectral.codec.spectral.packing import TILE_TOKENS
from unsloth_spectral.native.abi import FULL_WAVE, MAX_SMOOTH

STEPS = {
    "llama": 10000.0 ** -(torch.arange(64, dtype=torch.float64) / 64),
    "all fast": torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64),
    "all slow": torch.tensor([1e-4, 1e-3, 2e-2], dtype=torch.float64),
    "one": torch.tensor([0.3], dtype=torch.float64),
    "backwards and still": torch.tensor([0.0, -1.0, 0.01, -0.002], dtype=torch.float64),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def exact(step: torch.Tensor) -> torch.Tensor:
    """Cosines and sines, ``[2, P, 128]`` float64."""
    angles = step[:, None] * torch.arange(TILE_TOKENS, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()])


@every_step
def test_the_plain_tables(step: torch.Tensor) -> None:
    tables = wave_tables(step)
    assert torch.equal(tables.step, step[tables.order])
    assert (tables.step.abs().diff() <= 0).all()
    both = torch.stack(cosines_and_sines(step))
    assert (both - exact(step)).abs().max() < 1e-7
    angle = TILE_TOKENS * tables.step
    assert (tables.tile_step - torch.stack([angle.cos(), angle.sin()])).abs().max() < 1e-12


@every_step
def test_waves_make_up_every_cosine_and_sine(step: torch.Tensor) -> None:
    tables = wave_tables(step)
    expected, waves = exact(tables.step), tables.waves.double() / FULL_WAVE
    assert tables.waves.shape == (tables.num_waves, TILE_TOKENS, 2)
    fast = waves[: tables.num_fast].permute(2, 0, 1)
    assert (fast - expected[:, : tables.num_fast]).abs().le(0.51 / FULL_WAVE).all()
    smooth = waves[tables.num_fast :].mT.flatten(0, 1)
    mixed = tables.mixing[..., : len(smooth)].double() @ smooth
    assert tables.mixing.shape == (2, len(step) - tables.num_fast, MAX_SMOOTH)
    assert not tables.mixing[..., len(smooth) :].any()
    assert (mixed - expected[:, tables.num_fast :]).abs().le(3e-4).all()


@every_step
def test_no_pair_has_more_of_a_smooth_function_than_its_reach(step: torch.Tensor) -> None:
    tables = wave_tables(step)
    angles = torch.linspace(0, 6.3, 50)[:, None, None]
    share = angles.cos() * tables.mixing[0] + angles.sin() * tables.mixing[1]
    assert (share.abs() <= tables.reach * 1.00001).all()


def test_tables_are_made_once() -> None:
    step = STEPS["llama"]
    assert wave_tables(step) is wave_tables(step.clone())
    assert cosines_and_sines(step) is cosines_and_sines(step.clone())
