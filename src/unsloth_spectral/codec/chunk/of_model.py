"""Chunks in the model's bases: a record holds neither vectors nor their scales.

With a profile of the model,

- the place of a chunk in its text is found from the mean of its keys (see ``place``): chunks stand at multiples of
  their own number of tokens. So keys are un-rotated by the anchors that the model's bases were measured with. A wrong
  place costs fidelity and nothing else, since the record holds it;
- the metric is that of the model's queries, and one water level serves the keys and values of all layers, by what
  their errors cost the model;
- only the first chunk of a text has an exact token;
- all layers are coded at once, components and values of one width together.

A record holds, behind its header: the chunk's number; the widths of all keys' components, ordered by layer, head and
row of the basis, and of each layer's values; the means, as bytes relative to the model's; the largest scale of each
head's keys; the exact token; for each width the values of its layers; for each width scales, carries and streams of its
keys' components.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.filling import Costs, widths_within
from unsloth_spectral.codec.chunk.layout import ChunkLayout
from unsloth_spectral.codec.chunk.place import number_of_chunk
from unsloth_spectral.codec.chunk.record import (
    HEADER_BYTES,
    MODEL_BASIS,
    Reader,
    bytes_of,
    narrowed,
    pack_nibbles,
    parts_of,
)
from unsloth_spectral.codec.chunk.rotations import rotation_at, steps_of
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral import kernel, trellis
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.keys import CLIPS, STEPS_PER_OCTAVE
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, ROW_BYTES, num_tiles, unpack
from unsloth_spectral.codec.spectral.scales import decode_scales, encode_scales, unbiased_scales
from unsloth_spectral.codec.spectral.statistics import centre
from unsloth_spectral.codec.spectral.values import ValueCodes, value_sizes
from unsloth_spectral.codec.tensors import rounded_rows
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.rope import Rotation, anchors_of, rotate, spans_of, unrotated_sum

# Rows of less variance than this share of their head's largest have scales as if they had it.
_LEAST_SHARE = 1e-6
# Numbers that are un-rotated and multiplied at a time: 1 MB in float32.
_MOST_NUMBERS = 1 << 18


class _Model(NamedTuple):
    """What the profile says of all layers, ``L`` of ``H`` heads of ``D`` dimensions.

    Attributes:
        rows: ``[L, H, D, D]`` float32, the bases.
        inverses: ``[L, H, D, D]`` float32, by which keys become coefficients.
        deviations: ``[L, H, D]`` float32, standard deviations that are expected of the coefficients.
        means: ``[L, H, D]`` float32, of un-rotated keys.
        sensitivities: ``[L, H, 1]`` float32, of the keys, in nats.
        digest: of the profile.
    """

    rows: Tensor
    inverses: Tensor
    deviations: Tensor
    means: Tensor
    sensitivities: Tensor
    digest: str


@dataclass(frozen=True, slots=True)
class OfModel:
    """Codes chunks in the bases of ``profile``; the other attributes as in ``ChunkCodec``.

    The profile's steps of the rotary embedding, which may be scaled, come before those of ``rope_theta``.

    Raises:
        InvalidArgumentError: the profile has no bases, or layers of different heads.
    """

    layout: ChunkLayout
    rope_theta: float | None
    profile: ModelProfile
    _model: _Model = field(init=False, repr=False, compare=False)

    magic: ClassVar[bytes] = MODEL_BASIS

    def __post_init__(self) -> None:
        object.__setattr__(self, "_model", _model_of(self.profile))

    @property
    def agreed(self) -> tuple[str, ...]:
        """The profile, by its digest."""
        return (f"profile {self._model.digest}",)

    def obstacle(self, shape: Sequence[int]) -> str | None:
        """Why chunks of this shape, which has the layout, cannot be coded; None if they can."""
        if self.layout.value_dim != self.layout.key_dim:
            return "with a profile values must have the size of keys: leave profile out for multi-head latent attention"
        sizes = (shape[-3], self.layout.num_heads(shape), self.layout.key_dim)
        expected = tuple(self._model.means.shape)
        if sizes == expected:
            return None
        return (
            "the profile is of {} layers of {} heads of {}".format(*expected)
            + ", and chunks have {} of {} of {}".format(*sizes)
            + ": measure one of this model, or leave profile out"
        )

    def least_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that a record takes before any key is coded."""
        return HEADER_BYTES + self._fixed_bytes(shape, dtype, has_exact=True)

    def encode(self, keys: Tensor, values: Tensor, shape: Sequence[int], nbytes: int) -> tuple[list[Tensor], int]:
        """What follows the header, at most ``nbytes`` with it, and the header's number: that of exact tokens."""
        model = self._model
        number, has_exact, mean = self._place(keys)
        mean_codes, mean_scales = rounded_rows(mean - model.means)
        coefficients = self._coefficients(keys, model.means + mean_codes * mean_scales, number)
        if has_exact:
            coefficients[..., 0] = 0.0
        costs = self._costs(shape)
        lengths = torch.linalg.vector_norm(coefficients, dim=-1)
        variances = lengths.square() / coefficients.shape[-1] * model.sensitivities
        rest = nbytes - HEADER_BYTES - self._fixed_bytes(shape, keys.dtype, has_exact)
        widths, value_widths = widths_within(rest, variances, self.profile.value_sensitivities, costs)
        tops, coded_keys = self._encode_keys(coefficients, widths)
        first = torch.tensor([number], dtype=torch.int32, device="cpu")
        by_layer = torch.tensor(value_widths, dtype=torch.uint8, device="cpu")
        fields = [first, pack_nibbles(widths.to(torch.uint8)), by_layer, mean_codes, mean_scales, tops]
        if has_exact:
            fields += [keys[:, :, 0], values[:, :, 0]]
        for nbits, layers in _by_width(value_widths).items():
            fields += parts_of(value_codec.encode(values[layers], nbits))
        return [bytes_of(tensor) for tensor in (*fields, *coded_keys)], int(has_exact)

    def decode(self, reader: Reader, number: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values that ``encode`` was given."""
        size, num_tokens = tuple(self._model.means.shape), shape[-2]
        before = int(reader.take(torch.int32, 1))
        widths = reader.nibbles(*size)
        value_widths = reader.take(torch.uint8, size[0]).tolist()
        if not 1 <= min(value_widths) <= max(value_widths) <= MAX_NBITS or number > 1:
            raise LoadError(f"a record has values of {value_widths} bits and {number} exact tokens")
        mean = self._model.means + reader.take(torch.int8, *size) * reader.take(torch.float32, *size[:2], 1)
        tops = reader.take(torch.float32, *size[:2])
        exact = [reader.take(dtype, *size) for _ in range(2 * number)]
        values = torch.empty(*size[:2], num_tokens, size[2], dtype=dtype, device="cpu")
        for nbits, layers in _by_width(value_widths).items():
            sizes = value_sizes(len(layers), size[1], size[2], nbits, num_tokens)
            tensors = reader.tensors(ValueCodes, {**sizes, "padded_tokens": num_tokens})
            error = torch.zeros(1, size[1], dtype=torch.float16, device="cpu")
            codes = ValueCodes(**tensors, relative_error=error, head_dim=size[2], nbits=nbits, num_tokens=num_tokens)
            values[layers] = narrowed(codes.reconstruct(), dtype)
        coefficients = self._decode_keys(reader, widths, tops, num_tokens)
        keys = self._keys(coefficients, mean, before, dtype)
        if number:
            keys[:, :, 0], values[:, :, 0] = exact
        return keys, values

    def _place(self, keys: Tensor) -> tuple[int, bool, Tensor]:
        """The chunk's number, whether it may be the first of its text, and the mean ``[L, H, D]`` float32 of its
        un-rotated keys but the first."""
        count, local = keys.shape[2] - 1, self._rotation(keys.shape[2], 0)
        if local is None:
            return 0, True, keys[:, :, 1:].float().mean(2)
        table = local.table()[:, 1:]
        sums = [unrotated_sum(keys[layers, :, 1:].float(), table, local) for layers in _parts(keys)]
        mean = torch.cat(sums) / count
        number, may_be_first = number_of_chunk(mean, self._model.means, local)
        here = self._rotation(keys.shape[2], number)
        assert here is not None
        return number, may_be_first, rotate(mean[:, :, None], here.start.conj(), here)[:, :, 0]

    def _coefficients(self, keys: Tensor, mean: Tensor, number: int) -> Tensor:
        """Coefficients ``[L, H, D, n]`` float32 of ``keys`` around ``mean``."""
        rotation = self._rotation(keys.shape[2], number)
        spans = spans_of(rotation)
        coefficients = torch.empty_like(keys.mT, dtype=torch.float32, memory_format=torch.contiguous_format)
        for layers in _parts(keys):
            x = centre(keys[layers], mean[layers], rotation, spans, None)[0]
            torch.matmul(self._model.inverses[layers].mT, x.mT, out=coefficients[layers])
        return coefficients

    def _keys(self, coefficients: Tensor, mean: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """The keys as the model caches them; the inverse of ``_coefficients``."""
        rotation = self._rotation(coefficients.shape[-1], number)
        keys = torch.empty_like(coefficients.mT, dtype=dtype, memory_format=torch.contiguous_format)
        for layers in _parts(keys):
            x, fixed = coefficients[layers].mT @ self._model.rows[layers], mean[layers, :, None]
            if rotation is None:
                keys[layers] = narrowed(x + fixed, dtype)
            else:
                x = rotate(x, anchors_of(rotation, spans_of(rotation)), rotation)
                keys[layers] = narrowed(x + rotate(fixed.expand_as(x), rotation.table(), rotation), dtype)
        return keys

    def _encode_keys(self, coefficients: Tensor, widths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The largest relative scale ``[L, H]`` of each head, and for each width scales, carries and streams of its
        components.

        Components are rows of a batch: what is cached for their widths is then the same for all chunks.
        """
        tops = torch.zeros(widths.shape[:2], dtype=torch.float32, device="cpu")
        encode = kernel.encode_keys if kernel.is_available() else key_codec.quantize
        groups = []
        for nbits, chosen in _components_by_width(widths).items():
            encoded = encode(coefficients.flatten(0, 2)[chosen][:, None], (nbits,), CLIPS)
            scales = unbiased_scales(encoded.energies, encoded.overlaps, encoded.squares)[:, 0]
            heads, expected = chosen // widths.shape[2], self._expected_scales(nbits, chosen)
            tops.view(-1).scatter_reduce_(0, heads, scales.amax(-1) / expected, "amax")
            groups.append((encoded, scales, heads, expected))
        fields = []
        for encoded, scales, heads, expected in groups:
            largest = (tops.flatten()[heads] * expected)[:, None]
            codes, _ = encode_scales(scales, STEPS_PER_OCTAVE, largest)
            fields += [codes, encoded.carries, encoded.streams]
        return tops, fields

    def _decode_keys(self, reader: Reader, widths: Tensor, tops: Tensor, num_tokens: int) -> Tensor:
        """Coefficients ``[L, H, D, n]`` float32."""
        coefficients = torch.zeros(widths.numel(), num_tokens, dtype=torch.float32, device="cpu")
        tiles = num_tiles(num_tokens)
        for nbits, chosen in _components_by_width(widths).items():
            count, heads = len(chosen), chosen // widths.shape[2]
            codes = reader.take(torch.uint8, count, tiles)
            carries = reader.take(torch.uint8, count, 1)
            streams = reader.take(torch.uint8, count, tiles, nbits, ROW_BYTES)
            largest = (tops.flatten()[heads] * self._expected_scales(nbits, chosen))[:, None]
            scales = (decode_scales(codes, STEPS_PER_OCTAVE) * largest)[:, None]
            coded = key_codec.dequantize(unpack(streams, carries, (nbits,)), (nbits,), scales)
            coefficients[chosen] = coded[:, 0, :num_tokens]
        return coefficients.view(*widths.shape, num_tokens)

    def _expected_scales(self, nbits: int, chosen: Tensor) -> Tensor:
        """``[C]`` float32: scales that ``chosen`` components of this width would have in the model's texts."""
        return self._model.deviations.flatten()[chosen] / trellis.tables().units[nbits - 1]

    def _costs(self, shape: Sequence[int]) -> Costs:
        tiles, (_, heads, dim) = num_tiles(shape[-2]), self._model.means.shape
        return Costs(bit=tiles * ROW_BYTES, component=tiles + 1, value_elements=heads * dim)

    def _fixed_bytes(self, shape: Sequence[int], dtype: torch.dtype, has_exact: bool) -> int:
        """Bytes behind the header before any component is coded, with values of one bit."""
        layers, heads, dim = self._model.means.shape
        numbers, values = layers * heads * dim, value_sizes(layers, heads, dim, 1, shape[-2])
        coded_values = ValueCodes.bytes_without((), {**values, "padded_tokens": shape[-2]})
        exact = 2 * numbers * dtype.itemsize if has_exact else 0
        return 4 + -(-numbers // 2) + layers + numbers + 2 * 4 * layers * heads + exact + coded_values

    def _rotation(self, num_tokens: int, number: int) -> Rotation | None:
        steps = self.profile.rope_steps
        if not steps and self.rope_theta is not None:
            steps = steps_of(self.layout.key_dim, self.rope_theta)
        return rotation_at(steps, num_tokens, number * num_tokens) if steps else None


def _model_of(profile: ModelProfile) -> _Model:
    shapes = {basis.shape for basis in profile.bases}
    if not profile.key_means or len(shapes) != 1:
        rule = "layers of different heads" if len(shapes) > 1 else "no bases: its texts were too short"
        raise InvalidArgumentError(f"chunks need a profile with bases of equal layers, got one with {rule}")
    bases = [basis.on(torch.device("cpu")) for basis in profile.bases]
    variances = torch.stack([basis.variances for basis in bases])
    least = variances.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * _LEAST_SHARE
    return _Model(
        rows=torch.stack([basis.rows for basis in bases]),
        inverses=torch.stack([basis.inverse for basis in bases]),
        deviations=variances.maximum(least).sqrt(),
        means=torch.tensor(profile.key_means, dtype=torch.float32, device="cpu").view(variances.shape),
        sensitivities=torch.tensor(profile.key_sensitivities, dtype=torch.float32, device="cpu")[..., None],
        digest=profile.digest,
    )


def _parts(keys: Tensor) -> list[slice]:
    """The layers of ``keys [L, H, n, D]``, so many at a time as a processor's cache holds."""
    size = max(1, _MOST_NUMBERS // keys[0].numel())
    return [slice(first, first + size) for first in range(0, len(keys), size)]


def _components_by_width(widths: Tensor) -> dict[int, Tensor]:
    """For each of ``widths [L, H, D]`` above zero, its components, ``[C]`` int64, counted over all layers and heads."""
    flat = widths.flatten()
    groups = {nbits: (flat == nbits).nonzero()[:, 0] for nbits in range(1, MAX_NBITS + 1)}
    return {nbits: chosen for nbits, chosen in groups.items() if len(chosen)}


def _by_width(widths: Sequence[int]) -> dict[int, list[int]]:
    """The layers of each width, in order."""
    layers: dict[int, list[int]] = {}
    for layer, width in enumerate(widths):
        layers.setdefault(width, []).append(layer)
    return dict(sorted(layers.items()))
