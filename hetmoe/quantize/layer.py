"""The experts of one layer, each matrix at its own bits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.gptq import GptqResult, gptq
from hetmoe.quantize.grid import Quantized
from hetmoe.quantize.hessian import Hessians, mean_hessian
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.levels import used_levels
from hetmoe.quantize.packed import Packed, dequantize_packed, pack
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest

INPUTS = {"gate": "experts_in", "up": "experts_in", "down": "experts_mid"}  # the site that each matrix reads
Pools = dict[tuple[str, int], Packed]  # by matrix and bits, in the order of experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerQuantized:
    """One layer's quantized matrices.

    Attributes:
        pools: `[experts at these bits, K, N]` for every matrix and bits in use.
        facts: what a report says of them; JSON.
    """

    pools: Pools
    facts: dict[str, Any]

    def weights(self, plain: Mapping[str, Array], bits: Int[np.ndarray, "experts matrices"]) -> dict[str, Array]:
        """All experts' matrices as the values that they now stand for, in the dtype that they had."""
        found: dict[str, Array] = {}
        for column, name in enumerate(EXPERT_MATRICES):
            w = plain[name]
            for (matrix, level), pool in self.pools.items():
                if matrix == name:
                    w = w.at[np.flatnonzero(bits[:, column] == level)].set(dequantize_packed(pool).astype(w.dtype))
            found[name] = w
        return found


def quantize_layer(
    matrices: Mapping[str, Float[Array, "experts K N"]],
    bits: Int[np.ndarray, "experts matrices"],
    recipe: Recipe,
    hessians: Mapping[str, Hessians] | None,
    *,
    name: str,
) -> LayerQuantized:
    """Quantizes the experts of a layer.

    Args:
        matrices: each of `EXPERT_MATRICES`.
        bits: of every expert and matrix; 0 leaves it as it is.
        recipe: quantiser and grids.
        hessians: for `gptq`, of the inputs at each site of `INPUTS`.
        name: of the layer, for messages.

    Raises:
        InputError: as the quantisers.
    """
    pools: Pools = {}
    facts: dict[str, Any] = {"matrices": {}}
    for column, matrix in enumerate(EXPERT_MATRICES):
        w, parts = matrices[matrix], list[dict[str, Any]]()
        of_layer = None if hessians is None else hessians[INPUTS[matrix]]
        mean = None if of_layer is None else mean_hessian(of_layer)
        for level in used_levels(bits[:, column]):
            experts = np.flatnonzero(bits[:, column] == level)
            pooled: list[Packed] = []
            for expert in experts.tolist():
                # One expert at a time: one compilation serves all layers, whatever the number at these bits.
                one, called = w[expert : expert + 1], f"{matrix} of expert {expert} of {name}"
                own = None if of_layer is None else jax.tree.map(lambda leaf, e=expert: leaf[e : e + 1], of_layer)
                quantized, result = _quantize(one, level, recipe, own, mean, called)
                pooled.append(pack(quantized))
                parts.append({"expert": expert, "bits": level} | _facts(one, pooled[-1], own, result))
            pools[matrix, level] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pooled)
        facts["matrices"][matrix] = sorted(parts, key=lambda part: part["expert"])
    return LayerQuantized(pools=pools, facts=facts)


def _quantize(
    w: Array, bits: int, recipe: Recipe, own: Hessians | None, mean: Array | None, name: str
) -> tuple[Quantized, GptqResult | None]:
    grid = recipe.grid(bits)
    if recipe.method == "rtn":
        return round_to_nearest(w, grid, name=name), None
    if recipe.method == "hqq":
        return half_quadratic(w, grid, name=name), None
    assert own is not None
    result = gptq(w, own, grid, recipe.gptq, mean=mean, name=name)
    return result.quantized, result


def _facts(w: Array, packed: Packed, own: Hessians | None, result: GptqResult | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"relative_error": float(_relative_error(w, packed))}
    if own is not None and result is not None:
        facts |= {
            "tokens": int(own.tokens[0]),
            "fell_back": int(result.fell_back[0]),
            "factored": bool(result.factored[0]),
            "damping": float(result.damping[0]),
            "error": float(jnp.sum(result.error)),
            "rtn_error": float(jnp.sum(result.rtn_error)),
        }
    return facts


@jax.jit
def _relative_error(w: Array, packed: Packed) -> Array:
    """Frobenius norm of the change, relative to that of the weights; 0 for weights that are all 0."""
    wide = w.astype(jnp.float32)
    norm = jnp.linalg.norm(wide)
    return jnp.linalg.norm(dequantize_packed(packed) - wide) / jnp.where(norm > 0, norm, 1)
