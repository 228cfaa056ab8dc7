"""What reaches the experts of a layer: Hessians of calibration text, layer after layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import Probe
from hetmoe.models.params import DenseLayer, Layer
from hetmoe.models.transformer import decoder_layer
from hetmoe.quantize.hessian import Hessians, add_inputs, no_inputs


class _ExpertInputs(Probe):
    """Adds what the experts' matrices receive to Hessians, and sees nothing else."""

    def __init__(self, hessians: dict[str, Hessians]) -> None:
        super().__init__(None)
        self.hessians = dict(hessians)

    @property
    def sees(self) -> bool:
        return True

    def grouped(self, site: str, x: Array, real: Array, group: Array) -> None:
        if site in self.hessians:
            self.hessians[site] = add_inputs(self.hessians[site], x, real, group)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=2)
def _observe(x: Array, layer: Layer, hessians: dict[str, Hessians], config: ModelConfig) -> dict[str, Hessians]:
    probe = _ExpertInputs(hessians)
    decoder_layer(x, layer, config, None, probe, None)
    return probe.hessians


@functools.partial(jax.jit, static_argnames="config")
def _run(x: Array, layer: Layer | DenseLayer, config: ModelConfig) -> Array:
    return decoder_layer(x, layer, config, None, Probe(None), None).x


class Activations:
    """The residual stream of calibration text before a layer, in batches on the host."""

    def __init__(
        self,
        embed: Float[Array, "vocab hidden"],
        windows: Int[Any, "sequences context"],
        config: ModelConfig,
        batch: int,
    ) -> None:
        tokens = np.asarray(windows)
        # Whole batches of one size, so that there is one compilation; what is left over makes a smaller last one.
        cuts = range(0, len(tokens), batch)
        self._config = config
        self._parts = [np.asarray(embed[jnp.asarray(tokens[start : start + batch])]) for start in cuts]

    def hessians(self, layer: Layer) -> dict[str, Hessians]:
        """Of the inputs of the layer's experts, by site: `experts_in` and `experts_mid`."""
        config = self._config
        found = {
            "experts_in": no_inputs(config.num_experts, config.hidden_size),
            "experts_mid": no_inputs(config.num_experts, config.expert_intermediate_size),
        }
        for part in self._parts:
            found = _observe(jnp.asarray(part), layer, found, config)
        return found

    def advance(self, layer: Layer | DenseLayer) -> None:
        """Goes on behind the layer."""
        self._parts = [np.asarray(_run(jnp.asarray(part), layer, self._config)) for part in self._parts]
