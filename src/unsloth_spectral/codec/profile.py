"""A model's profile: how much errors in each layer matter. It hardly depends on the text that it is measured on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.fields import Field, Fields


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Attributes:
    value_sensitivities: for each full-attention layer, KL to the dense cache in nats with only that layer's values
        quantized, to one bit.
    key_sensitivities: KL in nats per unit of score variance lost, with only that layer's keys quantized.
    key_variances: for each layer, the variances of its keys' components in the scores: an estimate for layers that are
        still to be sealed.
    """

    value_sensitivities: tuple[float, ...]
    key_sensitivities: tuple[float, ...]
    key_variances: tuple[tuple[float, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.value_sensitivities)

    def to_fields(self) -> dict[str, Field]:
        # As tensors: the variances are thousands of numbers.
        return {
            "value_sensitivities": _numbers(self.value_sensitivities),
            "key_sensitivities": _numbers(self.key_sensitivities),
            "key_variances": [_numbers(variances) for variances in self.key_variances],
        }

    @classmethod
    def from_fields(cls, fields: Fields, num_layers: int) -> "ModelProfile":
        numbers = (num_layers,)
        values = fields.tensor("value_sensitivities", torch.float64, numbers, on_host=True)
        keys = fields.tensor("key_sensitivities", torch.float64, numbers, on_host=True)
        variances = fields.tensors("key_variances", torch.float64, (None,), on_host=True)
        fields.require(len(variances) == num_layers, f"variances of {num_layers} layers")
        return cls(
            tuple(values.tolist()),
            tuple(keys.tolist()),
            tuple(tuple(layer_variances.tolist()) for layer_variances in variances),
        )


def _numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
