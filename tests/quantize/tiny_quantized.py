"""A small model with quantized experts: some at 1, 3 and 4 bits, some as they were."""

import functools

import jax
import numpy as np

from hetmoe.models.model import Model
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.recipe import Recipe
from tests.models.tiny import random_params, random_tokens, tiny_config

# A dense layer between two with experts; every width is a multiple of 32.
CONFIG = tiny_config(
    family="qwen3_moe", qk_norm="head", num_layers=3, dense_layers=(1,), dense_intermediate_size=19, hidden_size=64,
    head_dim=16, expert_intermediate_size=96, num_experts=8,
)  # fmt: skip
RECIPE = Recipe(method="rtn", group=32)


def bits() -> np.ndarray:
    """Of every expert and matrix, `[2, 8, 3]`; the matrices of the first expert differ, and layer 1 has no 4 bits."""
    table = np.array([[1, 3, 0, 3, 4, 1, 0, 1], [3, 3, 3, 0, 0, 1, 1, 3]])
    found = np.repeat(table[..., None], 3, axis=-1)
    found[0, 0] = [1, 4, 3]
    return found


@functools.cache
def plain(seed: int = 3) -> Model:
    return Model(params=random_params(CONFIG, seed), config=CONFIG, tokenizer=None, eos_token_id=39, name="plain")


@functools.cache
def quantized() -> Model:
    return quantize_experts(plain(), bits(), RECIPE)[0]


def windows(sequences: int = 40, context: int = 9) -> np.ndarray:
    return np.asarray(random_tokens(CONFIG, 7, (sequences, context)))


def same(left: Model, right: Model) -> bool:
    """Whether all parameters are the same, bit by bit, in the same pools."""
    a, b = jax.tree.leaves(left.params), jax.tree.leaves(right.params)
    equal = jax.tree.structure(left.params) == jax.tree.structure(right.params)
    return equal and all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))
