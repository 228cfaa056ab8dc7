"""The cases of `bench_kernels.py`: operands and programs, ours and plain ones."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

import hetmoe
from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, matrix_key, realise
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import block_max, row_blocks
from hetmoe.models.abstract import init_params
from hetmoe.models.hardware import LayerHardware, Probe
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.moe import routed_experts
from hetmoe.models.params import FeedForward
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import head_logits, hidden_states
from hetmoe.ops.dispatch import choose_block_size, dispatch, to_blocks
from hetmoe.ops.grouped_crossbar.api import digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import BLOCKS_MULTIPLE, rows_per_block
from hetmoe.ops.grouped_matmul.xla import grouped_matmul
from kernel_quantized import BITS, make_grid, quantize_layer, quantized_products, weight_bytes
from kernel_work import (
    Sizes,
    Work,
    backward_work,
    crossbar_work,
    grouped_work,
    model_work,
    quantized_work,
    seed_work,
)  # fmt: skip

DTYPE, INPUT_RANGE = jnp.bfloat16, 3.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and its operands, which are arguments and not constants of the compiled program."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed together: our programs by name, and plain ones. Ours do the plain one's work `repeats` times."""

    work: Work
    ours: dict[str, Program]
    plain: dict[str, Program]
    repeats: int = 1
    tokens: int | None = None  # of one of our calls, where tokens per second are of interest
    weight_bytes: int | None = None  # of one layer's experts, where memory is of interest
    own_work: dict[str, Work] = dataclasses.field(default_factory=dict)  # of ours that read something else than `work`
    own_weight_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # likewise, of one layer's experts


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = DTYPE) -> Array:
    return _normal(jax.random.key(seed), scale, shape, dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: Array, scale: float, shape: tuple[int, ...], dtype: Any) -> Array:
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def tile_ranges(spec: AnalogSpec, rows: int, *stack: int) -> Array:
    """Static DAC ranges."""
    return jnp.full((*stack, len(row_blocks(rows, spec.options.tile_rows))), INPUT_RANGE)


def plain_matmul(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def crossbar_case(sizes: Sizes, implementation: str) -> Case:
    """One matrix; its maxima are given, as programming leaves them."""
    spec = hetmoe.analog_spec()
    x, w = normal(0, sizes.side, sizes.side), normal(1, sizes.side, sizes.side, scale=0.02)
    maxima = block_max(w, spec.options.tile_rows, per_column=False)

    def run(x: Array, w: Array, ranges: Array, maxima: Array) -> Array:
        return hetmoe.crossbar_matmul(x, w, input_range=ranges, weight_max=maxima, implementation=implementation)

    ours = Program(run, (x, w, tile_ranges(spec, sizes.side), maxima))
    return Case(work=crossbar_work(sizes), ours={"": ours}, plain={"matmul": Program(plain_matmul, (x, w))})


_dispatch = jax.jit(dispatch, static_argnums=(1, 2), static_argnames="multiple")


@struct.dataclass
class Experts:
    """Operands of gate, up and down: rows in blocks of one expert each, and the experts."""

    x: Array  # [blocks, block, hidden]
    mid: Array  # [blocks, block, inner]; drawn, so that the three products are all that is timed
    clean: FeedForward
    programmed: FeedForward
    maxima: FeedForward  # of the programmed weights, by tile
    block_expert: Array
    used: Array


def random_routing(sizes: Sizes, tokens: int) -> np.ndarray:
    """Different experts of every token, all equally likely."""
    c = sizes.config
    scores = np.random.default_rng(0).random((tokens, c.num_experts))
    return np.argsort(scores, axis=1)[:, : c.experts_per_token].astype(np.int32)


def make_clean(sizes: Sizes) -> FeedForward:
    experts, hidden, inner = sizes.config.num_experts, sizes.config.hidden_size, sizes.config.expert_intermediate_size
    gate, up = (normal(seed, experts, hidden, inner, scale=0.02) for seed in (2, 3))
    return FeedForward(gate=gate, up=up, down=normal(4, experts, inner, hidden, scale=0.02))


@jax.jit
def program_layer(key: Array, clean: FeedForward, spec: AnalogSpec) -> dict[str, ProgrammedMatrix]:
    """One layer's experts as `program` stores them."""
    return {name: realise(side, getattr(clean, name), spec) for name, side in seeded_layer(key).items()}


def seeded_layer(key: Array) -> dict[str, SeededMatrix]:
    return {name: SeededMatrix(key=matrix_key(key, name, 0)) for name in ("gate", "up", "down")}


def make_experts(sizes: Sizes, chosen: np.ndarray, block: int) -> Experts:
    clean, spec = make_clean(sizes), hetmoe.analog_spec()
    plan = _dispatch(chosen, sizes.config.num_experts, block, multiple=BLOCKS_MULTIPLE)
    x = jax.jit(to_blocks)(normal(0, len(chosen), sizes.config.hidden_size), plan)
    stored = program_layer(jax.random.key(5), clean, spec)
    return Experts(
        x=x,
        mid=normal(1, *x.shape[:2], sizes.config.expert_intermediate_size),
        clean=clean,
        programmed=FeedForward(**{name: matrix.w for name, matrix in stored.items()}),
        maxima=FeedForward(**{name: matrix.weight_max for name, matrix in stored.items()}),
        block_expert=plan.block_expert,
        used=(plan.slot_token < len(chosen)).reshape(x.shape[:2]).any(axis=1),
    )


def crossbar_products(operands: Experts, implementation: str) -> tuple[Array, ...]:
    """Gate and up of `x`, down of `mid`, all experts analog."""
    o, spec = operands, hetmoe.analog_spec()

    def multiply(x: Array, *names: str) -> tuple[Array, ...]:
        clean = tuple(getattr(o.clean, name) for name in names)
        sides = tuple(ProgrammedMatrix(w=getattr(o.programmed, n), weight_max=getattr(o.maxima, n)) for n in names)
        experts, rows = clean[0].shape[:2]
        return expert_products(
            x, clean, sides, block_expert=o.block_expert, used=o.used, analog=jnp.ones((experts,), bool),
            input_range=tile_ranges(spec, rows, experts), spec=spec, read=(None,) * len(names),
            implementation=implementation,
        )  # fmt: skip

    return (*multiply(o.x, "gate", "up"), *multiply(o.mid, "down"))


def _products(multiply: Callable[[Array, Array], Array], x: Array, mid: Array, w: FeedForward) -> tuple[Array, ...]:
    return multiply(x, w.gate), multiply(x, w.up), multiply(mid, w.down)


def _ragged_products(x: Array, mid: Array, w: FeedForward, groups: Array) -> tuple[Array, ...]:
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=groups, preferred_element_type=jnp.float32)
    return _products(dot, x, mid, w)


def _equal_products(x: Array, mid: Array, w: FeedForward) -> tuple[Array, ...]:
    return _products(plain_matmul, x, mid, w)


def _block_products(x: Array, mid: Array, w: FeedForward, block_expert: Array) -> tuple[Array, ...]:
    return _products(lambda rows, of: grouped_matmul(rows, of, block_expert, None), x, mid, w)


def _kernel_products(x: Array, mid: Array, w: FeedForward, block_expert: Array) -> tuple[Array, ...]:
    used = jnp.ones(block_expert.shape, bool)
    run = functools.partial(digital_products, block_expert=block_expert, used=used, implementation="pallas")
    return (*run(x, (w.gate, w.up)), *run(mid, (w.down,)))


def plain_products(sizes: Sizes, chosen: np.ndarray, clean: FeedForward) -> dict[str, Program]:
    """The plain grouped matmuls of this platform; each program starts with the rows, the inner rows and the weights."""
    c, copies = sizes.config, chosen.size
    groups = np.bincount(chosen.reshape(-1), minlength=c.num_experts).astype(np.int32)

    def rows(*shape: int) -> tuple[Array, Array]:
        return normal(6, *shape, c.hidden_size), normal(7, *shape, c.expert_intermediate_size)

    if jax.default_backend() == "cpu":  # where ragged_dot is far slower
        plan = _dispatch(chosen, c.num_experts, choose_block_size(copies, c.num_experts))
        blocks = rows(len(plan.block_expert), plan.block_size)
        return {"grouped_matmul": Program(_block_products, (*blocks, clean, plan.block_expert))}
    # XLA may have no fast ragged_dot for a GPU; "equal groups" has the same work where all loads are equal.
    plan = _dispatch(chosen, c.num_experts, rows_per_block(copies, c.num_experts), multiple=BLOCKS_MULTIPLE)
    blocks = rows(len(plan.block_expert), plan.block_size)
    return {
        "digital kernels": Program(_kernel_products, (*blocks, clean, plan.block_expert)),
        "ragged_dot": Program(_ragged_products, (*rows(copies), clean, jnp.asarray(groups))),
        "equal groups": Program(_equal_products, (*rows(c.num_experts, copies // c.num_experts), clean)),
    }


def grouped_case(sizes: Sizes, tokens: int, implementation: str) -> Case:
    chosen = random_routing(sizes, tokens)
    operands = make_experts(sizes, chosen, block_rows(chosen.size, sizes, implementation))
    run = functools.partial(crossbar_products, implementation=implementation)
    return Case(
        work=grouped_work(sizes, tokens, len(np.unique(chosen))),
        ours={"": Program(run, (operands,))},
        plain=plain_products(sizes, chosen, operands.clean),
    )


def quantized_case(sizes: Sizes, tokens: int, implementation: str) -> Case:
    """The products of `grouped` with packed weights, which are rounded from those of the plain programs.

    `implementation` and "xla", each with the blocks that a model would cut for it.
    """
    c, chosen, clean = sizes.config, random_routing(sizes, tokens), make_clean(sizes)
    case = Case(
        work=grouped_work(sizes, tokens, len(np.unique(chosen))), ours={}, plain=plain_products(sizes, chosen, clean),
        weight_bytes=weight_bytes(clean),
    )  # fmt: skip
    layers = {bits: quantize_layer(clean, make_grid(sizes, bits)) for bits in BITS}
    for name in dict.fromkeys((implementation, "xla")):
        multiple = 1 if name == "xla" else BLOCKS_MULTIPLE
        plan = _dispatch(chosen, c.num_experts, block_rows(chosen.size, sizes, name), multiple=multiple)
        shape = (len(plan.block_expert), plan.block_size)
        rows = normal(0, *shape, c.hidden_size), normal(1, *shape, c.expert_intermediate_size)
        used = (plan.slot_token < tokens).reshape(shape).any(axis=1)
        run = functools.partial(quantized_products, implementation=name)
        for bits, layer in layers.items():
            way = f"{bits} bits" if name == implementation else f"{bits} bits, {name}"
            case.ours[way] = Program(run, (*rows, layer, plan.block_expert, used))
            case.own_work[way] = quantized_work(sizes, tokens, len(np.unique(chosen)), make_grid(sizes, bits))
            case.own_weight_bytes[way] = weight_bytes(layer)
    return case


def block_rows(copies: int, sizes: Sizes, implementation: str) -> int:
    """Rows of a block, as the model chooses them."""
    choose = choose_block_size if implementation == "xla" else rows_per_block
    return choose(copies, sizes.config.num_experts)


def backward_case(sizes: Sizes, implementation: str) -> Case:
    """Gradients of the rows and the weights; the programmed ones are those that the products use."""
    chosen = random_routing(sizes, sizes.tokens)
    operands = make_experts(sizes, chosen, block_rows(chosen.size, sizes, implementation))

    def ours(x: Array, mid: Array, w: FeedForward, rest: Experts) -> tuple[Array, ...]:
        return crossbar_products(dataclasses.replace(rest, x=x, mid=mid, programmed=w), implementation)

    forward = Program(ours, (operands.x, operands.mid, operands.programmed, operands))
    plain = plain_products(sizes, chosen, operands.clean)
    return Case(
        work=backward_work(sizes, sizes.tokens),
        ours={"": _gradient(forward)},
        plain={name: _gradient(program) for name, program in plain.items()},
    )


def _gradient(forward: Program) -> Program:
    """The gradient of `sum(y * g)` by the first three arguments."""
    shapes = jax.eval_shape(forward.function, *forward.arguments)
    grads = tuple(normal(8, *y.shape, dtype=y.dtype) for y in shapes)

    def loss(x: Array, mid: Array, w: FeedForward, rest: tuple[Any, ...], grads: tuple[Array, ...]) -> Array:
        results = forward.function(x, mid, w, *rest)
        return sum((jnp.sum(y * g) for y, g in zip(results, grads, strict=True)), jnp.float32(0))

    return Program(jax.grad(loss, argnums=(0, 1, 2)), (*forward.arguments[:3], forward.arguments[3:], grads))


def seeds_case(sizes: Sizes, tokens: int, implementation: str) -> Case:
    """A layer's experts for every seed, programming, dispatch and SwiGLU included.

    `stored` is one seed with programmed weights given: what the others need beside it is the memory of programming.
    It is the first, and the others follow in the order of the memory that they should need.
    """
    spec, chosen, clean = hetmoe.analog_spec(), random_routing(sizes, tokens), make_clean(sizes)
    x, weights = normal(0, tokens, sizes.config.hidden_size), jnp.full(chosen.shape, 1 / chosen.shape[1])
    routing = Routing(logits=jnp.zeros((tokens, sizes.config.num_experts)), chosen=jnp.asarray(chosen), weights=weights)

    def run(x: Array, clean: FeedForward, routing: Routing, programmed: Any) -> Array:
        experts, rows, inner = clean.gate.shape
        hardware = LayerHardware(
            experts=jnp.ones((experts,), bool), dense={}, programmed=programmed, read_key=None, spec=spec,
            ranges={"experts_in": tile_ranges(spec, rows, experts), "experts_mid": tile_ranges(spec, inner, experts)},
            implementation=implementation,
        )  # fmt: skip
        return routed_experts(x, clean, routing, hardware, Probe(None), implementation).sum(
            axis=1
        )  # results of all seeds are small

    def kernel(x: Array, clean: FeedForward, routing: Routing, keys: Array) -> Array:
        return jax.lax.map(lambda key: run(x, clean, routing, seeded_layer(key)), keys)

    def kernel_vmapped(x: Array, clean: FeedForward, routing: Routing, keys: Array) -> Array:
        return jax.vmap(lambda key: run(x, clean, routing, seeded_layer(key)))(keys)

    def layer(x: Array, clean: FeedForward, routing: Routing, keys: Array) -> Array:
        return jax.lax.map(lambda key: run(x, clean, routing, program_layer(key, clean, spec)), keys)

    def copies(x: Array, clean: FeedForward, routing: Routing, keys: Array) -> Array:
        programmed = jax.lax.map(lambda key: program_layer(key, clean, spec), keys)
        return jax.lax.map(lambda one: run(x, clean, routing, one), programmed)

    shared, keys = (x, clean, routing), jax.random.split(jax.random.key(9), sizes.seeds)
    stored = program_layer(keys[0], clean, spec)
    ways = {
        function.__name__: Program(function, (*shared, keys)) for function in (kernel, kernel_vmapped, layer, copies)
    }
    return Case(
        work=seed_work(sizes, tokens, len(np.unique(chosen))),
        ours={"stored": Program(run, (*shared, stored))} | ways,
        plain=plain_products(sizes, chosen, clean),
        repeats=sizes.seeds,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(clean)),
    )


def model_case(sizes: Sizes, implementation: str) -> Case:
    """Log-likelihoods of a random model, experts analog, dynamic ranges, programmed layer by layer for every seed."""
    config, spec = sizes.config, hetmoe.analog_spec()
    params = jax.jit(init_params, static_argnames=("config", "dtype"))(jax.random.key(0), config, dtype=DTYPE)
    shape = (sizes.sequences, sizes.seq + 1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, shape, dtype=np.int32))
    plan = hetmoe.experts_analog(config)

    def loss(params: Any, tokens: Array, analog: dict[str, Any]) -> Array:
        nothing = dict.fromkeys(("plan", "spec", "programmed", "calibration", "read_key"))
        arguments: dict[str, Any] = nothing | analog
        hidden, _, _ = hidden_states(params, tokens[:, :-1], config, **arguments)
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = choice_log_probs(
            lambda part, first: head_logits(part, params, first_row=first, **arguments),
            flat,
            tokens[:, 1:].reshape(-1, 1),
        )
        return -jnp.mean(found)

    def over_seeds(params: Any, tokens: Array, keys: Array) -> Array:
        def one(key: Array) -> Array:
            programmed = hetmoe.seeded_weights(key, dense=False, when="layer")
            analog = {"plan": plan, "spec": spec, "programmed": programmed, "implementation": implementation}
            return loss(params, tokens, analog)

        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(2), sizes.seeds)
    return Case(
        work=model_work(sizes),
        ours={"": Program(over_seeds, (params, tokens, keys))},
        plain={"digital model": Program(lambda p, t: loss(p, t, {"implementation": implementation}), (params, tokens))},
        repeats=sizes.seeds,
        tokens=sizes.seeds * sizes.sequences * sizes.seq,
    )


# Those whose memory is of interest come first: a device's record of its peak is never reset.
CASES: dict[str, Callable[[Sizes, str], Case]] = {
    "seeds-decode": lambda sizes, name: seeds_case(sizes, sizes.decode_tokens, name),
    "seeds": lambda sizes, name: seeds_case(sizes, sizes.tokens, name),
    "crossbar": crossbar_case,
    "grouped": lambda sizes, name: grouped_case(sizes, sizes.tokens, name),
    "decode": lambda sizes, name: grouped_case(sizes, sizes.decode_tokens, name),
    "quantized-decode": lambda sizes, name: quantized_case(sizes, sizes.decode_tokens, name),
    "quantized": lambda sizes, name: quantized_case(sizes, sizes.tokens, name),
    "model": model_case,
    "backward": backward_case,
}
