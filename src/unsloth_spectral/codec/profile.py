"""A model's profile: the KL divergence from errors in each layer and head, measured by eval/profile.py."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.fields import Field, Fields


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Attributes:
    value_sensitivities: for each full-attention layer, KL to the dense cache in nats with its values at one bit.
    key_sensitivities: for each layer and head, KL in nats per unit of score variance that its keys lose.
    key_variances: for each layer, the variances of its keys' components in the scores, head by head: an estimate for
        layers that are still to be sealed.
    bases: for each layer, the basis that its keys share over texts; empty if none was measured.
    key_means: for each layer with a basis, the mean of its un-rotated keys over texts, head by head.
    rope_steps: radians from one token to the next of each rotary pair, whose parts are the halves of what is rotated of
        a head; empty if layers differ, or rotate otherwise.
    """

    value_sensitivities: tuple[float, ...]
    key_sensitivities: tuple[tuple[float, ...], ...]
    # What is cached by profile is looked up for each layer that is sealed: the long tables are compared, not hashed.
    key_variances: tuple[tuple[float, ...], ...] = field(hash=False)
    bases: tuple[ModelBasis, ...] = ()
    key_means: tuple[tuple[float, ...], ...] = field(default=(), hash=False)
    rope_steps: tuple[float, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.value_sensitivities)

    @property
    def is_consistent(self) -> bool:
        """True if every table has a row for each layer, variances and bases are of as many heads as the sensitivities,
        and all numbers are finite, those of sensitivities and variances not negative."""
        rows = zip(self.key_sensitivities, self.key_variances, strict=False)
        fits = all(heads and variances and len(variances) % len(heads) == 0 for heads, variances in rows)
        fits = fits and len(self.bases) in (0, self.num_layers)
        fits = fits and all(
            basis.shape[0] == len(heads) for basis, heads in zip(self.bases, self.key_sensitivities, strict=False)
        )
        sizes = [basis.variances.numel() for basis in self.bases]
        fits = fits and [len(means) for means in self.key_means] == sizes
        shares = chain(self.value_sensitivities, *self.key_sensitivities, *self.key_variances)
        fits = fits and all(0 <= number < math.inf for number in shares)
        fits = fits and all(map(math.isfinite, chain(self.rope_steps, *self.key_means)))
        fits = fits and all(2 * len(self.rope_steps) <= basis.shape[1] for basis in self.bases)
        return fits and self.num_layers == len(self.key_sensitivities) == len(self.key_variances)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits, a hash of all that is measured."""
        names = [basis.digest for basis in self.bases]
        tables = (self.value_sensitivities, self.key_sensitivities, self.key_variances, self.key_means)
        return hashlib.sha256(json.dumps((tables, names, self.rope_steps)).encode()).hexdigest()[:16]

    def to_fields(self) -> dict[str, Field]:
        # As tensors: the variances are thousands of numbers.
        return {
            "value_sensitivities": _numbers(self.value_sensitivities),
            "key_sensitivities": [_numbers(heads) for heads in self.key_sensitivities],
            "key_variances": [_numbers(variances) for variances in self.key_variances],
            "key_means": [_numbers(means) for means in self.key_means],
            "rope_steps": _numbers(self.rope_steps),
            "bases": [basis.to_fields() for basis in self.bases],
        }

    @classmethod
    def from_fields(cls, fields: Fields, num_layers: int) -> "ModelProfile":
        values = fields.tensor("value_sensitivities", torch.float64, (num_layers,), on_host=True)
        keys, variances, means = (
            tuple(tuple(row.tolist()) for row in fields.tensors(name, torch.float64, (None,), on_host=True))
            for name in ("key_sensitivities", "key_variances", "key_means")
        )
        steps = tuple(fields.tensor("rope_steps", torch.float64, (None,), on_host=True).tolist())
        bases = tuple(ModelBasis.from_fields(basis) for basis in fields.subs("bases"))
        profile = cls(tuple(values.tolist()), keys, variances, bases, means, steps)
        fields.require(profile.is_consistent, f"sensitivities and variances of the heads of {num_layers} layers")
        return profile


def _numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
