"""A user's own codec: written and registered here, and used everywhere without a change of the library."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoint import save_checkpoint
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache
from unsloth_spectral.codec import registry
from unsloth_spectral.codec.block import Amounts, Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.codec import Codec, LayerCodec
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.registry import methods
from unsloth_spectral.eval.tasks import fidelity
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import load_model


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    block_size: int = 32
    num_sink_tokens: int = 4
    residual_length: int = 8

    codec: ClassVar[str] = "identity"
    title: ClassVar[str] = "identity"

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim > 64:
            raise InvalidArgumentError(f"the identity codec takes a head_dim of 64 at most, got {head_dim}")


@dataclass(frozen=True, slots=True, eq=False)
class IdentityBlock:
    """Sealed tokens, stored unchanged."""

    kind: ClassVar[str] = "identity"
    tokens: ExactBlock
    is_finite: ClassVar[bool] = True
    num_fallbacks: ClassVar[int] = 0
    amounts: ClassVar[Amounts] = Amounts()
    shared_tensors: ClassVar[tuple[Tensor, ...]] = ()

    def __getattr__(self, name: str) -> Any:
        if name not in ("num_key_value_heads", "num_tokens", "value_dim", "nbytes", "scores", "combine", "reconstruct"):
            raise AttributeError(name)
        return getattr(self.tokens, name)

    @property
    def errors(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.zeros(1)

    def tiles(self, num_tokens: int) -> Iterator[Block]:
        return self.tokens.tiles(num_tokens)

    def map_batch(self, function: TensorFunction) -> "IdentityBlock":
        return IdentityBlock(self.tokens.map_batch(function))

    def first_tokens(self, num_tokens: int) -> list[Block]:
        return [IdentityBlock(self.tokens.slice(0, num_tokens).map_batch(torch.clone))]

    def to_fields(self) -> dict[str, Field]:
        return self.tokens.to_fields()

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "IdentityBlock":
        return cls(ExactBlock.from_fields(fields, shape))


class IdentityLayer(LayerCodec):
    def __init__(self, codec: "IdentityCodec") -> None:
        self._codec = codec

    def unit(self, is_first: bool, num_sealed: int = 0) -> int:
        return self._codec.config.block_size

    def seal(
        self, tokens: ExactBlock, real: Tensor | None, observed: Observed, last: Block | None = None
    ) -> SealedBlock | None:
        self._codec.num_sealed += tokens.num_tokens
        return IdentityBlock(tokens.map_batch(torch.clone))


class IdentityCodec(Codec):
    name = "identity"
    config_type = IdentityConfig
    block_types = (IdentityBlock,)
    compared: ClassVar[dict[str, tuple[Any, ...]]] = {"identity": (IdentityConfig(),)}

    def __init__(self, config: IdentityConfig, num_layers: int, profile: ModelProfile | None = None) -> None:
        self.config, self.num_sealed = config, 0

    def layer(self, number: int) -> IdentityLayer:
        return IdentityLayer(self)

    def to_fields(self) -> dict[str, Field]:
        return {"num_sealed": self.num_sealed}

    def restore(self, fields: Fields) -> None:
        self.num_sealed = fields.integer("num_sealed")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))
    registry.register(IdentityCodec)


@pytest.fixture
def model(tiny_llama: Any) -> LlamaForCausalLM:
    return tiny_llama()


def prompt(rows: int = 1, count: int = 150) -> Tensor:
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(0))


def identity(model: LlamaForCausalLM) -> SpectralCache:
    return SpectralCache(model, config=IdentityConfig())


def generate(model: LlamaForCausalLM, cache: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **options}
    generated: Tensor = model.generate(ids, **cache_argument(cache), **options)
    return generated


def check_sealed(cache: SpectralCache) -> None:
    assert all(layer.sealed_tokens >= 32 for layer in cache.stats().layers)
    assert any(isinstance(block, IdentityBlock) for block in cache.layers[0].spectral.blocks)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generates_what_a_dense_cache_does(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    cache = identity(model)
    expected = generate(model, DynamicCache(config=model.config), prompt(), **options)
    assert torch.equal(generate(model, cache, prompt(), **options), expected)
    check_sealed(cache)


def test_crops_copies_and_goes_on(model: LlamaForCausalLM) -> None:
    cache = identity(model)
    generate(model, cache, prompt())
    twin = copy.deepcopy(cache)
    for num_kept in (100, 50, 20, 2):
        cache.crop(num_kept - cache.get_seq_length())
        assert cache.get_seq_length() == num_kept
        assert torch.equal(generate(model, cache, prompt()), generate(model, identity(model), prompt()))
    check_sealed(twin)


def test_counts_all_bytes(model: LlamaForCausalLM) -> None:
    cache = identity(model)
    generate(model, cache, prompt())
    stats = cache.stats()
    assert stats.num_tokens == 189
    assert stats.layers[0].error_keys == stats.layers[0].error_values == 0
    assert stats.layers[0].bits_keys is stats.layers[0].rank_keys is None
    assert stats.dense_bytes <= stats.stored_bytes < 1.5 * stats.dense_bytes


def test_saves_and_loads(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = identity(model), tmp_path / "identity.safetensors"
    generate(model, cache, prompt(), max_new_tokens=1)
    cache.save(path, prompt())
    again = SpectralCache.load(path, model, prompt(count=151))
    assert again.config == IdentityConfig()
    assert isinstance(again.codec, IdentityCodec)
    assert again.codec.num_sealed == cache.codec.num_sealed > 0
    check_sealed(again)
    assert torch.equal(generate(model, again, prompt(count=151)), generate(model, cache, prompt(count=151)))
    monkeypatch.delitem(registry._CODECS, "identity")
    with pytest.raises(LoadError, match="codec among rank, spectral"):
        SpectralCache.load(path, model)


def test_its_rules_are_checked(tiny_llama: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="head_dim of 64 at most, got 128"):
        identity(tiny_llama(head_dim=128))


def test_the_evaluation_compares_it(model: LlamaForCausalLM) -> None:
    assert methods()["identity"].family == "identity"


def test_runs_in_a_task(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu")
    document = " ".join(f"Chapter {number} has a thief." for number in range(60))
    task = fidelity.Fidelity(document=document, starts=(0,), context_length=200, continuation_length=40)
    outcome = task.run(loaded, methods()["identity"], "start=0")
    assert outcome.metrics["kl"] < 1e-6
    assert outcome.metrics["top1_agreement"] == 1
    assert outcome.footprint.stored_bytes >= outcome.footprint.dense_bytes


def test_names_and_kinds_belong_to_one_codec() -> None:
    registry.register(IdentityCodec)

    class SameName(IdentityCodec):
        name = "spectral"

    class SameKind(IdentityCodec):
        name = "other"

    with pytest.raises(InvalidArgumentError, match="name must be its own, 'spectral' is that of SpectralCodec"):
        registry.register(SameName)
    for kind, owner in (("coded", "SpectralBlock"), ("exact", "ExactBlock")):
        SameKind.block_types = (type("OtherBlock", (), {"kind": kind}),)
        with pytest.raises(InvalidArgumentError, match=f"kind must be its own, '{kind}' is that of {owner}"):
            registry.register(SameKind)
    assert {codec.name for codec in registry.codecs()} == {"rank", "spectral", "identity"}


@pytest.mark.parametrize("name", ["nonexistent", "spectral"])
def test_options_must_name_their_own_codec(model: LlamaForCausalLM, name: str) -> None:
    config = type("Lost", (IdentityConfig,), {"codec": name})()
    with pytest.raises(
        InvalidArgumentError,
        match=r"config must be a SpectralConfig, got Lost: .* or the options of a registered codec",
    ):
        SpectralCache(model, config=config)
