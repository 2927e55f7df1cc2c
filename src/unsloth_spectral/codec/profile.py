"""What was measured of a model once: how much each layer's errors matter."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Attributes:
    value_sensitivities: for each full-attention layer, KL to the dense cache in nats when that layer's values alone are
        kept at one bit; only their ratios matter. A property of the model, hardly of the text.
    """

    value_sensitivities: tuple[float, ...]
