"""Correlation of attention output with the dense cache at ranks 16 and 32: random data, and SmolLM2's own."""

from typing import Any

import torch
from harness import Target, arguments, finish
from smollm2 import PREFIX, Subject
from torch import Tensor

from unsloth_spectral.attention import direct, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig


def correlation(query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Pearson correlation of the attention outputs over a spectral layer and over the same tokens dense."""
    layer = SpectralLayer(SpectralConfig(rank_keys=16, rank_values=32))
    layer.append(keys.clone(), values.clone())
    layer.seal()
    options = ScoreOptions(keys.shape[-1] ** -0.5)
    dense = naive.attend(query, [ExactBlock(keys, values)], None, options)
    spectral = direct.attend(query, layer.blocks, None, options)
    return float(torch.corrcoef(torch.stack([dense.flatten(), spectral.flatten()]))[0, 1])


def real_queries(subject: Subject, input_ids: Tensor) -> list[Tensor]:
    """Rotated queries ``[1, heads, count, head_dim]`` of each layer for the newest tokens."""
    queries: list[Tensor] = []
    cos, sin = subject.rotation(input_ids.shape[1])
    count = 64

    def keep(module: Any, _: object, kwargs: dict[str, Tensor]) -> None:
        states = kwargs["hidden_states"][:, -count:]
        query = module.q_proj(states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        first, second = query.chunk(2, dim=-1)
        queries.append(query * cos[:, -count:] + torch.cat([-second, first], -1) * sin[:, -count:])

    hooks = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in subject.model.model.layers]
    subject.prefill(input_ids)
    for hook in hooks:
        hook.remove()
    return queries


def main() -> None:
    options = arguments("attention_fidelity", __doc__ or "", repeats=1)
    generator = torch.Generator().manual_seed(0)
    # Random keys and values with a smooth spectrum, as in the measurement of the original system, and white noise,
    # which has no spectrum to cut.
    random = {}
    for name, decay in (("white noise", 0.0), ("spectrum j^-0.8", 0.8)):
        scale = torch.arange(1, 65).float() ** -decay
        mixing = torch.linalg.qr(torch.randn(3, 64, 64, generator=generator)).Q
        keys, values = (torch.randn(1, 3, PREFIX, 64, generator=generator) * scale @ mixing for _ in range(2))
        query = torch.randn(1, 9, 64, 64, generator=generator)
        random[name] = correlation(query, keys / keys.std(), values / values.std())
        print(f"random data, {name}: correlation {random[name]:.4f}")
    subject = Subject()
    text_slice = next(subject.slices())
    queries = real_queries(subject, text_slice.input_ids[:, :PREFIX])
    with torch.inference_mode():
        layers = [
            correlation(query, keys, values)
            for query, keys, values in zip(queries, text_slice.keys, text_slice.values, strict=True)
        ]
    mean = sum(layers) / len(layers)
    print(f"SmolLM2: mean {mean:.4f}, lowest {min(layers):.4f} (layer {layers.index(min(layers))})")
    targets = [
        Target("correlation on random data, spectrum j^-0.8", 0.84, random["spectrum j^-0.8"], at_least=True),
        Target("correlation on random data, white noise", 0.84, random["white noise"], at_least=True),
        Target("correlation on SmolLM2, mean over layers", 0.97, mean, at_least=True),
    ]
    finish(options.json, {"benchmark": "attention_fidelity", "random": random, "layers": layers}, targets)


if __name__ == "__main__":
    main()
