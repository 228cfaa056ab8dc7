"""What is certified of a quantized model on given tokens, beside what happens."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64, Int

Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The routing of a layer when some experts are quantized, beside the unquantized model's.

    Attributes:
        certified: whether the set of a token's experts cannot change, by the error bounds of the quantized experts.
        certified_measured: likewise, but from the errors that the quantized experts really make on the unquantized
            model's inputs: what is then uncertain, is so because of the propagation.
        changed: whether it did change.
        logit_bound: bound of the change of a token's router logits (of `certified`), the largest of all experts.
        logit_change: the largest change that was measured.
        logits_above: number of logits that changed by more than one of their bounds: 0.
    """

    certified: Bool[Array, "tokens"]
    certified_measured: Bool[Array, "tokens"]
    changed: Bool[Array, "tokens"]
    logit_bound: Float64[Array, "tokens"]
    logit_change: Float64[Array, "tokens"]
    logits_above: Int[Array, ""]

    @property
    def violations(self) -> int:
        """Tokens whose set changed although it was certain, and logits beyond their bounds."""
        return int(np.sum((self.certified | self.certified_measured) & self.changed)) + int(self.logits_above)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """Bounds and measurements of one layer with experts on the tokens of a text.

    Attributes:
        chosen: the experts of each token in the unquantized model.
        altered: whether their weights differ at all in the quantized model.
        expert_error: measured `|f'(x) - f(x)|` of each token's experts at the unquantized model's inputs.
        expert_bound: its bound from weight differences and the unquantized expert's activations.
        expert_norm_bound: its bound from weight differences and |x| alone.
        output_error: measured change of the routed experts' weighted sum at these inputs.
        output_bound: its bound, from the lesser of the two bounds of each expert.
        one_layer: the router's reading when only the layer with experts before is quantized; None in the first.
        whole_model: the router's reading when all experts are quantized; none of them is before the first router.
    """

    chosen: Int[Array, "tokens copies"]
    altered: Bool[Array, "tokens copies"]
    expert_error: Float64[Array, "tokens copies"]
    expert_bound: Float64[Array, "tokens copies"]
    expert_norm_bound: Float64[Array, "tokens copies"]
    output_error: Float64[Array, "tokens"]
    output_bound: Float64[Array, "tokens"]
    one_layer: Reading | None
    whole_model: Reading

    @property
    def violations(self) -> int:
        """How often a measurement was beyond its bound, or a certain set changed: 0, or a bound is wrong."""
        beyond = (
            self.expert_error > self.expert_bound,
            self.expert_error > self.expert_norm_bound,
            self.output_error > self.output_bound,
        )
        readings = (reading for reading in (self.one_layer, self.whole_model) if reading is not None)
        return sum(int(np.sum(part)) for part in beyond) + sum(reading.violations for reading in readings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Certificates of all layers with experts, in model order."""

    layers: tuple[LayerCertificate, ...]

    @property
    def violations(self) -> int:
        """Of all layers."""
        return sum(layer.violations for layer in self.layers)
