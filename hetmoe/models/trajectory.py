"""A forward pass that is kept layer by layer, and one that goes on from the middle."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.models.attention import rms_norm
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import Probe
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import decoder_layer, scan_layers


@struct.dataclass
class Trajectory:
    """What passed through the layers with experts (leading axis), and the final normed hidden states."""

    ffn_in: Float[Array, "moe_layers tokens hidden"]  # what routers and experts read
    out: Float[Array, "moe_layers batch seq hidden"]  # the residual stream behind each layer
    routing: Routing
    hidden: Float[Array, "batch seq hidden"]


def trajectory(params: Params, tokens: Int[Array, "batch seq"], config: ModelConfig) -> Trajectory:
    """The digital forward pass with everything that a change of one expert starts from."""

    def step(x: Array, scanned: tuple[Layer | DenseLayer, None]) -> tuple[Array, tuple[Array, Array, Routing | None]]:
        result = decoder_layer(x, scanned[0], config, None, Probe(None), None)
        return result.x, (result.ffn_in, result.x, result.routing)

    x, kept = scan_layers(step, params.embed[tokens], params, config, {True: None, False: None})
    ffn_in, out, routing = kept[True]
    hidden = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return Trajectory(ffn_in=ffn_in, out=out, routing=routing, hidden=hidden)


def resume(
    params: Params, x: Float[Array, "batch seq hidden"], config: ModelConfig, after: Int[Array, ""]
) -> Float[Array, "batch seq hidden"]:
    """Final normed hidden states when `x` is the residual stream behind layer number `after` (in model order).

    `after` is traced: one compiled function serves all layers. Earlier layers are skipped by a branch, so call it in a
    loop (`lax.map`), not under `vmap`, which would compute them.
    """

    def step(x: Array, scanned: tuple[Layer | DenseLayer, Array]) -> tuple[Array, None]:
        layer, number = scanned
        run = lambda x: decoder_layer(x, layer, config, None, Probe(None), None).x  # noqa: E731
        return jax.lax.cond(number > after, run, lambda x: x, x), None

    numbers = {True: jnp.asarray(config.moe_layers), False: jnp.asarray(config.dense_layers, np.int32)}
    x, _ = scan_layers(step, x, params, config, numbers)
    return rms_norm(x, params.final_norm, config.rms_norm_eps)
