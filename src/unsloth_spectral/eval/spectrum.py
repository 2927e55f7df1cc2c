"""Singular values of a model's keys and values, to choose ranks by."""

from dataclasses import asdict, dataclass
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.tasks.asking import own_cache

EFFECTIVE_SHARE = 0.95
TOP = 16

_SUPPORTED = "supported are decoder-only transformers models with full-attention layers"
# Tolerance for shares: sums of float32 squares may fall short of a share that they equal exactly.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class SideSpectrum:
    """The keys or the values of one head, averaged over its blocks.

    Attributes:
        singular_values: descending, each the root of the mean square over the blocks.
        effective_rank: smallest rank that keeps 95 % of the variance; 0 where there is none.
        entropy: von Neumann entropy of the squared spectrum scaled to sum 1, in nats; the log of the rank where all
            directions weigh the same.
        top16_share: share of the variance in the first 16 directions.
    """

    singular_values: tuple[float, ...]
    effective_rank: int
    entropy: float
    top16_share: float

    @classmethod
    def of(cls, squares: Tensor) -> "SideSpectrum":
        """From the mean squared singular values ``[min(tokens, head_dim)]``, float64 and descending."""
        curve = _kept_by_rank(squares.tolist())
        weights = squares / squares.sum() if squares.sum() > 0 else squares
        return cls(
            singular_values=tuple(squares.sqrt().tolist()),
            effective_rank=_smallest_rank(curve, EFFECTIVE_SHARE),
            entropy=float(torch.special.entr(weights).sum()),
            top16_share=curve[min(TOP, len(curve) - 1)],
        )


@dataclass(frozen=True, slots=True)
class HeadSpectrum:
    """One key-value head of one layer; both indices count from 0, as the model does."""

    layer_idx: int
    head_idx: int
    keys: SideSpectrum
    values: SideSpectrum


@dataclass(frozen=True, slots=True)
class SpectrumReport:
    """The spectra of all full-attention layers on one document.

    Attributes:
        heads: by layer, then head.
        head_dim: of the keys; the largest, where layers differ.
        num_tokens: tokens of the document, sinks included.
        block_size: tokens factorized together: the option, or all tokens if they were fewer.
    """

    heads: tuple[HeadSpectrum, ...]
    head_dim: int
    num_tokens: int
    block_size: int

    def kept_variance(self, rank: int) -> tuple[float, float]:
        """Shares of the variance of keys and of values that ``rank`` keeps, means over all heads.

        Raises:
            InvalidArgumentError: ``rank`` is not an integer of at least 1.
        """
        _check_integer("rank", rank, 1)
        keys, values = self._mean_curves()
        return keys[min(rank, len(keys) - 1)], values[min(rank, len(values) - 1)]

    def rank_for(self, share: float) -> tuple[int, int]:
        """Smallest ranks of keys and of values that keep ``share`` of the variance in the mean over all heads.

        Raises:
            InvalidArgumentError: ``share`` is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"share must be above 0 and at most 1, got {share!r}: 0.95 stands for 95 %")
        keys, values = self._mean_curves()
        # At least 1, even for heads of zeros: the codec has no lower rank.
        return max(1, _smallest_rank(keys, share)), max(1, _smallest_rank(values, share))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def _mean_curves(self) -> tuple[list[float], list[float]]:
        keys = [_kept_by_rank([s * s for s in head.keys.singular_values]) for head in self.heads]
        values = [_kept_by_rank([s * s for s in head.values.singular_values]) for head in self.heads]
        return _mean(keys), _mean(values)


@torch.inference_mode()
def measure_spectrum(
    model: nn.Module,
    input_ids: Tensor,
    *,
    block_size: int = 512,
    num_sink_tokens: int = 4,
    on_progress: OnProgress | None = None,
) -> SpectrumReport:
    """Singular values of the keys and values that ``model`` caches for ``input_ids [1, n]``, by layer and head.

    Each block of ``block_size`` tokens after the sinks is factorized on its own, as in the rank codec: keys are
    rotated, nothing is centred. Squared spectra are averaged over the blocks, so the share that their first ``rank``
    entries keep is exactly the share that truncating every block keeps. An incomplete last block is left out, unless it
    is the only one. Layers that keep a window or a state instead of all tokens are left out.

    Args:
        model: a causal transformers model in evaluation mode.
        input_ids: token ids on the model's device.
        on_progress: called for each layer of the prefill, then for each layer factorized.

    Raises:
        InvalidArgumentError: an option is out of its range, ``input_ids`` is not one sequence of at least 2 tokens
            after the sinks, or the model's keys or values are not finite.
        UnsupportedModelError: the model fills no key-value cache, or no layer of it keeps all tokens.
    """
    _check_integer("block_size", block_size, 2)
    _check_integer("num_sink_tokens", num_sink_tokens, 0)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InvalidArgumentError(
            f"input_ids must be one sequence of shape (1, n), got {tuple(input_ids.shape)}: measure one at a time"
        )
    num_tokens = input_ids.shape[1]
    if num_tokens - num_sink_tokens < 2:
        raise InvalidArgumentError(
            f"at least 2 tokens must follow the {num_sink_tokens} sink tokens, got {num_tokens} in all: give a longer "
            "document or lower num_sink_tokens"
        )
    layers = _prefill(model, input_ids, on_progress)
    heads: list[HeadSpectrum] = []
    for done, (layer_idx, keys, values) in enumerate(layers):
        if on_progress is not None:
            on_progress("singular values", done, len(layers))
        sides = []
        for name, states in (("keys", keys), ("values", values)):
            if not bool(torch.isfinite(states).all()):
                raise InvalidArgumentError(
                    f"the {name} of a model must be finite, those of layer {layer_idx} of {type(model).__name__} hold "
                    f"NaN or infinity: load it in float32 or bfloat16 (here {states.dtype})"
                )
            squares = _mean_squares(states[0, :, num_sink_tokens:], block_size).cpu()
            sides.append([SideSpectrum.of(head) for head in squares])
        for head_idx, (key_side, value_side) in enumerate(zip(*sides, strict=True)):
            heads.append(HeadSpectrum(layer_idx, head_idx, key_side, value_side))
    if on_progress is not None:
        on_progress("singular values", len(layers), len(layers))
    return SpectrumReport(
        heads=tuple(heads),
        head_dim=max(keys.shape[-1] for _, keys, _ in layers),
        num_tokens=num_tokens,
        block_size=min(block_size, num_tokens - num_sink_tokens),
    )


def _prefill(model: nn.Module, input_ids: Tensor, on_progress: OnProgress | None) -> list[tuple[int, Tensor, Tensor]]:
    """Index, keys and values ``[1, num_key_value_heads, n, head_dim]`` of each layer that keeps all tokens."""
    with layers_reported(model, "prefill", on_progress):
        cache = own_cache(model, input_ids)
    layers = getattr(cache, "layers", None)
    name = type(model).__name__
    if not layers:
        raise UnsupportedModelError(f"{name} fills no key-value cache (call model.eval() first?); {_SUPPORTED}")
    full_layers = []
    for layer_idx, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        # A sliding layer keeps all tokens of a short document too, but never becomes spectral.
        if keys is None or values is None or getattr(layer, "is_sliding", False):
            continue
        if keys.ndim == values.ndim == 4 and keys.shape[-2] == values.shape[-2] == input_ids.shape[1]:
            full_layers.append((layer_idx, keys, values))
    if not full_layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise UnsupportedModelError(
            f"{name} has no layer whose cache keeps all {input_ids.shape[1]} tokens (its layers are {kinds}); "
            f"{_SUPPORTED}"
        )
    return full_layers


def _mean_squares(states: Tensor, block_size: int) -> Tensor:
    """Squared singular values of each block of ``states [heads, n, head_dim]``, averaged over the blocks.

    Returns ``[heads, min(block, head_dim)]`` in float64, descending. They are the eigenvalues of the Gram
    matrix: in float64, squaring float32 data loses no digit.
    """
    if states.device.type == "mps":  # mps has no float64
        states = states.cpu()
    size = min(block_size, states.shape[1])
    num_blocks = states.shape[1] // size
    blocks = states[:, : num_blocks * size].double().unflatten(1, (num_blocks, size))
    # Eigenvalues come ascending; rounding can make those of a rank-deficient block negative.
    squares = torch.linalg.eigvalsh(blocks.mT @ blocks).clamp_min(0).flip(-1)
    return squares[..., : min(size, states.shape[2])].mean(1)


def _kept_by_rank(squares: list[float]) -> list[float]:
    """Share of the variance kept at ranks 0, 1, ... up to the full rank; 1 where there is no variance."""
    total = sum(squares)
    return [energy / total if total > 0 else 1.0 for energy in accumulate(squares, initial=0.0)]


def _smallest_rank(curve: list[float], share: float) -> int:
    return next((rank for rank, kept_share in enumerate(curve) if kept_share >= share - _ROUNDING), len(curve) - 1)


def _mean(curves: list[list[float]]) -> list[float]:
    # At ranks beyond its dimensions, a smaller head keeps all variance.
    return [sum(column) / len(curves) for column in zip_longest(*curves, fillvalue=1.0)]


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")
