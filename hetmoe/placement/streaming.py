"""Scores straight from a checkpoint's files, a few matrices in memory at a time: no model is built."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.checkpoint.load import Checkpoint, parse_dtype
from hetmoe.checkpoint.match import match
from hetmoe.checkpoint.pieces import Piece
from hetmoe.checkpoint.read import load_leaf, stored_matrices, target_dtype
from hetmoe.errors import InputError
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.model import fingerprint
from hetmoe.models.params import MoE
from hetmoe.ops.largest import largest
from hetmoe.placement.scores import DownAxis, check_down_axis, random_scores, router_norm

STREAMED = ("max_neuron_norm", "router_norm", "random")  # rules that need no forward pass


@jax.jit(static_argnames=("axis", "dtype"))
def _largest_norm(matrix: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jnp.sqrt(largest(jnp.sum(jnp.square(matrix.astype(dtype).astype(jnp.float32)), axis=axis), 0))


def stream_scores(
    checkpoint: Checkpoint,
    rule: str,
    *,
    key: jax.Array | None = None,
    down_axis: DownAxis = "hidden",
    dtype: Any = None,
) -> tuple[np.ndarray, str]:
    """(scores `[moe_layers, experts]` as of `score_experts`, fingerprint of the model).

    Memory holds the routers, then at most four matrices, whatever the size of the checkpoint; its pages are given back
    as they are read. `dtype` is what the weights are rounded to first, None = as `load_model` would load them.

    Raises:
        InputError: for a rule that needs a forward pass, a missing key, or a checkpoint that does not fit its config.
    """
    if rule not in STREAMED:
        raise InputError(f"rule {rule!r} needs text to run through the model; without one use {', '.join(STREAMED)}")
    check_down_axis(down_axis)
    if rule == "max_neuron_norm" and checkpoint.storage.layout is not None:
        raise InputError(
            f"rule {rule!r} does not score a model with quantized experts: use the one that it was made from"
        )
    source = _Source(checkpoint, dtype)
    router = source.router()
    identity = fingerprint(checkpoint.config, router)
    experts = source.moe.experts
    if rule == "random":
        return np.asarray(random_scores(key, checkpoint.config)), identity
    if rule == "router_norm":
        norms = [router_norm(MoE(router=jnp.asarray(one)[None], experts=experts)) for one in router]  # layer by layer
        return np.concatenate(norms), identity
    del router
    # Stored matrices are [output, input]: an output's weights are a row, an input's a column.
    scores = source.norms(experts.up, 1) * source.norms(experts.gate, 1)
    return scores * source.norms(experts.down, 0 if down_axis == "hidden" else 1), identity


def stored_identity(checkpoint: Checkpoint, dtype: Any = None) -> tuple[str, np.dtype]:
    """(fingerprint, dtype of the parameters) of a checkpoint, from its headers and routers.

    Raises:
        InputError: for a checkpoint that does not fit its config.
    """
    source = _Source(checkpoint, dtype)
    return fingerprint(checkpoint.config, source.router()), source.dtype


class _Source:
    """The leaves of a checkpoint that scores are made of, matched with its files."""

    def __init__(self, checkpoint: Checkpoint, dtype: Any) -> None:
        tree = abstract_params(checkpoint.config)
        leaves: list[Leaf] = jax.tree.leaves(tree, is_leaf=is_leaf)
        self.files, self.storage = checkpoint.files, checkpoint.storage
        matched = match(leaves, checkpoint.config, self.files, self.storage)
        self.pieces = dict(zip(leaves, matched, strict=True))
        self.dtype = target_dtype(self.files, self.pieces, self.storage, parse_dtype(dtype))
        self.moe = tree.layers.moe

    def router(self) -> np.ndarray:
        """All routers, `[moe_layers, hidden, experts]`."""
        leaf = self.moe.router
        return load_leaf(self.files, self.storage, leaf, self.pieces[leaf], self.dtype)

    def norms(self, leaf: Leaf, axis: int) -> np.ndarray:
        """The largest norm of a neuron of every expert, `[moe_layers, experts]`."""
        found = np.empty(leaf.shape[:2], np.float32)

        def fill(piece: Piece) -> None:
            for number, matrix in stored_matrices(self.files, self.storage, piece, self.dtype):
                index = piece.index if number is None else (*piece.index, number)
                found[index] = _largest_norm(matrix, axis, self.dtype)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each holds one matrix
            for done in [pool.submit(fill, piece) for piece in self.pieces[leaf]]:
                done.result()
        return found
