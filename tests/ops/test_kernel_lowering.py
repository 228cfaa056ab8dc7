"""Every kernel is accepted by the compilers' front ends for TPU and NVIDIA GPU, at the sizes of real models."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.api import digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import rows_per_block
from hetmoe.ops.grouped_crossbar.platforms import as_if_on

PLATFORMS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}  # what the program calls
EXPERTS = 64
# (hidden, intermediate, experts per token): OLMoE-1B-7B, DeepSeekMoE-16B (tiles of 470, 469 and 469 rows).
MODELS = {"olmoe": (2048, 1024, 8), "deepseek": (2048, 1408, 6)}
Shape = jax.ShapeDtypeStruct


def lowered(function: Any, platform: str, *shapes: Any) -> str:
    with as_if_on(platform):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def layer(spec: AnalogSpec, sides: Any, weights: Any, x: Any, chosen: Any, ranges: Any, analog: Any) -> jax.Array:
    """One layer's experts."""
    plan = dispatch(chosen, EXPERTS, rows_per_block(chosen.size, EXPERTS))
    blocks = to_blocks(x, plan)
    used = (plan.slot_token < x.shape[0]).reshape(blocks.shape[:2]).any(axis=1)
    run = functools.partial(
        expert_products, block_expert=plan.block_expert, used=used, analog=analog, spec=spec, implementation="pallas"
    )
    gate, up = run(blocks, weights[:2], sides[:2], input_range=ranges[0], read=(None, None))
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    (out,) = run(inner, weights[2:], sides[2:], input_range=ranges[1], read=(None,))
    return from_blocks(out, plan).sum(axis=1)


def arguments(model: str, tokens: int, dtype: Any, spec: AnalogSpec, *, seeded: bool, dynamic: bool) -> tuple[Any, ...]:
    hidden, inner, copies = MODELS[model]
    shapes = [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = tuple(Shape((EXPERTS, *shape), dtype) for shape in shapes)
    tiles = [-(-rows // 512) for rows, _ in shapes]
    columns = [n if spec.options.bound_axis == "column" else 1 for _, n in shapes]
    key = jax.eval_shape(lambda: jax.random.key(0))
    sides: tuple[Any, ...] = tuple(
        SeededMatrix(key=key) if seeded else ProgrammedMatrix(w=w, weight_max=Shape((EXPERTS, tile, n), jnp.float32))
        for w, tile, n in zip(weights, tiles, columns, strict=True)
    )
    ranges = (None, None) if dynamic else tuple(Shape((EXPERTS, tile), jnp.float32) for tile in (tiles[0], tiles[2]))
    x, chosen = Shape((tokens, hidden), dtype), Shape((tokens, copies), jnp.int32)
    return sides, weights, x, chosen, ranges, Shape((EXPERTS,), bool)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens", [1, 32, 500, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_real_models(model: str, dtype: Any, tokens: int, platform: str) -> None:
    spec = analog_spec(bound_axis="column" if tokens == 500 else "tile")
    given = arguments(model, tokens, dtype, spec, seeded=False, dynamic=tokens == 32)
    text = lowered(functools.partial(layer, spec), platform, *given)
    assert text.count(PLATFORMS[platform]) == 2  # gate and up share one call


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("device", ["pcm", "hermes", "reram_cmo", "additive"])
def test_programming_in_the_kernel(device: str, platform: str) -> None:
    time = {} if device == "additive" else {"time_s": 3600.0, "drift_compensation": True}
    spec = analog_spec(device, **time)
    given = arguments("deepseek", 32, jnp.bfloat16, spec, seeded=True, dynamic=False)
    text = lowered(functools.partial(layer, spec), platform, *given)
    assert text.count(PLATFORMS[platform]) == 2


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
def test_gradients_and_seeds(platform: str, seeded: bool) -> None:
    """Of inputs and weights, and over mapped seeds."""
    spec = analog_spec()
    sides, weights, *rest = arguments("olmoe", 32, jnp.bfloat16, spec, seeded=seeded, dynamic=False)

    def loss(sides: Any, weights: Any, x: Any, chosen: Any, ranges: Any, analog: Any) -> jax.Array:
        return jnp.sum(layer(spec, sides, weights, x, chosen, ranges, analog))

    text = lowered(jax.value_and_grad(loss, argnums=(1, 2)), platform, sides, weights, *rest)
    assert text.count(PLATFORMS[platform]) >= 2
    mapped = jax.tree.map(lambda leaf: Shape((8, *leaf.shape), leaf.dtype), sides)
    over_seeds = jax.vmap(functools.partial(layer, spec), in_axes=(0, None, None, None, None, None))
    assert lowered(over_seeds, platform, mapped, weights, *rest).count(PLATFORMS[platform]) == 2


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("model", "dtype", "tokens", "axis"),
    [
        ("deepseek", jnp.float32, 500, "column"),
        ("olmoe", jnp.bfloat16, 4096, "tile"),
        ("deepseek", jnp.bfloat16, 1, "tile"),
    ],
    ids=["deepseek-f32", "olmoe-bf16-long", "deepseek-bf16-one_token"],
)
def test_gradients_of_layers(model: str, dtype: Any, tokens: int, axis: Any, platform: str) -> None:
    """Of inputs, clean weights and stored ones: each call of the forward pass and three of its gradients."""
    spec = analog_spec(bound_axis=axis)
    sides, weights, x, *rest = arguments(model, tokens, dtype, spec, seeded=False, dynamic=tokens == 1)

    def loss(*given: Any) -> jax.Array:
        return jnp.sum(layer(spec, *given))

    text = lowered(jax.grad(loss, argnums=(0, 1, 2)), platform, sides, weights, x, *rest)
    assert text.count(PLATFORMS[platform]) == 8


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("model", MODELS)
def test_experts_without_crossbars(model: str, dtype: Any, tokens: int, platform: str) -> None:
    """Forward and backward; no copy of the weights is made, also not of DeepSeekMoE's 1408 rows."""
    hidden, inner, copies = MODELS[model]

    def products(x: jax.Array, mid: jax.Array, w: tuple[jax.Array, ...], chosen: jax.Array) -> tuple[jax.Array, ...]:
        plan = dispatch(chosen, EXPERTS, rows_per_block(chosen.size, EXPERTS))
        used = jnp.ones(plan.block_expert.shape, bool)
        run = functools.partial(digital_products, block_expert=plan.block_expert, used=used, implementation="pallas")
        return (*run(to_blocks(x, plan), w[:2]), *run(to_blocks(mid, plan), w[2:]))

    def loss(x: jax.Array, mid: jax.Array, w: tuple[jax.Array, ...], chosen: jax.Array) -> jax.Array:
        return sum((jnp.sum(y) for y in products(x, mid, w, chosen)), jnp.float32(0))

    shapes = [(hidden, inner), (hidden, inner), (inner, hidden)]
    given = (
        Shape((tokens, hidden), dtype), Shape((tokens, inner), dtype),
        tuple(Shape((EXPERTS, *shape), dtype) for shape in shapes), Shape((tokens, copies), jnp.int32),
    )  # fmt: skip
    text = lowered(products, platform, *given)
    assert text.count(PLATFORMS[platform]) == 2
    copies_of_weights = [line for line in text.splitlines() if re.search(rf"(pad|concat).*<{EXPERTS}x\d+x\d+x", line)]
    assert not copies_of_weights
    assert lowered(jax.grad(loss, argnums=(0, 1, 2)), platform, *given).count(PLATFORMS[platform]) >= 4


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rows", [1, 32, 4096])
@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.bfloat16, None), (jnp.float32, 8)])
def test_one_matrix(rows: int, dtype: Any, bits: int | None, platform: str) -> None:
    """The LM head of DeepSeekMoE."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return crossbar_matmul(x, w, dac_bits=bits, adc_bits=bits, implementation="pallas")

    text = lowered(product, platform, Shape((rows, 2048), dtype), Shape((2048, 102400), dtype))
    assert text.count(PLATFORMS[platform]) == 1


def test_large_tiles_have_fewer_columns_or_are_refused_on_tpu() -> None:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return crossbar_matmul(x, w, tile_rows=10**6, implementation="pallas")

    def shapes(rows: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
        return Shape((16, rows), dtype), Shape((rows, 1024), dtype)

    # A step sees as many columns as fit: 1024 rows of 512 in float32 are 2 MiB.
    for rows, columns, dtype in ((1024, 512, "f32"), (2048, 256, "f32"), (4096, 128, "f32"), (8192, 128, "bf16")):
        given = shapes(rows, jnp.float32 if dtype == "f32" else jnp.bfloat16)
        assert f"Ref<default>{{{dtype}[1,{rows},{columns}]}}" in str(jax.jit(product).trace(*given).jaxpr)
        assert lowered(product, "tpu", *given).count(PLATFORMS["tpu"]) == 1
    with pytest.raises(NotImplementedError, match=r"tiles of 4097 rows .* tile_rows of at most 4096"):
        lowered(product, "tpu", *shapes(4097))
    assert lowered(product, "cuda", *shapes(4097)).count(PLATFORMS["cuda"]) == 1


def test_other_platforms_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="runs on TPU and NVIDIA GPU"):
        lowered(
            lambda x, w: crossbar_matmul(x, w, implementation="pallas"), "cpu", Shape((4, 8), jnp.float32),
            Shape((8, 8), jnp.float32),
        )  # fmt: skip
