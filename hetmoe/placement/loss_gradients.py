"""Gradients of a text's loss with respect to matrices, reduced to a few numbers each while they are computed.

Two losses share one forward pass: that of labels sampled from the model, whose squared gradients estimate the Fisher
matrix (Martens 2020, "New insights and perspectives on the natural gradient method", section 5), and that of the text's
own labels. Sampled labels at different positions are independent given the text and their gradients have mean zero, so
the square of one sequence's summed gradient is in expectation the sum of the squares of its tokens': one backward pass
per sequence is enough.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import CHUNK
from hetmoe.models.params import Params
from hetmoe.models.transformer import LayerHook, hidden_states

Slots = TypeVar("Slots")
Reduce = Callable[[Array, Array, Any], Array]  # of the gradient in float32, the weight and the source


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(reduce: Reduce, w: Array, slot: Array, source: Any) -> Array:
    """`w`; the derivative with respect to `slot` is `reduce(gradient of w, w, source)`, of slot's shape.

    So the gradient of one layer at a time is reduced to what is wanted of it, and never kept.
    """
    del reduce, slot, source  # used by the backward pass only
    return w


def _tap_fwd(reduce: Reduce, w: Array, slot: Array, source: Any) -> Any:
    return tap(reduce, w, slot, source), (w, source)


def _tap_bwd(reduce: Reduce, residuals: Any, grad: Array) -> Any:
    return None, reduce(grad.astype(jnp.float32), *residuals), None


tap.defvjp(_tap_fwd, _tap_bwd)


def per_sequence(
    params: Params,
    windows: Int[Array, "sequences context"],
    keys: jax.Array,
    slots: Slots,
    tapped: Callable[[Slots], tuple[LayerHook, Array]],
    keep: Callable[[Slots, Slots], Any],
    config: ModelConfig,
) -> Any:
    """What taps give for every sequence: `keep(of sampled labels, of the text's own)`, with a leading axis.

    Args:
        params: the model's.
        windows: text; each row predicts its tokens from the second on. Two backward passes per row, one per loss.
        keys: one per row, of the sampled labels.
        slots: zeros of the shapes that the taps reduce to.
        tapped: from slots to what taps a layer's matrices, and the matrix of the LM head.
        keep: what is wanted of the derivatives of the summed losses, nats; the rest is not computed.
        config: the model's.
    """

    def one(item: tuple[Array, jax.Array]) -> Any:
        window, label_key = item

        def losses(slots: Slots) -> Array:
            hook, head = tapped(slots)
            hidden, _, _ = hidden_states(params, window[None, :-1], config, hook=hook)
            return _losses(hidden[0], head, window[1:], label_key)

        _, pull = jax.vjp(losses, slots)
        return keep(pull(jnp.array([1.0, 0.0]))[0], pull(jnp.array([0.0, 1.0]))[0])

    return jax.lax.map(one, (windows, keys))


def _losses(hidden: Array, head: Array, labels: Array, key: jax.Array) -> Float[Array, "2"]:
    """Summed negative log-likelihood, nats, of labels sampled from the model and of the given ones."""
    count, chunk = hidden.shape[0], min(CHUNK, hidden.shape[0])
    pad = -count % chunk
    rows = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    own = jnp.pad(labels, (0, pad)).reshape(-1, chunk)
    real = (jnp.arange(count + pad) < count).astype(jnp.float32).reshape(-1, chunk)

    @jax.checkpoint  # the backward pass recomputes a chunk's logits, and draws the same labels
    def one(part: tuple[Array, Array, Array, jax.Array]) -> Array:
        x, given, weight, chunk_key = part
        logits = jnp.matmul(x, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        drawn = jax.random.categorical(chunk_key, jax.lax.stop_gradient(logits))
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, jnp.stack([drawn, given], axis=1), axis=1)
        return -jnp.sum(chosen * weight[:, None], axis=0)

    return jnp.sum(jax.lax.map(one, (rows, own, real, jax.random.split(key, rows.shape[0]))), axis=0)
