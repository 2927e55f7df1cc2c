"""Spectra: chosen ones come back exactly, caches agree with a plain SVD, and what cannot be measured is refused."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.eval.spectrum import SpectrumReport, measure_spectrum
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of


class Cached(nn.Module):
    """A model whose cache holds what it is given: pairs of keys and values, or None for a layer without any."""

    def __init__(self, *pairs: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.layers = [SimpleNamespace(keys=pair[0], values=pair[1]) if pair else SimpleNamespace() for pair in pairs]

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert use_cache
        assert logits_to_keep == 1
        return SimpleNamespace(**cache_argument(SimpleNamespace(layers=self.layers)))


def block(singular_values: list[float], num_tokens: int, head_dim: int | None = None, seed: int = 0) -> Tensor:
    """A float64 matrix ``[num_tokens, head_dim]`` with the given singular values and random orthogonal factors."""
    generator = torch.Generator().manual_seed(seed)
    count = len(singular_values)
    left = torch.linalg.qr(torch.randn(num_tokens, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(head_dim or count, count, generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(singular_values, dtype=torch.float64)) @ right.mT


def measure(keys: Tensor, values: Tensor | None = None, **options: int) -> SpectrumReport:
    """The report on one head, ``[n, head_dim]``, without sinks unless asked for."""
    model = Cached((keys[None, None], (keys if values is None else values)[None, None]))
    ids = torch.zeros(1, len(keys), dtype=torch.int64)
    return measure_spectrum(model, ids, **{"num_sink_tokens": 0, **options})


class TestKnownSpectra:
    @pytest.mark.parametrize(
        ("singular_values", "effective_rank"),
        [
            ([3.0], 1),
            ([10.0, 1.0, 1.0], 1),  # 100 of 102
            ([4.0, 2.0, 1.0], 2),  # 20 of 21
            ([1.0] * 20, 19),  # exactly 95 %, which rounding must not push out of reach
            ([1.0] * 40, 38),
            ([2.0**-i for i in range(24)], 3),  # 1 - 4^-3
            ([5.0, 5.0, 0.0, 0.0], 2),
        ],
    )
    def test_everything_about_one_head(self, singular_values: list[float], effective_rank: int) -> None:
        report = measure(block(singular_values, num_tokens=50))
        side = report.heads[0].keys
        total = sum(s * s for s in singular_values)
        shares = [s * s / total for s in singular_values if s]
        assert side.singular_values == pytest.approx(singular_values, rel=1e-6, abs=1e-6)
        assert side.effective_rank == effective_rank
        assert side.entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-9)
        assert side.top16_share == pytest.approx(sum(shares[:16]), abs=1e-12)
        assert (report.head_dim, report.num_tokens, report.block_size) == (len(singular_values), 50, 50)

    def test_flat_spectrum_has_the_entropy_of_its_rank(self) -> None:
        assert measure(block([7.0] * 12, 30, head_dim=20)).heads[0].keys.entropy == pytest.approx(math.log(12))

    def test_sides_are_not_mixed_up(self) -> None:
        head = measure(block([3.0, 1.0], 40), block([1.0, 1.0, 1.0], 40)).heads[0]
        assert len(head.keys.singular_values) == 2
        assert (head.keys.effective_rank, head.values.effective_rank) == (2, 3)

    def test_blocks_are_averaged_by_squares(self) -> None:
        squares = [[9.0, 4.0, 1.0], [100.0, 16.0, 0.0]]
        blocks = [block([s**0.5 for s in row], 32, seed=seed) for seed, row in enumerate(squares)]
        side = measure(torch.cat(blocks), block_size=32).heads[0].keys
        assert side.singular_values == pytest.approx([54.5**0.5, 10**0.5, 0.5**0.5])

    def test_kept_variance_is_that_of_truncating_each_block(self) -> None:
        states = torch.randn(5 * 24, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        states = states * torch.linspace(0.2, 3, 12) * torch.linspace(0.1, 5, 5).repeat_interleave(24)[:, None]
        left, values, right = torch.linalg.svd(states.unflatten(0, (5, 24)), full_matrices=False)
        for rank in (1, 5, 11):
            cut = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
            copied = 1 - (states - cut.flatten(0, 1)).square().sum() / states.square().sum()
            assert measure(states, block_size=24).kept_variance(rank)[0] == pytest.approx(copied.item(), abs=1e-12)

    def test_nothing_is_centred(self) -> None:
        side = measure(torch.full((30, 4), 2.0)).heads[0].keys
        assert side.effective_rank == 1
        assert side.singular_values[0] == pytest.approx((30 * 4 * 4) ** 0.5)

    def test_zeros_need_no_rank(self) -> None:
        report = measure(torch.zeros(30, 20))
        side = report.heads[0].keys
        assert (side.effective_rank, side.entropy, side.top16_share) == (0, 0.0, 1.0)
        assert report.kept_variance(1) == (1.0, 1.0)
        assert report.rank_for(0.95) == (1, 1), "a codec has no rank below 1"

    def test_half_precision_and_large_numbers(self) -> None:
        states = (block([300.0, 3.0], 64) * 100).half()
        assert states.float().square().sum() > 65504, "squares overflow in half precision"
        assert measure(states).heads[0].keys.singular_values == pytest.approx([3e4, 300], rel=0.01)


class TestTokens:
    def test_sinks_are_skipped(self) -> None:
        states = torch.cat([torch.full((3, 2), 1e6, dtype=torch.float64), block([4.0, 1.0], 40)])
        assert measure(states, num_sink_tokens=3).heads[0].keys.singular_values == pytest.approx([4, 1])

    def test_incomplete_last_block_is_dropped(self) -> None:
        states = torch.cat([block([4.0, 1.0], 40), torch.full((39, 2), 1e6, dtype=torch.float64)])
        report = measure(states, block_size=40)
        assert report.heads[0].keys.singular_values == pytest.approx([4, 1])
        assert (report.num_tokens, report.block_size) == (79, 40)

    def test_the_only_block_may_be_incomplete(self) -> None:
        report = measure(block([4.0, 1.0], 39), block_size=40)
        assert report.heads[0].keys.singular_values == pytest.approx([4, 1])
        assert report.block_size == 39

    def test_fewer_tokens_than_dimensions(self) -> None:
        report = measure(block([4.0, 1.0], 2, head_dim=60))
        assert report.heads[0].keys.singular_values == pytest.approx([4, 1])
        assert report.head_dim == 60
        assert report.kept_variance(60) == pytest.approx((1, 1))


class TestReport:
    @pytest.fixture
    def report(self) -> SpectrumReport:
        """Two heads: keys keep 80 % and 60 % at rank 1, values 50 % and 40 %."""
        keys = torch.stack([block([8**0.5, 2**0.5, 0], 20), block([6**0.5, 3**0.5, 1.0], 20)])
        values = torch.stack([block([5**0.5, 3**0.5, 2**0.5], 20), block([2.0, 3**0.5, 3**0.5], 20)])
        return measure_spectrum(
            Cached((keys[None], values[None])), torch.zeros(1, 20, dtype=torch.int64), num_sink_tokens=0
        )

    def test_kept_variance_is_the_mean_over_heads(self, report: SpectrumReport) -> None:
        assert report.kept_variance(1) == pytest.approx((0.7, 0.45))
        assert report.kept_variance(2) == pytest.approx((0.95, 0.75))
        assert report.kept_variance(3) == report.kept_variance(1000) == pytest.approx((1, 1))

    def test_rank_for_is_its_inverse(self, report: SpectrumReport) -> None:
        assert report.rank_for(0.1) == (1, 1)
        assert report.rank_for(0.7) == (1, 2)
        assert report.rank_for(0.95) == (2, 3)
        assert report.rank_for(1) == (3, 3)

    @pytest.mark.parametrize("rank", [0, -1, 1.5, True, "16"])
    def test_bad_rank(self, report: SpectrumReport, rank: object) -> None:
        with pytest.raises(InvalidArgumentError, match="rank must be an integer of at least 1, got"):
            report.kept_variance(rank)

    @pytest.mark.parametrize("share", [0, -0.1, 1.01, 95, float("nan")])
    def test_bad_share(self, report: SpectrumReport, share: float) -> None:
        with pytest.raises(InvalidArgumentError, match="share must be above 0 and at most 1, got"):
            report.rank_for(share)

    def test_dictionary_is_ready_for_json(self, report: SpectrumReport) -> None:
        result = json.loads(json.dumps(report.to_dict()))
        assert set(result) == {"heads", "head_dim", "num_tokens", "block_size"}
        assert [(head["layer_idx"], head["head_idx"]) for head in result["heads"]] == [(0, 0), (0, 1)]
        for head, entry in zip(report.heads, result["heads"], strict=True):
            for name in ("keys", "values"):
                side = getattr(head, name)
                assert entry[name] == {
                    "singular_values": list(side.singular_values),
                    "effective_rank": side.effective_rank,
                    "entropy": side.entropy,
                    "top16_share": side.top16_share,
                }

    def test_layers_of_different_widths(self) -> None:
        narrow, wide = block([1.0, 1.0], 20)[None, None], block([1.0] * 4, 20)[None, None]
        ids = torch.zeros(1, 20, dtype=torch.int64)
        report = measure_spectrum(Cached((narrow, narrow), (wide, wide)), ids, num_sink_tokens=0)
        assert report.head_dim == 4
        assert report.kept_variance(2) == pytest.approx((0.75, 0.75))


class TestModels:
    def ids(self, num_tokens: int) -> Tensor:
        return torch.randint(3, 128, (1, num_tokens), generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("shape", [{}, {"head_dim": 20, "num_key_value_heads": 1}, {"num_key_value_heads": 4}])
    def test_agrees_with_a_plain_svd_of_the_cache(
        self, tiny_llama: Callable[..., LlamaForCausalLM], assert_close: Callable[..., None], shape: dict[str, int]
    ) -> None:
        model, ids = tiny_llama(num_hidden_layers=3, **shape), self.ids(4 + 2 * 31 + 7)
        report = measure_spectrum(model, ids, block_size=31)
        num_heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
        assert [(head.layer_idx, head.head_idx) for head in report.heads] == [
            (layer, head) for layer in range(3) for head in range(num_heads)
        ]
        assert (report.head_dim, report.num_tokens, report.block_size) == (head_dim, 73, 31)
        with torch.no_grad():
            cache = cache_of(model(ids, use_cache=True))
        for head in report.heads:
            for name in ("keys", "values"):
                states = getattr(cache.layers[head.layer_idx], name)[0, head.head_idx]
                expected = torch.linalg.svdvals(torch.stack([states[4:35], states[35:66]]).double())
                actual = torch.tensor(getattr(head, name).singular_values)
                assert_close(actual, expected.square().mean(0).sqrt(), rtol=1e-6)

    @pytest.mark.parametrize("num_tokens", [40, 6])
    def test_sliding_layers_are_skipped(self, num_tokens: int) -> None:
        """Also where the document is shorter than the window: such a layer never carries a spectral cache."""
        config = Qwen3Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        report = measure_spectrum(Qwen3ForCausalLM(config).eval(), self.ids(num_tokens))
        assert [head.layer_idx for head in report.heads] == [1]

    def test_nothing_but_sliding_layers(self) -> None:
        config = MistralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=8,
        )  # fmt: skip
        message = (
            r"MistralForCausalLM has no layer whose cache keeps all 40 tokens.*DynamicSlidingWindowLayer.*supported"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            measure_spectrum(MistralForCausalLM(config).eval(), self.ids(40))

    def test_progress(self, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
        model = tiny_llama(num_hidden_layers=3)
        seen: list[tuple[str, int, int]] = []
        measure_spectrum(model, self.ids(20), on_progress=lambda *event: seen.append(event))
        stages = list(dict.fromkeys(stage for stage, _, _ in seen))
        assert stages == ["prefill", "singular values"]
        for stage in stages:
            steps = [(done, total) for name, done, total in seen if name == stage]
            assert steps == [(done, 3) for done in range(4)]
        assert not any(module._forward_hooks for module in model.modules())

    def test_the_model_is_left_alone(self, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
        model, ids = tiny_llama(), self.ids(30)
        with torch.no_grad():
            before = model(ids).logits
        first, second = measure_spectrum(model, ids), measure_spectrum(model, ids)
        assert first == second
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)


class TestRefused:
    def test_layers_that_hold_something_else(self) -> None:
        states = torch.ones(1, 1, 20, 4)
        ids = torch.zeros(1, 20, dtype=torch.int64)
        model = Cached(None, (states[..., 1:, :], states[..., 1:, :]), (states[0], states[0]), (states, states))
        assert [head.layer_idx for head in measure_spectrum(model, ids).heads] == [3]
        model.layers.pop()
        with pytest.raises(UnsupportedModelError, match="Cached has no layer whose cache keeps all 20 tokens"):
            measure_spectrum(model, ids)

    def test_no_cache_at_all(self) -> None:
        class Bare(nn.Module):
            def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
                return SimpleNamespace(**cache_argument(None))

        for model in (Bare(), Cached()):
            with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} fills no key-value cache"):
                measure_spectrum(model, torch.zeros(1, 20, dtype=torch.int64))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("side", ["keys", "values"])
    def test_not_finite(self, bad: float, side: str) -> None:
        good = torch.ones(1, 1, 20, 4)
        broken = good.clone()
        broken[0, 0, 11, 2] = bad
        pair = (broken, good) if side == "keys" else (good, broken)
        with pytest.raises(InvalidArgumentError, match=f"the {side} .* layer 1 of Cached .*load it in float32"):
            measure_spectrum(Cached((good, good), pair), torch.zeros(1, 20, dtype=torch.int64))

    @pytest.mark.parametrize(("num_tokens", "num_sink_tokens"), [(1, 0), (5, 4), (3, 4), (0, 0)])
    def test_too_few_tokens(self, num_tokens: int, num_sink_tokens: int) -> None:
        message = f"at least 2 tokens must follow the {num_sink_tokens} sink tokens, got {num_tokens} in all"
        with pytest.raises(InvalidArgumentError, match=message):
            measure(torch.ones(num_tokens, 4), num_sink_tokens=num_sink_tokens)

    @pytest.mark.parametrize("shape", [(20,), (2, 20), (1, 1, 20)])
    def test_not_one_sequence(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidArgumentError, match="must be one sequence of shape"):
            measure_spectrum(Cached(), torch.zeros(shape, dtype=torch.int64))

    @pytest.mark.parametrize("options", [{"block_size": 1}, {"block_size": 2.0}, {"num_sink_tokens": -1}])
    def test_bad_option(self, options: dict[str, int]) -> None:
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} must be an integer of at least"):
            measure(torch.ones(20, 4), **options)
