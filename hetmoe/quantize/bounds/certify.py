"""Certificates of a quantized model on a user's own tokens.

All layers are gone through once. Beside the unquantized model's residual stream go those of two quantized models: in
one only the layer with experts just passed is quantized, in the other all layers are. And beside these go bounds of how
far each token's residual stream may be from the unquantized one, from two starts: the error bounds of quantized
experts, and the errors that these experts make on the unquantized model's inputs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.params import Params
from hetmoe.quantize.bounds.certificate import Certificate, LayerCertificate
from hetmoe.quantize.bounds.moe_layer import after_experts
from hetmoe.quantize.bounds.streams import Streams, after_attention, after_dense
from hetmoe.quantize.bounds.weights import layer_weights, wide
from hetmoe.quantize.mixed import is_mixed


def certify(params: Params, quantized: Params, tokens: Int[Array, "batch seq"], config: ModelConfig) -> Certificate:
    """Bounds what quantized experts change on these tokens, and measures it.

    Everything is evaluated in float64, for the weights as they are: the statements are about the models in exact
    arithmetic. A forward pass in float32 or bfloat16 rounds activations as well, by about 1e-7 or 4e-3 of themselves at
    every step, and in bfloat16 that alone changes sets of experts.

    Args:
        params: the unquantized model.
        quantized: the same model with some or all routed experts quantized, by any quantiser.
        tokens: token ids.
        config: of both.

    Returns:
        Bounds and measurements of every layer with experts.

    Raises:
        InputError: for parameters or tokens that do not fit the config, or if the two models differ in anything but
            their routed experts.
    """
    _check(params, quantized, tokens, config)
    layers = (certificate for _, certificate in layer_by_layer(params, quantized, tokens, config))
    return Certificate(layers=tuple(certificate for certificate in layers if certificate is not None))


def layer_by_layer(
    params: Params, quantized: Params, tokens: Int[Array, "batch seq"], config: ModelConfig
) -> Iterator[tuple[Streams, LayerCertificate | None]]:
    """Streams behind every layer, in model order, and the certificates of those with experts."""
    embedded = wide(params.embed[tokens])
    still = {start: np.zeros(embedded.shape[:2]) for start in ("bound", "measured")}
    streams = Streams(embedded, {"whole_model": embedded}, {"whole_model": still})
    stacks = (params.layers.moe.experts, quantized.layers.moe.experts)
    for number in range(config.num_layers):
        certificate = None
        if number in config.dense_layers:
            layer = layer_weights(params.dense_layers, config.dense_layers.index(number))
            streams = after_dense(after_attention(streams, layer, config), layer, config)
        else:
            index = config.moe_layers.index(number)
            layer = layer_weights(params.layers, index)
            streams, certificate = after_experts(after_attention(streams, layer, config), layer, *stacks, index, config)
        yield streams, certificate


def _check(params: Params, quantized: Params, tokens: Any, config: ModelConfig) -> None:
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config), is_leaf=is_leaf)
    for name, tree in (("params", params), ("quantized", quantized)):
        if not isinstance(tree, Params):
            raise InputError(f"{name} is a {type(tree).__name__}: give the parameters of a model")
        if jax.tree.map(lambda leaf: leaf.shape, tree, is_leaf=is_mixed) != expected:
            raise InputError(f"{name} do not have the shapes of this config: they belong to another model")
    if getattr(tokens, "ndim", None) != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise InputError("tokens must be a non-empty integer array [batch, seq]")
    check_tokens(tokens, config)
    leaves = jax.tree_util.tree_leaves_with_path(_without_experts(params))
    for (path, one), other in zip(leaves, jax.tree.leaves(_without_experts(quantized)), strict=True):
        if one is not other and not np.array_equal(np.asarray(one), np.asarray(other)):
            where = jax.tree_util.keystr(path)
            raise InputError(f"the two models differ in {where}: the bounds are of changes of routed experts only")


def _without_experts(params: Params) -> Params:
    moe: Any = dataclasses.replace(params.layers.moe, experts=None)
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, moe=moe))
