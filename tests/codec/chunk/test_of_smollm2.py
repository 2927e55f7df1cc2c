"""Chunks of a real model's keys, in bases that are measured here."""

import pytest
import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Planes
from unsloth_spectral.codec.chunk.record import Reader
from unsloth_spectral.codec.chunk.rotations import steps_of
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.eval.model_bases import measure_bases
from unsloth_spectral.integrations.models import LoadedModel

THETA, TOKENS, COUNT = 100_000.0, 256, 4


@pytest.fixture(scope="module")
def ids(smollm2: LoadedModel) -> Tensor:
    return tokens_of(default_document(), smollm2.tokenizer, 8_000)


@pytest.fixture(scope="module")
def profile(smollm2: LoadedModel, ids: Tensor) -> ModelProfile:
    shared = measure_bases(smollm2, [ids[:, start : start + 512] for start in (0, 2_000)])
    heads = shared.bases[0].shape[0]
    return ModelProfile(
        value_sensitivities=(0.01,) * len(shared.bases),
        key_sensitivities=((0.01,) * heads,) * len(shared.bases),
        key_variances=tuple(tuple(basis.variances.flatten().tolist()) for basis in shared.bases),
        bases=shared.bases,
        key_means=tuple(tuple(means.flatten().tolist()) for means in shared.means),
        rope_steps=shared.rope_steps,
    )


@pytest.fixture(scope="module")
def chunks(smollm2: LoadedModel, ids: Tensor) -> list[Tensor]:
    """The chunks of a prefix of another part of the document."""
    with torch.inference_mode():
        cache = smollm2.model(input_ids=ids[:, 6_000 : 6_000 + COUNT * TOKENS], use_cache=True).past_key_values
    keys, values = (torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
    both = torch.stack([keys, values]).transpose(2, 3).flatten(3)
    return [chunk.contiguous() for chunk in both.split(TOKENS, 2)]


def test_the_steps_of_the_rotary_embedding_are_measured(profile: ModelProfile) -> None:
    assert profile.rope_steps == pytest.approx(steps_of(64, THETA), rel=1e-6)


def test_places_are_found_in_the_middle_of_a_text(profile: ModelProfile, chunks: list[Tensor]) -> None:
    codec = ChunkCodec(2.5, Planes(64), None, profile)
    numbers = [int(Reader(codec.encode(chunk)).take(torch.int32, 1)) for chunk in chunks]
    assert numbers == list(range(COUNT))


def test_the_first_token_of_the_text_is_exact(profile: ModelProfile, chunks: list[Tensor]) -> None:
    codec = ChunkCodec(2.5, Planes(64), THETA, profile)
    for number, chunk in enumerate(chunks):
        back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
        assert torch.equal(back[:, :, 0], chunk[:, :, 0]) == (number == 0)
