"""Programs whose FLOPs and communication are known, compiled for a mesh of 2 x 4 devices.

As a program, with the name of the devices as argument, it prints the compiled texts: JAX wants to know of simulated
devices before it starts.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetmoe.parallel.topology import described_devices

MESH = {"a": 2, "b": 4}
F32, BF16 = jnp.float32, jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Program:
    """`function(*arguments)` and its costs: (count, operand bytes, result bytes, bytes sent) of each collective."""

    function: Callable[..., Any]
    arguments: tuple[tuple[tuple[int, ...], Any, P], ...]
    flops: int
    traffic: dict[str, tuple[int, int, int, float]] = dataclasses.field(default_factory=dict)
    mapped: P | None = None  # the result's, if each device runs the function


def array(*shape, dtype=F32, spec=None):
    return shape, dtype, P() if spec is None else spec


def layers(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested(x, w):
    return lax.scan(lambda x, _: (layers(x, w), None), x, None, length=5)[0]


def downwards(x, w):
    """Steps at 9, 7, 5 and 3."""
    return lax.while_loop(lambda s: s[0] > 2, lambda s: (s[0] - 2, jnp.tanh(s[1] @ w)), (9, x))[1]


def branches(number, x, w):
    return lax.switch(number, [lambda x: x, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w], x)


X, W, WS = array(128, 256), array(256, 256), array(6, 256, 256)
LAYER = 2 * 128 * 256 * 256
SINGLE = {
    "matmul": Program(lambda x, w: x @ w, (array(96, 160), array(160, 224)), 2 * 96 * 160 * 224),
    "fused": Program(
        lambda x, w: jax.nn.relu(x @ w) + 1, (array(96, 160, dtype=BF16), array(160, 224, dtype=BF16)),
        2 * 96 * 160 * 224,
    ),
    "vector_matrix": Program(lambda x, w: x @ w, (array(160), array(160, 224)), 2 * 160 * 224),
    "matrix_vector": Program(lambda x, w: x @ w, (array(96, 160), array(160)), 2 * 96 * 160),
    "batched": Program(
        lambda x, w: jnp.einsum("bik,bkj->bij", x, w), (array(8, 96, 160), array(8, 160, 224)), 2 * 8 * 96 * 160 * 224
    ),
    "batch_inside": Program(
        lambda x, w: jnp.einsum("ibk,bjk->bij", x, w), (array(96, 8, 160), array(8, 224, 160)), 2 * 8 * 96 * 160 * 224
    ),
    "two_axes": Program(
        lambda x, w: jnp.einsum("ikl,klj->ij", x, w), (array(96, 4, 160), array(4, 160, 224)), 2 * 96 * 4 * 160 * 224
    ),
    "integers": Program(
        lambda x, w: lax.dot(x, w, preferred_element_type=jnp.int32),
        (array(96, 160, dtype=jnp.int8), array(160, 224, dtype=jnp.int8)), 2 * 96 * 160 * 224,
    ),
    "norm": Program(lambda x: x / jnp.sum(x * x), (X,), 0),
    "scan": Program(layers, (X, WS), 6 * LAYER),
    "nested": Program(nested, (X, WS), 30 * LAYER),
    "map": Program(lambda x, w: lax.map(lambda r: r @ w, x), (array(7, 64, 256), W), 7 * 2 * 64 * 256 * 256),
    "from_3_to_9": Program(lambda x, w: lax.fori_loop(3, 9, lambda _, x: jnp.tanh(x @ w), x), (X, W), 6 * LAYER),
    "downwards": Program(downwards, (X, W), 4 * LAYER),
    "branches": Program(branches, (array(dtype=jnp.int32), X, W), 2 * LAYER),
    "gradient": Program(lambda x, w: jax.grad(lambda w: layers(x, w).sum())(w), (X, WS), 3 * 6 * LAYER),
    "convolution": Program(  # a row of 30 outputs has 3 taps of 30, and 29 where the padding is
        lambda x, k: lax.conv_general_dilated(x, k, (1,), [(1, 1)]), (array(4, 16, 30), array(32, 16, 3)),
        2 * 4 * 32 * 16 * (30 + 2 * 29),
    ),
}  # fmt: skip


def _collectives(name, axes, size):
    """Each one over some axes with `size` devices, of an array of 64 KiB cut along them."""
    whole, part, share = 64 * 256 * 4, 64 * 256 * 4 // size, (size - 1) / size
    cut, everything = array(64, 256, spec=P(axes)), array(64, 256)

    def one(kind, function, argument, mapped, *traffic):
        return Program(function, (argument,), 0, {kind: (1, *traffic)}, mapped)

    ring = [(i, (i + 1) % size) for i in range(size)]
    return {
        f"psum_{name}": one("all-reduce", lambda x: lax.psum(x, axes), cut, P(), part, part, 2 * share * part),
        f"all_gather_{name}": one(
            "all-gather", lambda x: lax.all_gather(x, axes, tiled=True), cut, P(), part, whole, share * whole
        ),
        f"psum_scatter_{name}": one(
            "reduce-scatter", lambda x: lax.psum_scatter(x, axes, tiled=True), everything, P(axes), whole, part,
            share * whole,
        ),
        f"all_to_all_{name}": one(
            "all-to-all", lambda x: lax.all_to_all(x, axes, 1, 1, tiled=True), cut, P(axes), part, part, share * part
        ),
        f"ppermute_{name}": one(
            "collective-permute", lambda x: lax.ppermute(x, axes, ring), cut, P(axes), part, part, part
        ),
    }  # fmt: skip


def _summed_layers(x, w):
    return lax.scan(lambda x, w: (lax.psum(x @ w, "b"), None), x, w)[0]


def _gathered_in_turns(x):
    def gather(x, _):
        return lax.all_gather(x, "a", tiled=True)[:32] + 1, None

    return lax.scan(lambda x, _: (lax.scan(gather, x, None, length=3)[0] * 2, None), x, None, length=5)[0]


SPREAD = {
    **_collectives("a", "a", 2),
    **_collectives("b", "b", 4),
    **_collectives("ab", ("a", "b"), 8),
    "summed_layers": Program(
        _summed_layers, (array(64, 64, spec=P("a")), array(6, 64, 64)), 6 * 2 * 32 * 64 * 64,
        {"all-reduce": (6, 6 * 32 * 64 * 4, 6 * 32 * 64 * 4, 6 * 32 * 64 * 4 * 2 * 3 / 4)}, P("a"),
    ),
    "gathered_in_turns": Program(
        _gathered_in_turns, (array(64, 64, spec=P("a")),), 0,
        {"all-gather": (15, 15 * 32 * 64 * 4, 15 * 64 * 64 * 4, 15 * 32 * 64 * 4)}, P("a"),
    ),
}  # fmt: skip


def _exchanged(x, *offsets_and_sizes):
    return lax.ragged_all_to_all(x, jnp.zeros((512, 128), x.dtype), *offsets_and_sizes, axis_name="b")


def _sharded_layers(x, w1, w2):
    """Weights cut over both axes, as is what layers hand on: gathered where they are used."""

    def layer(x, w):
        y = x + jax.nn.relu(x @ w[0]) @ w[1]
        return lax.with_sharding_constraint(y, P("a", "b")), None

    return lax.scan(layer, x, (w1, w2))[0]


_GATHERED = 2048 * 4096 * 2  # bytes of inputs for 4 devices, and of each matrix for 2
# What CPUs have not.
TPU_ONLY = {
    "ragged_all_to_all": Program(
        _exchanged, (array(1024, 128, spec=P("b")), *[array(16, dtype=jnp.int32, spec=P("b"))] * 4), 0,
        {"ragged-all-to-all": (1, 256 * 128 * 4, 512 * 128 * 4, 256 * 128 * 4 * 3 / 4)}, P("b"),
    ),
    "ragged_dot": Program(lax.ragged_dot, (array(256, 128), array(4, 128, 256), array(4, dtype=jnp.int32)), 2**24),
    "sharded_layers": Program(
        _sharded_layers,
        (
            array(4096, 4096, dtype=BF16, spec=P("a", "b")), array(6, 4096, 8192, dtype=BF16, spec=P(None, "a", "b")),
            array(6, 8192, 4096, dtype=BF16, spec=P(None, "b", "a")),
        ),
        6 * 2 * 2 * 2048 * 4096 * 2048,
        {
            "all-gather": (
                18, 6 * (_GATHERED // 4 + 2 * _GATHERED // 2), 18 * _GATHERED, 6 * _GATHERED * (3 / 4 + 2 / 2),
            ),
            "reduce-scatter": (6, 6 * _GATHERED, 6 * _GATHERED // 4, 6 * _GATHERED * 3 / 4),
        },
    ),
}  # fmt: skip


def compiled_text(program, mesh):
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, spec)) for s, t, spec in program.arguments]
    function = program.function
    if program.mapped is not None:
        specs = tuple(spec for *_, spec in program.arguments)
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=program.mapped, check_vma=False)
    with jax.sharding.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


def main():
    devices = np.array(described_devices(sys.argv[1])[:8])
    mesh = Mesh(devices.reshape(*MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    programs = SPREAD | (TPU_ONLY if sys.argv[1].startswith("tpu") else {})
    texts = {name: compiled_text(program, mesh) for name, program in programs.items()}
    one = Mesh(devices[:1].reshape(1, 1), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    texts |= {name: compiled_text(program, one) for name, program in SINGLE.items()}
    print(json.dumps(texts))
