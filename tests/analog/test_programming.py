"""Which draw every weight gets, and what programming leaves as it was."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import PCM, Device, Draw, GroupRange, NoiseMoments, Programmed, Stream
from hetmoe.analog.devices.base import Scalar, ScaleGroup
from hetmoe.analog.programming import ProgrammedWeights, program, program_matrix
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.matrices import Matrix
from hetmoe.models.params import Params
from tests.models.analog_tiny import matrices_of

CONFIG = ModelConfig(
    family="olmoe", vocab_size=14, hidden_size=12, expert_intermediate_size=10, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, qk_norm="width", num_experts=4, experts_per_token=2, norm_topk_prob=False,
    clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=1e4), max_position_embeddings=32, tie_embeddings=False,
)  # fmt: skip
EXPERT_MATRICES = ("gate", "up", "down")
DENSE_MATRICES = ("q", "k", "v", "o")
TILE_ROWS = 5  # hidden 12 -> 4, 4, 4; inner 10 -> 5, 5
compiled = jax.jit(program, static_argnames="dense")
compiled_matrix = jax.jit(program_matrix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(Device):
    """Adds the normals of one stream, times c, to the weights: shows the draws themselves."""

    name: str = "bare"
    scale_group: ScaleGroup = "none"
    stream: Stream = Stream.PROGRAM_PLUS

    def program(
        self, w: jax.Array, *, scale: GroupRange, draw: Draw, noise_scale: Scalar, time_s: Scalar | None
    ) -> Programmed:
        del scale, time_s  # Unused.
        noisy = w + noise_scale * draw(self.stream)
        return Programmed(noisy, noisy)

    def programming_moments(self, w: jax.Array, *, scale: GroupRange, noise_scale: Scalar) -> NoiseMoments:
        del scale  # Unused.
        return NoiseMoments(jnp.zeros_like(w), jnp.full_like(w, noise_scale) ** 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fading(Bare):
    """Loses half of every weight, more or less, by the time of 1 s, and more later; `initial` is the target."""

    name: str = "fading"

    @property
    def has_drift(self) -> bool:
        return True

    def program(
        self, w: jax.Array, *, scale: GroupRange, draw: Draw, noise_scale: Scalar, time_s: Scalar | None
    ) -> Programmed:
        del scale  # Unused.
        return Programmed(w, w if time_s is None else w * (0.5 + 0.1 * noise_scale * draw(self.stream)) / time_s)


@functools.cache
def params(dtype: Any = jnp.float32) -> Params:
    """Random parameters; the bf16 ones have a tied head."""
    rng = np.random.default_rng(1)

    def draw(leaf: Leaf) -> np.ndarray:
        return rng.standard_normal(leaf.shape).astype(np.float32).astype(dtype)

    model = jax.tree.map(draw, abstract_params(CONFIG), is_leaf=is_leaf)
    return model if dtype == jnp.float32 else model.replace(lm_head=None)


def bare(dtype: Any = jnp.float32, **changes: Any) -> AnalogSpec:
    """Maxima per tile for float32 models, per column for bf16 ones: so two compiles serve most tests."""
    axis = "tile" if dtype == jnp.float32 else "column"
    return analog_spec(Bare(), tile_rows=TILE_ROWS, bound_axis=axis, **changes)


def run(seed: int, model: Params, spec: AnalogSpec, *, dense: bool = False) -> ProgrammedWeights:
    return jax.tree.map(np.asarray, compiled(jax.random.key(seed), model, spec, dense=dense))


def run_matrix(seed: int, w: np.ndarray, spec: AnalogSpec, expert: int = 0) -> np.ndarray:
    return np.asarray(compiled_matrix(jax.random.key(seed), jnp.asarray(w), spec, expert=expert))


def normals(seed: int, path: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """JAX's own normals of a key with `path` folded in; draws are counted, so a short shape has the first of a long."""
    key = functools.reduce(jax.random.fold_in, path, jax.random.key(seed))
    with jax.threefry_partitionable(True):
        return np.asarray(jax.random.normal(key, (200,)))[: math.prod(shape)].reshape(shape)


def test_the_numbers_that_seeds_depend_on_never_change() -> None:
    wanted = {"GATE": 0, "UP": 1, "DOWN": 2, "Q": 3, "K": 4, "V": 5, "O": 6, "LM_HEAD": 7}
    later = ("SHARED_GATE", "SHARED_UP", "SHARED_DOWN", "FFN_GATE", "FFN_UP", "FFN_DOWN", "Q_A", "Q_B", "KV_A", "KV_B")
    wanted |= {name: number for number, name in enumerate(later, 8)}
    assert {matrix.name: matrix.value for matrix in Matrix} == wanted
    streams = ("PROGRAM_PLUS", "PROGRAM_MINUS", "DRIFT_PLUS", "DRIFT_MINUS", "READ_PLUS", "READ_MINUS")
    assert {stream.name: stream.value for stream in Stream} == {name: index for index, name in enumerate(streams)}


def test_every_weight_gets_the_draw_of_its_place() -> None:
    """Key, layer, matrix, stream, expert, then `i * N + j`; and all of these draws differ."""
    found = run(5, jax.tree.map(np.zeros_like, params()), bare(), dense=True)
    stream, seen = Stream.PROGRAM_PLUS, []
    for layer in range(CONFIG.num_layers):
        for name in EXPERT_MATRICES:
            for expert, w in enumerate(found.layers[name].w[layer]):
                np.testing.assert_array_equal(w, normals(5, (layer, Matrix[name.upper()], stream, expert), w.shape))
                seen.append(float(w[0, 0]))
        for name in DENSE_MATRICES:
            w = found.layers[name].w[layer]
            np.testing.assert_array_equal(w, normals(5, (layer, Matrix[name.upper()], stream, 0), w.shape))
            seen.append(float(w[0, 0]))
    assert found.lm_head is not None
    path = (CONFIG.num_layers, Matrix.LM_HEAD, stream, 0)  # as if it were one more layer
    np.testing.assert_array_equal(found.lm_head.w, normals(5, path, (CONFIG.hidden_size, CONFIG.vocab_size)))
    seen.append(float(found.lm_head.w[0, 0]))
    assert len(set(seen)) == len(seen) == 2 * (3 * 4 + 4) + 1


def test_every_stream_and_expert_has_its_own_draws() -> None:
    @jax.jit
    def draw_all(key: jax.Array, expert: jax.Array) -> list[jax.Array]:
        zero = jnp.zeros((11, 7), jnp.float32)
        return [program_matrix(key, zero, analog_spec(Bare(stream=stream)), expert=expert) for stream in Stream]

    seen = []
    for expert in (0, 5):
        for stream, found in zip(Stream, draw_all(jax.random.key(5), jnp.asarray(expert)), strict=True):
            np.testing.assert_array_equal(found, normals(5, (stream, expert), found.shape))
            seen.append(float(found[0, 0]))
    assert len(set(seen)) == 12


def test_draws_do_not_depend_on_tiles() -> None:
    """Sigma may, through the maximum that scales it: here all weights of the pair have one magnitude."""
    w = np.random.default_rng(0).standard_normal((23, 9)).astype(np.float32)
    for weights, device in ((w, Bare()), (0.1 * np.sign(w), PCM())):
        small, large = (run_matrix(5, weights, analog_spec(device, tile_rows=rows)) for rows in (5, 512))
        np.testing.assert_array_equal(small, large)
        assert len(np.unique(small)) == w.size


def test_experts_are_independent() -> None:
    before, changed = run(5, params(), analog_spec(PCM())), jax.tree.map(np.copy, params())
    changed.layers.moe.experts.gate[1, 2] *= 3
    changed.layers.moe.experts.down[0, 1] += 1
    after = run(5, changed, analog_spec(PCM()))
    for name, here in (("gate", (1, 2)), ("up", None), ("down", (0, 1))):
        same = np.all(before.layers[name].w == after.layers[name].w, axis=(-2, -1))
        wanted = np.ones((CONFIG.num_layers, CONFIG.num_experts), bool)
        if here is not None:
            wanted[here] = False
        np.testing.assert_array_equal(same, wanted)


def test_a_key_is_a_seed() -> None:
    first, again, other = (run(seed, params(), analog_spec(PCM())) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name in EXPERT_MATRICES:
        ours, theirs = first.layers[name].w, other.layers[name].w
        assert np.mean(ours != theirs) > 0.99


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_noise_the_weights_stay_and_keep_their_dtype(dtype: Any) -> None:
    model = params(dtype)
    found = run(5, model, bare(dtype, noise_scale=0.0), dense=True)
    for name in (*EXPERT_MATRICES, *DENSE_MATRICES):
        w, clean = found.layers[name].w, matrices_of(model.layers)[name]
        assert w.dtype == dtype
        np.testing.assert_array_equal(w.astype(np.float32), clean.astype(np.float32))
    assert found.lm_head is not None and found.lm_head.w.dtype == dtype
    head = model.embed.T if model.lm_head is None else model.lm_head
    np.testing.assert_array_equal(found.lm_head.w.astype(np.float32), head.astype(np.float32))


def test_noise_is_drawn_in_float32_and_stored_in_the_dtype_of_the_weights() -> None:
    low = params(jnp.bfloat16)
    stored = run(5, low, bare(jnp.bfloat16), dense=True)
    head = np.zeros((CONFIG.hidden_size, CONFIG.vocab_size), np.float32)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), low).replace(lm_head=head)
    exact = run(5, wide, bare(), dense=True)
    for name in (*EXPERT_MATRICES, *DENSE_MATRICES):
        w = stored.layers[name].w
        assert w.dtype == jnp.bfloat16
        np.testing.assert_array_equal(w, exact.layers[name].w.astype(jnp.bfloat16))


@pytest.mark.parametrize(("axis", "dtype"), [("tile", jnp.float32), ("column", jnp.bfloat16)])
def test_maxima_are_those_of_the_stored_weights(axis: str, dtype: Any) -> None:
    found = run(5, params(dtype), bare(dtype), dense=True)
    for name in EXPERT_MATRICES:
        matrix = found.layers[name]
        assert matrix.weight_max.dtype == np.float32
        w = np.abs(matrix.w.astype(np.float32))
        blocks = np.array_split(w, -(-w.shape[-2] // TILE_ROWS), axis=-2)  # the larger parts first, as `row_blocks`
        largest = [np.max(b, axis=-2 if axis == "column" else (-2, -1)).reshape(2, 4, -1) for b in blocks]
        np.testing.assert_array_equal(matrix.weight_max, np.stack(largest, axis=2))


def test_dense_matrices_are_programmed_on_demand_only() -> None:
    found = run(5, params(), analog_spec(PCM()))
    assert found.lm_head is None
    assert found.layers.keys() == set(EXPERT_MATRICES)
    assert not found.dense_layers
    everything = run(5, params(), bare(), dense=True)
    assert everything.layers.keys() == {*EXPERT_MATRICES, *DENSE_MATRICES}


def test_one_compile_for_a_sweep() -> None:
    """Noise scales, times, converter bounds, read-noise magnitudes and seeds are data."""
    sweep = [(0, 1.0, 1.0, 12.0, 0.1), (1, 1.0, 1.0, 12.0, 0.1), (0, 0.5, 1.0, 9.0, 0.2), (0, 1.0, 1e6, 12.0, 0.1)]
    model = jax.jit(chex.assert_max_traces(program, n=1), static_argnames="dense")
    matrix = jax.jit(chex.assert_max_traces(program_matrix, n=1))
    w, outputs = params().layers.moe.experts.gate[0, 0], []
    for seed, scale, time_s, bound, std in sweep:
        swept = {"noise_scale": scale, "time_s": time_s, "adc_bound": bound, "read_noise": make_read_noise("pcm", std)}
        model.trace(jax.random.key(seed), params(), analog_spec(PCM(), **swept), dense=False)  # slow to compile
        outputs.append(np.asarray(matrix(jax.random.key(seed), w, analog_spec(Fading(), **swept), expert=seed)))
    assert len({w.tobytes() for w in outputs}) == len(sweep)


def test_vmap_over_keys_equals_loop() -> None:
    spec, keys = bare(), jax.random.split(jax.random.key(2), 3)

    def call(key: jax.Array, model: Params) -> ProgrammedWeights:
        return program(key, model, spec, dense=False)

    together = jax.jit(jax.vmap(call, in_axes=(0, None)))(keys, params())
    for index, key in enumerate(keys):
        alone = compiled(key, params(), spec, dense=True)
        for name in EXPERT_MATRICES:
            np.testing.assert_array_equal(together.layers[name].w[index], alone.layers[name].w)


def test_drift_compensation_restores_the_mean_of_every_tile() -> None:
    w = np.random.default_rng(3).standard_normal((25, 16)).astype(np.float32)
    w[:9] *= np.float32(0.1)
    specs = [{}, {"time_s": 2.0}, {"time_s": 2.0, "drift_compensation": True}]
    found = [run_matrix(4, w, analog_spec(Fading(), tile_rows=9, **spec)) for spec in specs]  # rows 9, 8, 8
    fresh, drifted, restored = (matrix.astype(np.float64) for matrix in found)
    factors = []
    for block in (slice(0, 9), slice(9, 17), slice(17, 25)):
        before, after, again = (np.mean(np.abs(m[block])) for m in (fresh, drifted, restored))
        assert 3 < before / after < 5
        np.testing.assert_allclose(again, before, rtol=1e-5)  # a float32 mean of 144 values and three products
        np.testing.assert_allclose(restored[block], drifted[block] * (before / after), rtol=1e-5)
        factors.append(before / after)
    assert np.ptp(factors) > 1e-2  # one factor for the whole matrix would be seen


@pytest.mark.parametrize("bad", [None, 3, np.zeros(2, np.uint32)])
def test_a_key_is_needed(monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # it would refuse it itself
    with pytest.raises(TypeError, match="a PRNG key is needed"):
        program(bad, params(), analog_spec(PCM()), dense=False)
