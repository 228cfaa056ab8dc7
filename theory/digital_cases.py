"""Bounds of converters, rounded weights and routing against the errors that they are of; nothing here is random."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.two_layer import TwoLayer, two_layer, two_layer_change_bound
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.quantize.bounds.a_priori import half_steps
from hetmoe.quantize.bounds.expert import Expert, activation_bound, activations, change_of
from hetmoe.quantize.bounds.routing import choose
from hetmoe.quantize.bounds.routing_change import router_norms
from hetmoe.quantize.bounds.stability_margin import stability_margin
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import dequantize_packed, pack
from hetmoe.quantize.rtn import round_to_nearest
from theory.cases import TOKENS, Case, case_of, random_weights


def converter_cases(seed: int) -> list[Case]:
    """Errors of converters, clipping included."""
    rng = np.random.default_rng([seed, 2])
    rows, columns, tile_rows = (int(rng.choice(sizes)) for sizes in ((1, 9, 40, 70), (1, 9), (1, 16, 512)))
    x, w = rng.normal(size=(TOKENS, rows)).astype(np.float32), rng.normal(size=(rows, columns)).astype(np.float32)
    spec = analog_spec(
        dac_bits=int(rng.integers(3, 11)), adc_bits=int(rng.integers(3, 11)), tile_rows=tile_rows,
        bound_axis=str(rng.choice(["tile", "column"])),
    )  # fmt: skip
    options, found = spec.options, list[Case]()
    blocks = -(-rows // tile_rows)
    for name, ranges in (("dynamic", None), ("static", jnp.asarray(rng.uniform(0.5, 3, blocks), jnp.float32))):
        bound_of_adc = float(np.exp(rng.uniform(0, 3)))
        got = crossbar_matmul(
            jnp.asarray(x), jnp.asarray(w), input_range=ranges, dac_bits=options.dac_bits, adc_bits=options.adc_bits,
            adc_bound=bound_of_adc, bound_axis=options.bound_axis, tile_rows=tile_rows,
        )  # fmt: skip
        bound = converter_error_bound(
            jnp.asarray(x), jnp.asarray(w), input_range=ranges, adc_bound=bound_of_adc, options=options
        )
        error = np.abs(np.asarray(got, np.float64) - x.astype(np.float64) @ w.astype(np.float64))
        norms = (np.linalg.norm(values, axis=1) for values in (error, bound))
        found.append(case_of("converters, norms", f"{name} ranges", *norms))
        found.append(case_of("converters, every output", f"{name} ranges", error.ravel(), bound.ravel()))
    return found


def quantization_cases(seed: int) -> list[Case]:
    """Errors of rounding to the nearest level: of a matrix, and of experts, from steps or differences."""
    rng = np.random.default_rng([seed, 3])
    hidden, inner = 32 * int(rng.integers(1, 3)), 32 * int(rng.integers(1, 3))
    bits = int(rng.choice([2, 3, 4, 8]))
    x = rng.normal(size=(TOKENS, hidden))
    clean = Expert(
        random_weights(rng, hidden, inner, 0.5), random_weights(rng, hidden, inner, 0.5),
        random_weights(rng, inner, hidden, 0.5),
    )  # fmt: skip
    grid = Grid(bits=bits, group=32, symmetric=bool(rng.integers(2)))
    packed = [pack(round_to_nearest(jnp.asarray(w, jnp.float32), grid)) for w in clean.matrices]
    coarse = Expert(*(np.asarray(dequantize_packed(one)).astype(np.float64) for one in packed))
    off = np.linalg.norm(x @ (coarse.up - clean.up), axis=1)
    linear = np.linalg.norm(np.abs(x) @ half_steps(packed[1]), axis=1)
    before = activations(x, clean)
    moved = np.linalg.norm(activations(x, coarse).out - before.out, axis=1)
    size = np.linalg.norm(x, axis=1)
    bound = activation_bound(change_of(clean, coarse), before, size, np.zeros(TOKENS))
    relu, relu_coarse = TwoLayer(clean.up, clean.down), TwoLayer(coarse.up, coarse.down)
    relu_moved = np.linalg.norm(two_layer(x, relu_coarse) - two_layer(x, relu), axis=1)
    relu_bound = two_layer_change_bound(x, relu, *(half_steps(one) for one in packed[1:]))
    return [
        case_of("quantization, linear", f"{bits} bits", off, linear),
        case_of("quantization, two-layer expert", f"{bits} bits", relu_moved, relu_bound),
        case_of("quantization, gated expert", f"{bits} bits", moved, bound),
    ]


def router_of(experts: int, taken: int, hidden: int, **options: Any) -> ModelConfig:
    """A model of which only the router matters."""
    return ModelConfig(
        family="olmoe", vocab_size=2, hidden_size=hidden, num_layers=1, max_position_embeddings=2, num_heads=1,
        tie_embeddings=False, rms_norm_eps=1e-5, rope=Rope(theta=100.0), num_kv_heads=1, head_dim=2,
        num_experts=experts, experts_per_token=taken, expert_intermediate_size=2, norm_topk_prob=False, **options,
    )  # fmt: skip


def routing_cases(seed: int) -> list[Case]:
    """Margins of routing, over the smallest move that was found to change a token's experts.

    Moves are looked for along the differences of a chosen and another expert's columns, which is the shortest way for
    two logits to meet.
    """
    rng = np.random.default_rng([seed, 4])
    experts, hidden = int(rng.choice([4, 9])), int(rng.choice([9, 40]))
    taken, found = int(rng.integers(1, experts)), list[Case]()
    router, gain = rng.normal(size=(hidden, experts)), np.exp(0.3 * rng.normal(size=hidden))
    x = rng.normal(size=(TOKENS, hidden))
    seen, norms = gain[:, None] * router, router_norms(gain, router)
    options = {"softmax": {}, "sigmoid with a bias": {"router_score": "sigmoid", "selection_bias": True}}
    for name, option in options.items():
        config = router_of(experts, taken, hidden, **option)
        bias = 0.1 * rng.normal(size=experts) if option else None
        before = choose(x @ seen, bias, config)
        nearest = np.full(TOKENS, np.inf)
        for token, state in enumerate(x):
            others = np.setdiff1d(np.arange(experts), before.chosen[token])
            ways = seen[:, others].T[:, None] - seen[:, before.chosen[token]].T[None]
            ways = ways.reshape(-1, hidden) / np.linalg.norm(ways.reshape(-1, hidden), axis=1, keepdims=True)
            low, high = np.zeros(len(ways)), np.full(len(ways), 1e3)
            alone = choose(np.repeat(state[None] @ seen, len(ways), axis=0), bias, config)
            for _ in range(60):
                middle = (low + high) / 2
                changed = alone.differs(choose((state + middle[:, None] * ways) @ seen, bias, config))
                low, high = np.where(changed, low, middle), np.where(changed, middle, high)
            nearest[token] = high.min()
        margin = stability_margin(before, norms, bias, config)
        found.append(case_of(f"routing, {name}", "none", margin, nearest))
    return found
