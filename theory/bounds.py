"""Bounds against measurements on random experts: how often they are violated (never), and how tight they are.

Every case draws shapes, magnitudes and a device; measures an error on many simulated chips, through hetmoe's own
programming; and divides it by its bound. Second moments of single matrices, and of experts with Gaussian noise, are
exact: their ratio is 1 within the standard error of the chips.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.devices import DEVICES
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.gaussian_moments import swiglu_exact, two_layer_exact
from hetmoe.analog.programming import program_matrix
from hetmoe.analog.second_moment import ExpertNoise, expert_second_moment, linear_second_moment
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer, two_layer_second_moment
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

TOKENS = 8
SIZES = (2, 9, 40)  # of matrices: few, so that few programs are compiled
DELTA = 0.01
NO_ERROR = np.zeros(1)
GAUSSIAN = ("proportional", "additive", "afm", "reram_cmo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of one bound.

    Attributes:
        bound: its name.
        device: what makes the error.
        ratios: measured over bound, of every token.
        error: standard errors of the ratios, 0 where nothing is random.
        share: of chips and tokens whose error exceeds the bound, where it is one of probability DELTA.
        exact: whether the bound is the value itself.
    """

    bound: str
    device: str
    ratios: np.ndarray
    error: np.ndarray
    share: float | None = None
    exact: bool = False

    @property
    def violated(self) -> bool:
        """Whether a ratio is above 1 (of what is exact: also below) by more than five standard errors."""
        if self.share is not None:
            return self.share > DELTA
        # Of what is exact, a ratio of 0 is a token that only the rarest noise reaches: no chip that was drawn.
        above = np.where(self.ratios > 0, np.abs(self.ratios - 1), 0) if self.exact else self.ratios - 1
        return bool((above > 5 * self.error + 1e-6).any())


def programmed(key: jax.Array, w: np.ndarray, spec: AnalogSpec, chips: int) -> np.ndarray:
    """A matrix on many chips, float64 `[chips, K, N]`."""
    return np.asarray(_programmed(jax.random.split(key, chips), jnp.asarray(w, jnp.float32), spec), np.float64)


@jax.jit
def _programmed(keys: jax.Array, w: Array, spec: AnalogSpec) -> Array:
    return jax.lax.map(lambda key: program_matrix(key, w, spec, expert=0), keys)


def over(measured: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The ratio; 1 where both are 0 (a token that no neuron answers to)."""
    return np.divide(measured, bound, out=np.where(measured > 0, np.inf, 1.0), where=bound > 0)


def over_error(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Standard errors of `over`; 0 where the bound is 0."""
    return np.divide(error, bound, out=np.zeros_like(error), where=bound > 0)


def random_weights(rng: np.random.Generator, rows: int, columns: int, spread: float) -> np.ndarray:
    """Of columns whose norms differ by factors of about exp(spread), representable in float32."""
    sizes = np.exp(spread * rng.normal(size=columns))
    return (rng.normal(size=(rows, columns)) * sizes / np.sqrt(rows)).astype(np.float32).astype(np.float64)


def root_mean_square(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(root over chips of the mean squared norm, its standard error) of `[chips, tokens, outputs]`."""
    squares = np.sum(np.square(errors), axis=2)
    root = np.sqrt(squares.mean(axis=0))
    return root, squares.std(axis=0, ddof=1) / np.sqrt(len(squares)) / (2 * np.maximum(root, 1e-300))


def linear_cases(seed: int, device: str, chips: int) -> list[Case]:
    """The second moment of one matrix, exactly; and what the error exceeds with probability DELTA."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.choice(SIZES, 2))
    w, x = (
        random_weights(rng, rows, columns, 0.5),
        rng.normal(size=(TOKENS, rows)) * np.exp(rng.normal(size=(TOKENS, 1))),
    )
    spec = analog_spec(device, noise_scale=float(np.exp(rng.uniform(-2, 1))))
    single = jnp.asarray(w, jnp.float32)
    noise = noise_of(single, spec)
    errors = np.einsum("tk,ckn->ctn", x, programmed(jax.random.key(seed), w, spec, chips) - w)
    root, error = root_mean_square(errors)
    bound = np.sqrt(linear_second_moment(x, noise).sum(axis=1))
    norms = np.linalg.norm(errors, axis=2)
    found = [
        Case(
            bound="linear, second moment",
            device=device,
            ratios=over(root, bound),
            error=over_error(error, bound),
        )
    ]
    for name, tail in (
        ("linear, concentration", linear_tail(x, noise, draw_slopes(single, spec), DELTA)),
        ("linear, Markov", markov_bound(bound, DELTA)),
    ):
        found.append(
            Case(
                bound=f"{name}, {DELTA:.0%}", device=device, ratios=over(np.quantile(norms, 1 - DELTA, axis=0), tail),
                error=NO_ERROR, share=float((norms > tail).mean()),
            )
        )  # fmt: skip
    return found


def expert_cases(seed: int, device: str, chips: int) -> list[Case]:
    """Second moments of two-layer and SwiGLU experts: bounds, and exactly where noise is Gaussian."""
    rng = np.random.default_rng(seed)
    hidden, inner = (int(n) for n in rng.choice(SIZES, 2))
    x = rng.normal(size=(TOKENS, hidden))
    spec = analog_spec(device, noise_scale=float(np.exp(rng.uniform(-3, 0.5))))
    gate, up = (random_weights(rng, hidden, inner, 0.5) for _ in range(2))
    down = random_weights(rng, inner, hidden, 0.5)
    held = [programmed(jax.random.key(seed + 7 * n), w, spec, chips) for n, w in enumerate((gate, up, down))]
    noise = [noise_of(jnp.asarray(w, jnp.float32), spec) for w in (gate, up, down)]
    relu, relu_noise = TwoLayer(up, down), TwoLayerNoise(noise[1], noise[2])
    swiglu, swiglu_noise = Expert(gate, up, down), ExpertNoise(*noise)
    before = activations(x, swiglu)
    of_relu = np.stack([two_layer(x, TwoLayer(u, d)) for u, d in zip(*held[1:], strict=True)]) - two_layer(x, relu)
    of_swiglu = np.stack([activations(x, Expert(*one)).out for one in zip(*held, strict=True)]) - before.out
    kinds = {
        "two-layer": (of_relu, two_layer_second_moment(x, relu, relu_noise).rms, two_layer_exact(x, relu, relu_noise)),
        "gated": (
            of_swiglu, expert_second_moment(x, before, swiglu, swiglu_noise).rms, swiglu_exact(x, swiglu, swiglu_noise),
        ),
    }  # fmt: skip
    found = list[Case]()
    for kind, (errors, bound, exact) in kinds.items():
        root, error = root_mean_square(errors)
        found.append(
            Case(
                bound=f"{kind} expert, bound",
                device=device,
                ratios=over(root, bound),
                error=over_error(error, bound),
            )
        )
        if device in GAUSSIAN:
            ratios, spread = over(root, exact), over_error(error, exact)
            found.append(
                Case(bound=f"{kind} expert, Gaussian noise", device=device, ratios=ratios, error=spread, exact=True)
            )
    return found


def converter_cases(seed: int) -> list[Case]:
    """Errors of converters, clipping included."""
    rng = np.random.default_rng(seed)
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
        ratios = over(np.linalg.norm(error, axis=1), np.linalg.norm(bound, axis=1))
        worst = float(over(error, bound).max())
        found.append(
            Case(
                bound="converters",
                device=f"{name} ranges",
                ratios=np.maximum(ratios, worst if worst > 1 else 0),
                error=NO_ERROR,
            )
        )
    return found


def quantization_cases(seed: int) -> list[Case]:
    """Errors of rounding to the nearest level: of a matrix from its steps, of a SwiGLU expert from the differences."""
    rng = np.random.default_rng(seed)
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
    return [
        Case(bound="quantization, linear", device=f"{bits} bits", ratios=over(off, linear), error=NO_ERROR),
        Case(bound="quantization, gated expert", device=f"{bits} bits", ratios=over(moved, bound), error=NO_ERROR),
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
    rng = np.random.default_rng(seed)
    experts, hidden = int(rng.choice([4, 9])), int(rng.choice(SIZES[1:]))
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
        found.append(Case(bound=f"routing, {name}", device="none", ratios=over(margin, nearest), error=NO_ERROR))
    return found


def search(cases: int, chips: int, devices: tuple[str, ...] = tuple(DEVICES), *, seed: int = 0) -> list[Case]:
    """Random cases of every bound, `cases` for every device."""
    found = list[Case]()
    for number in range(cases):
        first = 1000 * (cases * seed + number)
        for index, device in enumerate(devices):
            found += linear_cases(first + index, device, chips) + expert_cases(first + index, device, chips)
        found += converter_cases(first) + quantization_cases(first) + routing_cases(first)
    return found
