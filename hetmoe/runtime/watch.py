"""A deployment under a policy: chips that age, are probed, and are changed as it decides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.models.params import Params
from hetmoe.runtime.deploy import deployed_weights, fresh_chips, probe_experts
from hetmoe.runtime.policy import Actions, Knowledge, Observation, initial_state, step

PROBE_STREAM = 0x9B0E  # folded into a chip's key for its probes; far from any layer number, which programming folds in
_decide = jax.jit(step)


class Watch:
    """Chips of one key, programmed at time 0, and the policy's state."""

    def __init__(
        self, key: jax.Array, params: Params, spec: AnalogSpec, knowledge: Knowledge, *, probes: int, budget: float
    ) -> None:
        self._key, self._params, self._spec, self._knowledge, self._probes = key, params, spec, knowledge, probes
        layers, experts = knowledge.noise_loss.shape
        self._chips, self._programmed_at = fresh_chips(layers, experts), np.zeros((layers, experts))
        self._state, self._seen = initial_state(knowledge, budget), 0

    @property
    def analog(self) -> Bool[np.ndarray, "layers experts"]:
        """The plan."""
        return np.asarray(self._state.analog)

    def held(self) -> ProgrammedWeights:
        """What the chips hold, with their factors, at the time of the last observation."""
        return deployed_weights(self._key, self._params, self._spec, self._chips)

    def observe(self, time_s: float, *, noise: float, budget: float, tokens: float) -> Actions:
        """Probes, decides and acts.

        Args:
            time_s: since the first programming.
            noise: multiplies the noise scale from now on.
            budget: J per token for all experts.
            tokens: expected until the next observation.
        """
        self._age(time_s, noise)
        key = jax.random.fold_in(jax.random.fold_in(self._key, PROBE_STREAM), self._seen)
        seen = Observation(
            time_s=jnp.float32(time_s), age_s=self._chips.age,
            readings=probe_experts(key, self._params, self.held(), self._spec, self._probes),
            budget=jnp.float32(budget), tokens=jnp.float32(tokens),
        )  # fmt: skip
        self._state, done = _decide(self._knowledge, self._state, seen)
        again = np.asarray(done.reprogram)
        self._programmed_at = np.where(again, time_s, self._programmed_at)
        self._chips = dataclasses.replace(self._chips, epoch=self._chips.epoch + again.astype(np.int32))
        self._age(time_s, noise)
        self._seen += 1
        return done

    def _age(self, time_s: float, noise: float) -> None:
        age = jnp.asarray(time_s - self._programmed_at, jnp.float32)
        self._chips = dataclasses.replace(self._chips, age=age, noise=jnp.float32(noise), factor=self._state.factor)
