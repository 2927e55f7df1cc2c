"""A loaded cache goes on like the one that was saved, bit for bit; a file that does not fit is refused in one line."""

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lossless import padded_batch
from families.models import build, served
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError, LoadError, SpectralError
from unsloth_spectral.integrations.huggingface import cache as cache_module
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.layers import SpectralCacheLayer

Build = Callable[..., LlamaForCausalLM]
SMALL = {"block_size": 128, "residual_length": 16}
CONFIGS = {
    "small": SpectralConfig(**SMALL, preset="small"),
    "few bits, an error limit": SpectralConfig(**SMALL, bits_per_element=2, error_limit=0.2),
    "no sinks, no residual": SpectralConfig(block_size=128, residual_length=0, num_sink_tokens=0),
    "rank": SpectralConfig(8, 8, 64, 4, 16),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def token_ids(batch: int = 1, length: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: PreTrainedModel, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(ids, **cache_argument(cache), attention_mask=mask, use_cache=True).logits[:, -1]


def decode(model: PreTrainedModel, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after each of ``ids``, fed one by one."""
    steps = []
    for step in range(ids.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        steps.append(feed(model, ids[:, step : step + 1], cache, mask))
    return torch.stack(steps, 1)


def numbers(cache: SpectralCache) -> dict[str, Any]:
    """The statistics but for the time, which goes on elsewhere, and the room the tail has to grow."""
    plain = cache.stats().to_dict()
    for statistics in (plain, *plain["layers"]):
        for name in (
            "seal_seconds",
            "dense_bytes",
            "residual_bytes",
            "room_bytes",
            "stored_bytes",
            "bits_per_element",
            "compression_factor",
        ):
            statistics.pop(name, None)
    return plain


def check_goes_on(
    model: PreTrainedModel,
    cache: SpectralCache,
    path: Path,
    then: torch.Tensor,
    mask: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> None:
    """What is saved and loaded has the same bytes and gives the same logits after ``then``, to the last bit."""
    cache.save(path, ids)
    # A copy: what the one cache does is not to change the tables of dynamic RoPE for the other.
    twin = copy.deepcopy(model) if "dynamic" in str(model.config) else model
    loaded = SpectralCache.load(path, twin, ids)
    assert loaded.config == cache.config
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert numbers(loaded) == numbers(cache)
    assert loaded.stats().stored_bytes <= cache.stats().stored_bytes
    expected = decode(model, then, cache, mask)
    assert torch.equal(decode(twin, then, loaded, mask), expected)
    assert numbers(loaded) == numbers(cache)


@configs
@pytest.mark.parametrize("tokens", [(1, 1), (150, 3), (300, 1), (300, 250), (20, 200)], ids=str)
def test_goes_on_bit_for_bit(
    config: SpectralConfig, tokens: tuple[int, int], tiny_llama: Build, tmp_path: Path
) -> None:
    """Right after a prefill, with the tail partly full, after sealings while decoding, and with nothing sealed."""
    prefill, decoded = tokens
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=1000)
    cache = SpectralCache(model, config=config)
    feed(model, ids[:, :prefill], cache)
    decode(model, ids[:, prefill : prefill + decoded], cache)
    then = ids[:, prefill + decoded :][:, :150]
    check_goes_on(model, cache, tmp_path / "a.safetensors", then, ids=ids)
    assert max(layer.sealed_tokens for layer in cache.stats().layers) > 0


@pytest.mark.parametrize(("family"), served())
@pytest.mark.parametrize("config", [CONFIGS["small"], CONFIGS["rank"]], ids=["small", "rank"])
def test_every_family(family: str, config: SpectralConfig, tmp_path: Path) -> None:
    """Windows, states, shared keys and latents are saved too."""
    model, ids = build(family), token_ids(length=400)
    cache = SpectralCache(model, config=config)
    feed(model, ids[:, :180], cache)
    decode(model, ids[:, 180:200], cache)
    check_goes_on(model, cache, tmp_path / "a.safetensors", ids[:, 200:360])
    assert max(layer.sealed_tokens for layer in cache.stats().layers) >= 128


@configs
def test_left_padded_batches(config: SpectralConfig, tiny_llama: Build, tmp_path: Path) -> None:
    model, batch = tiny_llama(initializer_range=0.1), padded_batch(200)
    for prefilled in (200, 100):  # sealed with the padding; the padding still to be used
        ids, mask = batch["input_ids"][:, :prefilled], batch["attention_mask"][:, :prefilled]
        cache = SpectralCache(model, config=config)
        feed(model, ids, cache, mask)
        check_goes_on(model, cache, tmp_path / "a.safetensors", token_ids(3, 150), mask, ids)


@configs
def test_after_beams_crops_and_repeats(config: SpectralConfig, tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=400)
    cache = SpectralCache(model, config=config)
    feed(model, ids, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    check_goes_on(model, cache, tmp_path / "a.safetensors", token_ids(3, 150))
    cache.crop(-270)
    check_goes_on(model, cache, tmp_path / "a.safetensors", token_ids(3, 150, seed=1))


def test_with_a_profile(tiny_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is saved with the cache: where it is loaded there may be another, or none."""
    variances = tuple(2.0**-place for place in range(32))
    profile = ModelProfile((0.5, 0.001), ((0.02, 0.01), (0.01, 0.03)), (variances, variances))
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=800)
    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "profile_of", lambda *_: profile)
        cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], cache)
    widths = {layer.bits_values for layer in cache.stats().layers}
    assert len(widths) == 2, "the profile has no say"
    check_goes_on(model, cache, tmp_path / "a.safetensors", ids[:, 300:600])
    plain = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], plain)
    assert plain.stats().layers[0].bits_values != cache.stats().layers[0].bits_values


def test_exact_blocks_and_counts(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=500)
    model.model.layers[1].self_attn.v_proj.weight.data[0] = torch.inf  # no value of the second layer is finite
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], cache)
    assert cache.stats().layers[1].exact_blocks > 0
    cache.save(tmp_path / "a.safetensors")
    loaded = SpectralCache.load(tmp_path / "a.safetensors", model)
    assert numbers(loaded) == numbers(cache)
    assert torch.equal(
        torch.cat([part.flatten() for part in loaded.layers[1].spectral.reconstruct()]).nan_to_num(),
        torch.cat([part.flatten() for part in cache.layers[1].spectral.reconstruct()]).nan_to_num(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1).to(dtype), token_ids(length=700)
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], cache)
    check_goes_on(model, cache, tmp_path / "a.safetensors", ids[:, 300:450])


def test_what_was_one_tensor_is_one_again(tiny_llama: Build, tmp_path: Path) -> None:
    """The plan and the blocks share their basis, so that later blocks join; layers share what is known of positions."""
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=300)
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids, cache)
    cache.save(tmp_path / "a.safetensors")
    loaded = SpectralCache.load(tmp_path / "a.safetensors", model)
    for layer in loaded.layers:
        block, codec = layer.spectral.blocks[1], layer.spectral._codec
        assert codec._plan.vectors is block.keys.vectors
        assert codec._mean is block.keys.mean
        assert codec._largest is block.values.largest
    first, second = (layer.spectral.blocks[1].keys.rotation for layer in loaded.layers)
    assert first.step is second.step
    feed(model, token_ids(length=200, seed=1), loaded)
    assert all(len(layer.spectral.blocks) == 3 for layer in loaded.layers), "later blocks join the prefill's"


def test_two_caches_of_one_file_share_nothing_that_changes(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=300)
    path = tmp_path / "a.safetensors"
    for config in (CONFIGS["small"], SpectralConfig(residual_length=400)):
        cache = SpectralCache(model, config=config)
        feed(model, ids, cache)
        cache.save(path)
        before = path.read_bytes()
        first, second = (SpectralCache.load(path, model) for _ in range(2))
        then = token_ids(length=150, seed=1)
        expected = decode(model, then, first)
        assert torch.equal(decode(model, then, second), expected)
        assert path.read_bytes() == before


def test_the_file_may_be_replaced_or_deleted_while_it_is_in_use(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids, path = tiny_llama(initializer_range=0.1), token_ids(length=300), tmp_path / "a.safetensors"
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids, cache)
    cache.save(path)
    loaded = SpectralCache.load(path, model)
    other = SpectralCache(model, config=CONFIGS["small"])
    feed(model, token_ids(length=310, seed=5), other)
    other.save(path)
    then = token_ids(length=150, seed=1)
    expected = decode(model, then, copy.deepcopy(cache))
    assert torch.equal(decode(model, then, loaded), expected)
    loaded = SpectralCache.load(path, model)
    path.unlink()
    assert torch.equal(decode(model, then, loaded), decode(model, then, other))


def test_generate_goes_on_from_a_loaded_cache(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=340)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 160, "do_sample": False}
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], cache)
    cache.save(tmp_path / "a.safetensors", ids)
    written = model.generate(ids, **cache_argument(cache), **options)
    loaded = SpectralCache.load(tmp_path / "a.safetensors", model, ids)
    assert torch.equal(model.generate(ids, **cache_argument(loaded), **options), written)
    # What generate gives back has one token more than the cache.
    cache.save(tmp_path / "a.safetensors", written)
    assert SpectralCache.load(tmp_path / "a.safetensors", model, written).get_seq_length() == written.shape[1] - 1


def test_in_inference_mode(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids(length=600)
    with torch.inference_mode():
        cache = SpectralCache(model, config=CONFIGS["small"])
        feed(model, ids[:, :300], cache)
        check_goes_on(model, cache, tmp_path / "a.safetensors", ids[:, 300:450])


def test_stored_bytes_are_the_file(tiny_llama: Build, tmp_path: Path) -> None:
    """What ``stats`` counts of a loaded cache is what its tensors take: not the whole file for each."""
    model, path = tiny_llama(initializer_range=0.1, head_dim=64), tmp_path / "a.safetensors"
    cache = SpectralCache(model)
    feed(model, token_ids(length=3000), cache)
    cache.save(path)
    stored = SpectralCache.load(path, model).stats().stored_bytes
    assert 0.9 * path.stat().st_size < stored + 25_000 < 1.2 * path.stat().st_size


# Refusals


@pytest.fixture
def saved(tiny_llama: Build, tmp_path: Path) -> Path:
    model = tiny_llama(initializer_range=0.1)
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, token_ids(), cache)
    cache.save(tmp_path / "a.safetensors", token_ids())
    return tmp_path / "a.safetensors"


def refusal(path: Path, model: Any, input_ids: torch.Tensor | None = None) -> str:
    with pytest.raises(LoadError) as caught:
        SpectralCache.load(path, model, input_ids)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def numbers_of(fields: Any, name: str) -> list[int]:
    """The numbers of the tensors that ``fields`` of a record have under ``name``, at any depth."""
    if isinstance(fields, list):
        return [number for part in fields for number in numbers_of(part, name)]
    if not isinstance(fields, dict):
        return []
    own = [fields[name]["$tensor"]] if isinstance(fields.get(name), dict) else []
    return own + [number for part in fields.values() for number in numbers_of(part, name)]


def test_a_damaged_byte_that_streams_go_on_from_is_refused(saved: Path, tiny_llama: Build) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors, found = load_file(saved), numbers_of(json.loads(metadata["record"])["fields"], "carries")
    assert found
    for number in found:
        damaged = tensors[str(number)].clone()
        damaged.view(-1)[-1] ^= 1
        save_file({**tensors, str(number): damaged}, saved, metadata)
        assert f"the checksum of tensor {number} differs" in refusal(saved, tiny_llama(initializer_range=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 there and 3 here"),
        ({"vocab_size": 130}, "vocab_size is 128 there and 130 here"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
         "rope_parameters.rope_theta is 10000.0 there and 500000.0 here"),
        ({"rms_norm_eps": 1e-5, "attention_bias": True}, "attention_bias is False there and True here (and 1 more)"),
        ({"seed": 1}, "its token embedding differs"),
    ],
)  # fmt: skip
def test_another_model(saved: Path, options: dict[str, Any], message: str, tiny_llama: Build) -> None:
    assert message in refusal(saved, tiny_llama(**{"initializer_range": 0.1, **options}))


def test_other_weights(saved: Path, tiny_llama: Build) -> None:
    def changed(name: str) -> str:
        model = tiny_llama(initializer_range=0.1)
        model.get_parameter(name).data[0, 0] += 1.0
        return refusal(saved, model)

    assert "key projection among them, differ" in changed("model.layers.0.self_attn.k_proj.weight")
    assert "its token embedding differs" in changed("model.embed_tokens.weight")
    assert "a sample of all its weights differs" in changed("model.layers.1.mlp.down_proj.weight")


def test_another_dtype(saved: Path, tiny_llama: Build) -> None:
    assert "dtype is float32 there and bfloat16 here" in refusal(saved, tiny_llama(initializer_range=0.1).bfloat16())


def test_what_changes_no_key_is_no_difference(saved: Path, tiny_llama: Build) -> None:
    model = tiny_llama(initializer_range=0.1)
    model.config._name_or_path, model.config.pad_token_id, model.config.use_cache = "elsewhere", 5, False
    assert SpectralCache.load(saved, model).get_seq_length() == 300


def test_weights_changed_since_the_last_look_are_seen(saved: Path, tiny_llama: Build) -> None:
    model = tiny_llama(initializer_range=0.1)
    SpectralCache.load(saved, model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert "key projection" in refusal(saved, model)


def test_an_adapter_makes_another_model(saved: Path, tiny_llama: Build) -> None:
    """Adapters of other projections than the first layer's are in the sample."""
    model = tiny_llama(initializer_range=0.1)
    projection = model.model.layers[1].self_attn.q_proj
    projection.lora_A = torch.nn.Linear(64, 2, bias=False)
    assert "a sample of all its weights differs" in refusal(saved, model)


def test_tokens(saved: Path, tiny_llama: Build) -> None:
    model, ids = tiny_llama(initializer_range=0.1), token_ids()
    longer = torch.cat([ids, ids], -1)
    assert SpectralCache.load(saved, model, longer).get_seq_length() == 300
    other = longer.clone()
    other[0, 299] = 1
    assert "must have the same first 300 tokens as input_ids, but they differ" in refusal(saved, model, other)
    assert "has 1 rows of 300" in refusal(saved, model, ids[:, :299])
    assert "has 1 rows of 300" in refusal(saved, model, ids.repeat(2, 1))
    cache = SpectralCache.load(saved, model)
    cache.save(saved)
    assert "must have a token hash" in refusal(saved, model, ids)


def test_saving_is_refused(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.1)
    cache = SpectralCache(model)
    with pytest.raises(InvalidArgumentError, match="an empty cache has nothing to save"):
        cache.save(tmp_path / "a.safetensors")
    feed(model, token_ids(), cache)
    with pytest.raises(InvalidArgumentError, match=r"must end in \.safetensors"):
        cache.save(tmp_path / "a.bin")
    with pytest.raises(InvalidArgumentError, match="does not exist"):
        cache.save(tmp_path / "missing" / "a.safetensors")
    for few in (token_ids(length=299), token_ids(2), token_ids()[0]):
        with pytest.raises(InvalidArgumentError, match="input_ids must be the 1 rows of at least 300 tokens"):
            cache.save(tmp_path / "a.safetensors", few)
    del model
    gc.collect()
    with pytest.raises(SpectralError, match="the model of this cache is gone"):
        cache.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_pickling_names_what_does_it(tiny_llama: Build) -> None:
    model = tiny_llama(initializer_range=0.1)
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, token_ids(), cache)
    for write in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        for wanted in (cache, [copy.copy(cache)], {"cache": copy.deepcopy(cache)}):
            with pytest.raises(SpectralError, match=r"write it with cache\.save\(path\)") as caught:
                write(wanted)
            assert "\n" not in str(caught.value)
    for copied in (copy.copy(cache), copy.deepcopy(cache)):
        assert copied._model() is model
    del model
    gc.collect()
    assert cache._model() is None, "a cache keeps no model alive"


def test_what_has_no_stored_form_is_refused(tmp_path: Path) -> None:
    model = build("Gemma 3")
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, token_ids(), cache)
    windowed = next(layer for layer in cache.layers if not isinstance(layer, SpectralCacheLayer))
    windowed.extra = DynamicCache()
    message = f"its {type(windowed).__name__} keeps 'extra' as DynamicCache, which has no stored form"
    with pytest.raises(SpectralError, match=message):
        cache.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_pass_is_taken_back_before_saving(tiny_llama: Build, tmp_path: Path) -> None:
    model, ids, path = tiny_llama(initializer_range=0.1), token_ids(length=301), tmp_path / "a.safetensors"
    cache = SpectralCache(model, config=CONFIGS["small"])
    feed(model, ids[:, :300], cache)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        feed(model, ids[:, 300:], cache)
    handle.remove()
    cache.save(path)
    assert SpectralCache.load(path, model).get_seq_length() == 300
