"""Weights of every kind identify a model; a model that they cannot identify still generates."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import LlamaForCausalLM

from unsloth_spectral import PrefixStore, SpectralCache, SpectralConfig
from unsloth_spectral.cli import profile as profile_command
from unsloth_spectral.errors import LoadError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache import _devices
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.fingerprint import fingerprint, profile_of, profile_path
from unsloth_spectral.integrations.huggingface.identity import identify
from unsloth_spectral.integrations.huggingface.weights import plain_tensors, sample, stored_tensors, version

CONFIG = SpectralConfig(block_size=128, residual_length=16, preset="small")
Build = Callable[..., LlamaForCausalLM]


@pytest.fixture(autouse=True)
def _cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))


# Tensor subclasses as libraries of quantizers have them.


class Opaque(Tensor):
    """A wrapper for which torch can do nothing: it has no memory, and every operator raises."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Opaque":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # for nn.Parameter
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(str(func))

    def values(self) -> Tensor:  # type: ignore[override]
        return self.codes.to(self.scale.dtype) * self.scale


class TakenApart(Opaque):
    """A wrapper that says what it consists of, as torchao's do, and DTensor with its mesh."""

    mesh = object()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale", "mesh"], None


class Dequantizable(Opaque):
    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.values()


class Covered(Tensor):
    """Memory of its own, but every function of torch raises."""

    @staticmethod
    def __new__(cls, data: Tensor) -> "Covered":
        return Tensor._make_subclass(cls, data)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


class Undispatched(Covered):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale in eight bits."""
    scale = weight.detach().abs().max() / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


# Linear layers as libraries of quantizers have them.


class Quantized(nn.Module):
    """A linear layer that rebuilds its weight at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values().to(x.dtype))

    def values(self) -> Tensor:
        raise NotImplementedError

    def change(self) -> None:
        """Change some weights in place."""
        raise NotImplementedError


class Float8(Quantized):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.detach().abs().max() / 448
        self.weight = nn.Parameter((weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def values(self) -> Tensor:
        return self.weight.float() * self.weight_scale_inv

    def change(self) -> None:
        self.weight[0] = 1.0


class Packed(Quantized):
    """Four codes in an int32 buffer and no parameter at all, as GPTQ and AWQ layers have them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = rounded(weight)
        self.register_buffer("qweight", codes.view(torch.int32))
        self.register_buffer("scales", scale)

    def values(self) -> Tensor:
        return self.qweight.view(torch.int8) * self.scales

    def change(self) -> None:
        self.qweight[0] = 0


class Halves(nn.Parameter):
    """Two codes a byte, in a parameter of another shape than the weight's, as bitsandbytes has them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class FourBits(Quantized):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.scale = weight.shape, weight.detach().abs().max() / 7
        codes = (weight.detach() / self.scale).round().to(torch.int16).reshape(-1, 2) + 8
        self.weight = Halves((codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8), requires_grad=False)

    def values(self) -> Tensor:
        both = torch.cat([self.weight.data // 16, self.weight.data % 16], 1)
        return (both.reshape(self.shape).float() - 8) * self.scale

    def change(self) -> None:
        self.weight[:8] = 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # bitsandbytes gives others once a CPU has computed with it.
        destination[prefix + "weight.absmax"] = torch.rand(1)


class Complex(Quantized):
    """Two halves of a weight in one complex parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.complex(*weight.detach().chunk(2)), requires_grad=False)

    def values(self) -> Tensor:
        return torch.cat([self.weight.real, self.weight.imag])

    def change(self) -> None:
        self.weight[0] *= -1


class Wrapped(Quantized):
    def __init__(self, weight: Tensor, kind: type[Opaque] = TakenApart) -> None:
        super().__init__()
        self.weight = nn.Parameter(kind(*rounded(weight)), requires_grad=False)

    def values(self) -> Tensor:
        return self.weight.values()

    def change(self) -> None:
        self.weight.codes[0] = 0


class Rebuilt(Wrapped):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, Dequantizable)


class Closed(Wrapped):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, Opaque)


def quantized(model: LlamaForCausalLM, kind: type[Quantized]) -> LlamaForCausalLM:
    """``model``, its linear layers replaced by ones of ``kind``."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, kind(child.weight))
    model.generation_config.eos_token_id = None
    return model


def token_ids(length: int = 300) -> Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))


def generated(model: LlamaForCausalLM, cache: SpectralCache) -> Tensor:
    return model.generate(token_ids(), **cache_argument(cache), max_new_tokens=4, do_sample=False)


KINDS = pytest.mark.parametrize("kind", [Float8, Packed, FourBits, Complex, Wrapped, Rebuilt])


@KINDS
def test_a_quantized_model_generates_saves_and_is_known_again(
    kind: type[Quantized], tiny_llama: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unsloth_spectral")
    model, again = (quantized(tiny_llama(), kind) for _ in range(2))
    assert fingerprint(model) == fingerprint(again)
    assert fingerprint(model) != fingerprint(quantized(tiny_llama(seed=1), kind))
    cache = SpectralCache(model, config=CONFIG)
    written = generated(model, cache)
    assert cache.stats().layers[0].sealed_tokens == 256
    cache.save(tmp_path / "a.safetensors", written)
    for same in (model, again):
        assert SpectralCache.load(tmp_path / "a.safetensors", same, written).get_seq_length() == 303
    assert caplog.messages == []


@KINDS
@pytest.mark.parametrize("place", ["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"])
def test_changed_weights_are_seen(kind: type[Quantized], place: str, tiny_llama: Build, tmp_path: Path) -> None:
    model = quantized(tiny_llama(), kind)
    cache = SpectralCache(model, config=CONFIG)
    written = generated(model, cache)
    cache.save(tmp_path / "a.safetensors", written)
    with torch.no_grad():
        model.model.get_submodule(place).change()
    with pytest.raises(LoadError, match="differ"):
        SpectralCache.load(tmp_path / "a.safetensors", model, written)


def test_weights_that_cannot_be_read_cost_one_warning(
    tiny_llama: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unsloth_spectral")
    model = quantized(tiny_llama(), Closed)
    assert fingerprint(model) == fingerprint(quantized(tiny_llama(), Closed)), "its embedding can be read"
    embedding = nn.Module()
    embedding.forward = model.model.embed_tokens.forward  # type: ignore[method-assign]
    embedding.weight = nn.Parameter(Opaque(*rounded(model.model.embed_tokens.weight)), requires_grad=False)
    model = quantized(tiny_llama(), Closed)
    model.model.embed_tokens = embedding
    for _ in range(2):
        cache = SpectralCache(model, config=CONFIG)
        assert generated(model, cache).shape == (1, 304)
    assert cache.stats().layers[0].sealed_tokens == 256
    assert caplog.messages == [
        "LlamaForCausalLM cannot be recognised, so it has no profile: it has weights of Opaque, whose data cannot be "
        "read (RuntimeError), load it in another format"
    ]
    with pytest.raises(UnsupportedModelError, match="has no profile"):
        profile_path(model)
    message = "LlamaForCausalLM cannot be recognised, so nothing can be saved for it: it has weights of Opaque"
    for attempt in (
        lambda: cache.save(tmp_path / "a.safetensors"),
        lambda: PrefixStore(tmp_path / "store").prefill(model, token_ids(), config=CONFIG),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_offloaded_weights_have_no_profile(tiny_llama: Build, caplog: pytest.LogCaptureFixture) -> None:
    """The same sizes alone do not make it the same model."""
    caplog.set_level(logging.WARNING, "unsloth_spectral")
    model = tiny_llama().to("meta")
    assert profile_of(model, 2) is None
    assert profile_of(model, 2) is None
    assert len(caplog.messages) == 1
    assert "offloaded, load it whole" in caplog.messages[0]
    with pytest.raises(UnsupportedModelError, match="nothing can be saved for it: it has weights that are offloaded"):
        identify(model)


def test_the_profile_command_refuses_before_it_measures(tiny_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("measured for nothing")

    monkeypatch.setattr("unsloth_spectral.eval.profile.measure_profile", measure)
    monkeypatch.setattr(profile_command, "load", lambda *_: SimpleNamespace(model=tiny_llama().to("meta")))
    with pytest.raises(UnsupportedModelError, match="has no profile"):
        profile_command.command()


def test_fingerprints_of_plain_models_stay(tiny_llama: Build) -> None:
    """Profiles on users' disks are named by them."""
    weights = torch.arange(-64, 64).float()
    model = tiny_llama()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = (
            weights.roll(number).repeat(parameter.numel() // 128 + 1)[: parameter.numel()].view_as(parameter)
        )
    assert fingerprint(model) == "9ab5d4f16458c5ad"
    assert fingerprint(model.half()) == "9ab5d4f16458c5ad"


@pytest.mark.parametrize("kind", [Covered, Undispatched])
def test_a_subclass_that_answers_nothing_is_read_from_its_memory(kind: type[Covered]) -> None:
    data = torch.randn(4, 6)
    covered = kind(data)
    assert torch.equal(plain_tensors(covered)[0], data)
    before = version(covered)
    assert version(covered) == before
    data.add_(1.0)
    assert torch.equal(plain_tensors(covered)[0], data)


DTYPES = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int4", "uint16", "complex64"]


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_can_be_sampled(dtype: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight = data.view(getattr(torch, dtype))
    (part,) = plain_tensors(weight)
    assert torch.equal(part.contiguous().view(torch.uint8).flatten(), data.flatten())
    assert (sample(part, 64) > 0).shape == (64,)


def test_float8_keeps_its_signs() -> None:
    values = torch.tensor([-3.0, -0.5, 0.0, 0.25, 400.0])
    assert torch.equal(plain_tensors(values.to(torch.float8_e4m3fn))[0] > 0, values > 0)


@pytest.mark.filterwarnings("ignore:.*(beta state|deprecated)")
def test_sparse_and_torch_quantized_tensors() -> None:
    dense = torch.eye(6)
    for weight in (dense.to_sparse(), dense.to_sparse_csr(), torch.quantize_per_tensor(dense, 0.5, 0, torch.qint8)):
        assert torch.equal(plain_tensors(weight)[0], dense)
        assert version(weight) != version(weight), "a converted copy tells nothing of later changes"


def test_a_tied_weight_is_taken_once(tiny_llama: Build) -> None:
    names = [name for name, _ in stored_tensors(tiny_llama(tie_word_embeddings=True))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_layers_without_parameters_tell_their_device(tiny_llama: Build) -> None:
    model = quantized(tiny_llama(), Packed)
    with FakeTensorMode():  # knows devices that are not there
        for child in model.model.layers[1].self_attn.children():
            child.qweight = torch.empty(8, 8, device="cuda:1")
    assert _devices(model) == {0: torch.device("cpu"), 1: torch.device("cuda:1")}
