"""What was measured of a model once: how much each layer's errors matter. It is the model's, hardly the text's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Attributes:
    value_sensitivities: for each full-attention layer, KL to the dense cache in nats when that layer's values alone are
        kept at one bit.
    key_sensitivities: KL in nats for each unit of score variance that is lost with that layer's keys alone.
    key_variances: for each layer the variances of its keys' components, as the scores see them: what a layer still to
        come is likely to need.
    """

    value_sensitivities: tuple[float, ...]
    key_sensitivities: tuple[float, ...]
    key_variances: tuple[tuple[float, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.value_sensitivities)
