"""Bits for components: against a plain greedy allocation, and one budget for all layers that is never exceeded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral.allocate import DISTORTION, GAINS, Budget, cost, uniform_value_width, widths_at
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.fields import Fields, flatten

HEADS, HEAD_DIM = 2, 32
HEAD_FACTORS = (0.5, 2.0)  # of key sensitivities within a layer


def spectrum(seed: int, octaves: float = 12.0, components: int = HEADS * HEAD_DIM) -> torch.Tensor:
    """Distinct variances over ``octaves``."""
    return torch.exp2(-octaves * torch.rand(components, generator=torch.Generator().manual_seed(seed)))


def greedy(variances: torch.Tensor, bits: int) -> list[int]:
    """Each bit goes to the component that gains most."""
    widths = [0] * len(variances)
    for _ in range(bits):
        gains = [
            float(v) * GAINS[w] if w < MAX_NBITS else -1.0 for v, w in zip(variances.double(), widths, strict=True)
        ]
        widths[gains.index(max(gains))] += 1
    return widths


def distortion(variances: torch.Tensor, widths: torch.Tensor) -> float:
    return float((variances * torch.tensor(DISTORTION)[widths]).sum())


def test_the_gains_fall() -> None:
    assert list(GAINS) == sorted(GAINS, reverse=True)
    assert len(GAINS) == MAX_NBITS


@pytest.mark.parametrize("first_bit_cost", [1.0, 1.3, 5.0])
def test_widths_fall_as_the_level_rises_and_rise_with_the_variance(first_bit_cost: float) -> None:
    variances = spectrum(0).sort(descending=True).values
    before = torch.full((len(variances),), MAX_NBITS)
    for exponent in range(-60, 10):
        widths = widths_at(2.0 ** (exponent / 3), variances, first_bit_cost)
        assert (widths <= before).all()
        assert (widths.diff() <= 0).all()
        assert widths.min() >= 0
        before = widths
    assert not before.any()
    assert (widths_at(2.0**-40, variances, first_bit_cost) == MAX_NBITS).all()


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_greedy_allocation_where_every_bit_costs_the_same(seed: int) -> None:
    variances = spectrum(seed, components=40)
    for exponent in range(-20, 0, 3):
        widths = widths_at(2.0**exponent, variances, 1.0)
        assert widths.tolist() == greedy(variances, int(widths.sum()))


@pytest.mark.parametrize("first_bit_cost", [1.5, 3.0, 8.0])
def test_a_costly_first_bit_is_paid_only_where_it_is_worth_it(first_bit_cost: float) -> None:
    variances = spectrum(1)
    widths = widths_at(2.0**-6, variances, first_bit_cost)
    price = cost(widths, first_bit_cost)
    assert price == int(widths.sum()) + (first_bit_cost - 1) * int((widths > 0).sum())
    # No other level of the free first bit has a lower error at the same cost.
    for exponent in range(-80, 0):
        other = widths_at(2.0 ** (exponent / 4), variances, 1.0)
        if cost(other, first_bit_cost) <= price:
            assert distortion(variances, widths) <= distortion(variances, other) + 1e-6
    assert int((widths > 0).sum()) < int((widths_at(2.0**-6, variances, 1.0) > 0).sum())


@pytest.mark.parametrize("first_bit_cost", [1.0, 1.3, 3.0, 8.0])
def test_each_width_is_the_best_at_its_level(first_bit_cost: float) -> None:
    variances, bits = spectrum(2).double(), torch.arange(MAX_NBITS + 1)
    price = bits + (first_bit_cost - 1) * (bits > 0)
    for exponent in range(-40, 2):
        level = 2.0 ** (exponent / 3)
        best = (variances[:, None] * torch.tensor(DISTORTION).double() + level * price).argmin(-1)
        assert torch.equal(widths_at(level, variances, first_bit_cost), best)


def spend(
    budget: Budget, layers: list[torch.Tensor], order: list[int], first: float = 1.1, fixed: float = 0.0
) -> tuple[float, list[torch.Tensor]]:
    """Bits per element that ``order`` of ``layers`` takes."""
    widths = {layer: budget.allocate(layer, layers[layer].view(HEADS, HEAD_DIM), first, fixed) for layer in order}
    total = sum(cost(layer_widths, first) + fixed for layer_widths in widths.values())
    return total / sum(layer.numel() for layer in layers), [widths[layer] for layer in range(len(layers))]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sizes=st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    bits=st.floats(0.8, 5.0),
    first=st.floats(1.0, 3.0),
    shuffle=st.randoms(use_true_random=False),
    seed=st.integers(0, 10**6),
)
def test_the_total_stays_within_the_budget(
    sizes: list[int], bits: float, first: float, shuffle: object, seed: int
) -> None:
    layers = [spectrum(seed + i) * 2.0**size for i, size in enumerate(sizes)]
    order = list(range(len(sizes)))
    shuffle.shuffle(order)
    spent, _ = spend(Budget(bits, len(layers)), layers, order, first, fixed=8.0)
    assert spent <= bits + 1e-6
    # A component's first two bits may come together, and with its metadata.
    assert spent >= bits - (first + 2) / (HEADS * HEAD_DIM * len(layers)) - 0.02 * bits


@pytest.mark.parametrize("bits", [1.0, 1.6, 2.2, 4.0])
def test_nearly_all_is_spent(bits: float) -> None:
    layers = [spectrum(i) * 2.0 ** (i % 5) for i in range(12)]
    spent, _ = spend(Budget(bits, 12), layers, list(range(12)), fixed=4.0)
    assert bits * 0.98 <= spent <= bits


def test_nothing_is_bought_where_the_fixed_cost_takes_all() -> None:
    _, widths = spend(Budget(1.0, 2), [spectrum(0), spectrum(1)], [0, 1], fixed=100.0)
    assert not any(layer_widths.any() for layer_widths in widths)


def test_equal_layers_get_equal_levels() -> None:
    budget, layers = Budget(2.0, 8), [spectrum(0)] * 8
    _, widths = spend(budget, layers, list(range(8)))
    levels = [budget.level_of(layer) for layer in range(8)]
    assert max(levels) / min(levels) < 1.1
    assert all((layer_widths - widths[0]).abs().sum() <= 3 for layer_widths in widths)


def test_layers_that_matter_more_get_more() -> None:
    layers = [spectrum(i) * (16.0 if i % 2 else 1.0) for i in range(8)]
    _, widths = spend(Budget(2.5, 8), layers, list(range(8)))
    # Sixteen times the variance is two bits more a component.
    assert int(widths[7].sum()) > int(widths[6].sum()) + HEADS * HEAD_DIM


def test_variances_expected_give_all_layers_one_level_from_the_first() -> None:
    layers = [spectrum(i) * 4.0**i for i in range(6)]
    profile = ModelProfile((0.0,) * 6, ((1.0,) * HEADS,) * 6, tuple(tuple(layer.tolist()) for layer in layers))
    with_profile, without_profile = Budget(2.5, 6, profile), Budget(2.5, 6)
    spent, widths = spend(with_profile, layers, list(range(6)))
    _, other = spend(without_profile, layers, list(range(6)))
    assert 2.5 * 0.98 <= spent <= 2.5
    levels, blind = ([budget.level_of(layer) for layer in range(6)] for budget in (with_profile, without_profile))
    assert max(levels) / min(levels) < 1.2
    assert max(blind) / min(blind) > 4

    def lost(widths_of_layers: list[torch.Tensor]) -> float:
        return sum(distortion(layer, w.flatten()) for layer, w in zip(layers, widths_of_layers, strict=True))

    assert lost(widths) < lost(other)


def test_a_layer_asked_again_keeps_its_level() -> None:
    budget = Budget(2.0, 2)
    first = budget.allocate(0, spectrum(0).view(HEADS, -1), 1.1, 0.0)
    assert torch.equal(budget.allocate(0, spectrum(0).view(HEADS, -1), 1.1, 0.0), first)
    level = budget.level_of(0)
    assert torch.equal(
        budget.allocate(0, 4 * spectrum(0).view(HEADS, -1), 1.1, 0.0),
        widths_at(level, 4 * spectrum(0).view(HEADS, -1), 1.1),
    )
    spent, _ = spend(budget, [spectrum(0), spectrum(1)], [0, 1])
    assert spent <= 2.0


def forget_all(budget: Budget) -> None:
    for layer in range(budget.num_layers):
        budget.forget(layer)


def test_a_layer_that_is_forgotten_leaves_the_others_what_they_have() -> None:
    budget, layers = Budget(2.0, 3), [spectrum(i) * 3.0**i for i in range(3)]
    _, widths = spend(budget, layers, [0, 1, 2])
    levels = [budget.level_of(layer) for layer in (0, 2)]
    budget.forget(1)
    with pytest.raises(KeyError):
        budget.level_of(1)
    assert [budget.level_of(layer) for layer in (0, 2)] == levels
    again = budget.allocate(1, layers[1].view(HEADS, -1), 1.1, 0.0)
    others = sum(cost(widths[layer].flatten(), 1.1) for layer in (0, 2))
    assert (others + cost(again.flatten(), 1.1)) / (3 * again.numel()) <= 2.0


@pytest.mark.parametrize("missing", ["_levels", "_balances", "_value_nbits", "seen"])
def test_what_an_interrupted_allocation_left_is_forgotten(missing: str) -> None:
    budget = Budget(2.0, 2)
    first = budget.allocate(0, spectrum(0).view(HEADS, -1), 1.1, 0.0)
    getattr(budget, missing).pop(0, None)
    budget.forget(0)
    assert torch.equal(budget.allocate(0, spectrum(0).view(HEADS, -1), 1.1, 0.0), first)


def test_forgetting_all_layers_forgets_what_was_spent() -> None:
    budget, layers = Budget(2.0, 3), [spectrum(i) * 3.0**i for i in range(3)]
    spent, widths = spend(budget, layers, [0, 1, 2])
    forget_all(budget)
    with pytest.raises(KeyError):
        budget.level_of(0)
    again, same = spend(budget, layers, [0, 1, 2])
    assert again == spent
    assert all(torch.equal(a, b) for a, b in zip(widths, same, strict=True))
    # In the middle of a round, too.
    forget_all(budget)
    budget.allocate(1, 1e6 * layers[1].view(HEADS, -1), 1.1, 0.0)
    forget_all(budget)
    assert spend(budget, layers, [0, 1, 2])[0] == spent


def test_zero_variances_get_no_bits() -> None:
    assert not Budget(4.0, 1).allocate(0, torch.zeros(HEADS, HEAD_DIM), 1.1, 0.0).any()
    half = spectrum(0).view(HEADS, HEAD_DIM).clone()
    half[1] = 0
    widths = Budget(2.0, 1).allocate(0, half, 1.1, 0.0)
    assert not widths[1].any()
    assert widths[0].float().mean() > 3


def known_model(num_layers: int, seed: int = 0) -> tuple[ModelProfile, list[torch.Tensor]]:
    """A model whose layers differ a hundredfold in what they need, and its profile."""
    generator = torch.Generator().manual_seed(seed)
    layers = [spectrum(seed + i) * 3.0 ** (i % 4) for i in range(num_layers)]
    keys, values = torch.logspace(-3, -1, 5)[torch.randint(0, 5, (2, num_layers), generator=generator)].tolist()
    by_head = tuple(tuple(key * factor for factor in HEAD_FACTORS) for key in keys)
    return ModelProfile(tuple(values), by_head, tuple(tuple(layer.tolist()) for layer in layers)), layers


ELEMENTS = HEADS * HEAD_DIM


def spend_both(budget: Budget, layers: list[torch.Tensor]) -> tuple[float, list[torch.Tensor], list[int]]:
    """Bits for each key element that keys and values take, and the widths of both."""
    widths = [
        budget.allocate(layer, layer_variances.view(HEADS, HEAD_DIM), 1.1, 8.0, ELEMENTS)
        for layer, layer_variances in enumerate(layers)
    ]
    nbits = [budget.value_nbits_of(layer) for layer in range(len(layers))]
    total = sum(cost(layer_widths, 1.1) + 8.0 for layer_widths in widths) + ELEMENTS * sum(nbits)
    return total / (ELEMENTS * len(layers)), widths, nbits


def test_layers_that_the_profile_calls_frugal_still_find_half_of_their_share() -> None:
    share, flat = 3.0 * ELEMENTS, torch.ones(HEADS, HEAD_DIM)
    frugal = tuple((1e-12 * flat.flatten()).tolist())
    profile = ModelProfile((1e-9,) * 4, ((1.0,) * HEADS,) * 4, (tuple(flat.flatten().tolist()), frugal, frugal, frugal))
    budget, left = Budget(3.0, 4, profile), 4 * share
    # Every layer needs more than the whole budget.
    for layer in range(4):
        widths = budget.allocate(layer, flat, 1.1, 8.0, ELEMENTS)
        left -= cost(widths, 1.1) + 8.0 + ELEMENTS * budget.value_nbits_of(layer)
        assert left >= (3 - layer) * share / 2 - 1e-6


@settings(deadline=None, max_examples=30, derandomize=True)
@given(bits=st.floats(2.4, 8.0), num_layers=st.integers(1, 12), size=st.floats(-6, 6), seed=st.integers(0, 1000))
def test_keys_and_values_stay_within_one_budget(bits: float, num_layers: int, size: float, seed: int) -> None:
    profile, layers = known_model(num_layers, seed)
    # The text at hand needs more or less than the profile's texts did.
    spent, _, nbits = spend_both(Budget(bits, num_layers, profile), [layer * 2.0**size for layer in layers])
    assert spent <= bits + 1e-6
    assert all(1 <= layer_variances <= MAX_NBITS for layer_variances in nbits)


def test_a_profile_gives_keys_and_values_one_level() -> None:
    profile, layers = known_model(12)
    spent, widths, nbits = spend_both(Budget(4.24, 12, profile), layers)
    # A layer's values come in whole bits only.
    assert 4.24 * 0.95 <= spent <= 4.24
    assert len(set(nbits)) > 1
    by_damage = [width for _, width in sorted(zip(profile.value_sensitivities, nbits, strict=True))]
    assert by_damage == sorted(by_damage)

    def damage(widths_of_layers: list[torch.Tensor], nbits_of_layers: list[int]) -> float:
        """Nats, as the quantizers' tables have it."""
        keys = zip(map(torch.tensor, profile.key_sensitivities), layers, widths_of_layers, strict=True)
        values = zip(profile.value_sensitivities, nbits_of_layers, strict=True)
        unbiased = [d / (1 - d) for d in DISTORTION[1:]]
        return sum(distortion(s[:, None] * v.view(HEADS, HEAD_DIM), w) for s, v, w in keys) + sum(
            s * unbiased[nbits - 1] / unbiased[0] for s, nbits in values
        )

    # Against one width for all values and the rest for the keys as they come.
    blind = Budget(2.24, 12)
    plain = [
        blind.allocate(layer, layer_variances.view(HEADS, HEAD_DIM), 1.1, 8.0)
        for layer, layer_variances in enumerate(layers)
    ]
    assert damage(widths, nbits) < 0.7 * damage(plain, [2] * 12)


@pytest.mark.parametrize("louder", [0.5, 2.0, 32.0])
def test_a_text_louder_throughout_than_those_of_the_profile_gets_the_same_widths(louder: float) -> None:
    known, layers = known_model(8)
    profile = replace(known, value_sensitivities=(0.0,) * 8)
    expected = spend_both(Budget(3.5, 8, profile), layers)[1]
    found = spend_both(Budget(3.5, 8, profile), [louder * layer for layer in layers])[1]
    assert all(torch.equal(widths, others) for widths, others in zip(found, expected, strict=True))


@pytest.mark.parametrize("knows", [True, False])
def test_a_budget_stored_midway_goes_on_as_it_would_have(knows: bool) -> None:
    profile, layers = known_model(6)
    first, second = (Budget(4.0, 6, profile if knows else None) for _ in range(2))
    for layer in range(3):
        first.allocate(layer, 8 * layers[layer].view(HEADS, HEAD_DIM), 1.1, 8.0, ELEMENTS)
    tree, tensors = flatten(first.to_fields())
    second.restore(Fields(tree, lambda number, _: tensors[number]))
    for layer in range(3, 6):
        given_to = (layer, layers[layer].view(HEADS, HEAD_DIM), 1.1, 8.0, ELEMENTS)
        assert torch.equal(second.allocate(*given_to), first.allocate(*given_to))


def test_values_take_another_bit_while_it_saves_the_level() -> None:
    known, layers = known_model(24)
    profile = replace(known, value_sensitivities=tuple(torch.logspace(-4, 1, 24).tolist()))
    budget = Budget(4.24, 24, profile)
    _, _, nbits = spend_both(budget, layers)
    assert len(set(nbits)) > 4
    noise = [d / (1 - d) for d in DISTORTION[1:]]
    for layer, sensitivity in enumerate(profile.value_sensitivities):
        saved = [sensitivity * (noise[n] - noise[n + 1]) / noise[0] / ELEMENTS for n in range(MAX_NBITS - 1)]
        assert nbits[layer] == 1 + sum(nats >= budget.level_of(layer) for nats in saved)


def test_heads_that_matter_more_get_more_bits() -> None:
    same = spectrum(0, components=HEAD_DIM).repeat(HEADS)
    profile = ModelProfile((0.0,), ((1.0, 16.0),), (tuple(same.tolist()),))
    widths = Budget(3.0, 1, profile).allocate(0, same.view(HEADS, HEAD_DIM), 1.1, 8.0, 0)
    # Sixteen times the damage is two bits more for every component that has some, and at times three.
    more = (widths[1] - widths[0])[widths[0] > 1]
    assert set(more.tolist()) <= {2, 3}
    assert int((widths[0] > 1).sum()) > HEAD_DIM // 4


@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_process_with_some_of_the_heads_takes_their_mean(num_heads: int) -> None:
    """With tensor parallelism the profile is of all heads."""
    variances = spectrum(0, components=num_heads * HEAD_DIM).view(num_heads, HEAD_DIM)
    known = tuple(variances.flatten().tolist())
    allocated = []
    for heads in ((1.0, 3.0), (2.0,) * num_heads):
        profile = ModelProfile((0.0,), (heads,), (known * 2 * HEADS,))
        allocated.append(Budget(3.0, 1, profile).allocate(0, variances, 1.1, 8.0))
    assert torch.equal(*allocated)
    assert allocated[0].shape == variances.shape


def test_values_that_do_not_matter_get_one_bit() -> None:
    profile, layers = known_model(6)
    profile = ModelProfile((0.0,) * 6, profile.key_sensitivities, profile.key_variances)
    assert spend_both(Budget(4.0, 6, profile), layers)[2] == [1] * 6


def test_one_width_without_a_profile() -> None:
    assert [uniform_value_width(bits) for bits in (1.2, 2.12, 3.05, 8.0)] == [1, 2, 3, 8]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("with_profile", [False, True])
def test_widths_do_not_depend_on_the_unit_of_the_variances(with_profile: bool) -> None:
    """Nor do thresholds above all numbers of float32 raise warnings."""
    variances = spectrum(1).view(HEADS, HEAD_DIM)
    profile = ModelProfile((0.0,) * 2, ((1.0,) * HEADS,) * 2, (tuple(variances.flatten().tolist()),) * 2)
    allocated = []
    for exponent in (-60, 0, 60, 120, 125):
        budget = Budget(3.0, 2, profile if with_profile else None)
        allocated.append([budget.allocate(layer, variances * 2.0**exponent, 1.1, 8.0) for layer in range(2)])
    for other in allocated[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(allocated[0], other, strict=True))
