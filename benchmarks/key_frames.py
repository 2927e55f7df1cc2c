"""The rank codec on keys as the model caches them (rotated) and on un-rotated keys: KL and time of each frame.

The codec is the library's own in both frames. Keys are un-rotated by the model's own cos and sin before encoding,
and rotated again after rebuilding, which attention over them must do for every token.
"""

import torch
from harness import alternate, arguments, finish
from smollm2 import PREFIX, Slice, Subject, mean_fidelity
from torch import Tensor
from transformers import DynamicCache

from unsloth_spectral.attention import direct
from unsloth_spectral.attention.scores import ScoreOptions, group_heads, ungroup_heads
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import factors
from unsloth_spectral.codec.rank.block import RankBlock, seal
from unsloth_spectral.eval.agreement import Agreement

RANK_VALUES = 32
CONFIG = SpectralConfig(16, RANK_VALUES)
TILE_TOKENS = 1024
RANKS = {"rotated": (16, 18, 20, 24), "un-rotated": (16, 24)}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def cold_range() -> tuple[int, int]:
    """First and last sealed token of a prefill of PREFIX tokens."""
    start = CONFIG.num_sink_tokens
    blocks = (PREFIX - start - CONFIG.residual_length) // CONFIG.block_size
    return start, start + blocks * CONFIG.block_size


def through_codec(x: Tensor, rank: int) -> Tensor:
    """``[..., tokens, head_dim]`` with its cold blocks encoded and rebuilt; sinks and residual exact."""
    start, stop = cold_range()
    out = x.clone()
    blocks = x[..., start:stop, :].unflatten(-2, (-1, CONFIG.block_size))
    out[..., start:stop, :] = factors.encode(blocks, rank).reconstruct().flatten(-3, -2)
    return out


def evaluate(subject: Subject, text_slice: Slice, frame: str, rank_keys: int) -> Agreement:
    cos, sin = subject.rotation(PREFIX)
    if frame == "rotated":
        keys = through_codec(text_slice.keys, rank_keys)
    else:
        keys = rotate(through_codec(rotate(text_slice.keys, cos, -sin), rank_keys), cos, sin)
    values = through_codec(text_slice.values, RANK_VALUES)
    cache = DynamicCache(config=subject.model.config)
    for layer, layer_keys, layer_values in zip(cache.layers, keys, values, strict=True):
        layer.update(layer_keys, layer_values)  # type: ignore[union-attr]
    return subject.fidelity(text_slice, cache)


def attend_unrotated(query: Tensor, block: RankBlock, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention over keys kept un-rotated: rebuilt and rotated a tile at a time; the values stay in code space."""
    grouped, scores, start = group_heads(query, block.num_key_value_heads), [], 0
    for tile in block.tiles(TILE_TOKENS):
        assert isinstance(tile, RankBlock)
        window = slice(start, start + tile.num_tokens)
        keys = rotate(tile.keys.reconstruct().flatten(2, 3), cos[:, window], sin[:, window])
        scores.append(grouped @ keys.mT)
        start += tile.num_tokens
    weights = (torch.cat(scores, -1) * query.shape[-1] ** -0.5).softmax(-1)
    return ungroup_heads(block.combine(weights), query.shape[2])


def step_times(subject: Subject, text_slice: Slice, repeats: int) -> dict[str, float]:
    """Milliseconds for one query's attention over the cold tokens of every layer, both frames and dense."""
    start, stop = cold_range()
    cos, sin = subject.rotation(PREFIX)
    cos, sin = cos[:, start:stop], sin[:, start:stop]
    query = torch.randn(1, 9, 1, 64, generator=torch.Generator().manual_seed(0))
    dense = [
        (k[..., start:stop, :].contiguous(), v[..., start:stop, :].contiguous())
        for k, v in zip(text_slice.keys, text_slice.values, strict=True)
    ]
    rotated = [seal(k, v, CONFIG) for k, v in dense]
    unrotated = [seal(rotate(k, cos, -sin), v, CONFIG) for k, v in dense]
    options = ScoreOptions(64**-0.5)

    def run_rotated() -> None:
        for block in rotated:
            direct.attend(query, [block], None, options)

    def run_unrotated() -> None:
        for block in unrotated:
            attend_unrotated(query, block, cos, sin)

    def run_dense() -> None:
        for keys, values in dense:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    with torch.inference_mode():
        timings = alternate({"rotated": run_rotated, "un-rotated": run_unrotated, "dense": run_dense}, repeats)
    return {name: timing.median for name, timing in timings.items()}


def main() -> None:
    options = arguments("key_frames", __doc__ or "", repeats=15)
    subject = Subject()
    results: dict[tuple[str, int], list[Agreement]] = {}
    times: dict[str, float] = {}
    for text_slice in subject.slices():
        if not times:
            times = step_times(subject, text_slice, options.repeats)
        for frame, ranks in RANKS.items():
            for rank_keys in ranks:
                results.setdefault((frame, rank_keys), []).append(evaluate(subject, text_slice, frame, rank_keys))
    rows = []
    for (frame, rank_keys), fidelities in results.items():
        mean = mean_fidelity(fidelities)
        rows.append({"frame": frame, "rank_keys": rank_keys, "rank_values": RANK_VALUES, **mean})
        print(f"{frame:>10} {rank_keys}/{RANK_VALUES}: KL {mean['kl']:.4f}, top-1 {mean['top1_agreement']:.3f}")
    for name, milliseconds in times.items():
        print(f"attention over {cold_range()[1] - cold_range()[0]} tokens, 30 layers, {name}: {milliseconds:.1f} ms")
    finish(options.json, {"benchmark": "key_frames", "rows": rows, "attention_step_ms": times}, [])


if __name__ == "__main__":
    main()
