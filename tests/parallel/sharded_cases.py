"""Runs small models on meshes of simulated devices and says how far they are from one device; a process of its own.

`python -m tests.parallel.sharded_cases MODEL MESH...` prints a line of JSON per mesh.
"""

import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hetmoe
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.models.config import LatentAttention, ModelConfig
from hetmoe.parallel.mesh import make_mesh, parse_mesh
from hetmoe.parallel.model import forward_on, program_on
from hetmoe.parallel.rules import param_shardings, programmed_specs
from hetmoe.placement.plan import all_analog
from tests.models.tiny import full_config, random_params, tiny_config

# Every width can be cut into 4, and no two are the same; tiles of 7 rows cut all of them into unequal row-blocks.
WIDTHS = {"hidden_size": 24, "expert_intermediate_size": 20, "head_dim": 6, "vocab_size": 40}
FULL_WIDTHS = WIDTHS | {
    "head_dim": 11,
    "latent": LatentAttention(query_rank=16, kv_rank=22, content_dim=5, rope_dim=6, value_dim=7),
    "shared_intermediate_size": 28,
    "dense_intermediate_size": 36,
}
CONFIGS = {
    "grouped": lambda: tiny_config(**WIDTHS, num_layers=2, num_kv_heads=2),
    "full": lambda: full_config(**FULL_WIDTHS),
    "tied": lambda: tiny_config(**WIDTHS, num_kv_heads=4, qk_norm="head", qkv_bias=True, tie_embeddings=True),
}
# All widths are cut into row-blocks: into few where there are many matrices.
TILE_ROWS = {"grouped": 7, "full": 16, "tied": 7}
BATCH, SEQ = 8, 6


def meshes(devices: int, most: int) -> list[str]:
    """All meshes of so many devices over the four axes: powers of two, up to `most` parts of an axis."""
    sizes = [2**n for n in range(most.bit_length())]
    return [
        f"data={d},seed={s},expert={e},tensor={t}"
        for d, s, e, t in itertools.product(sizes, repeat=4)
        if d * s * e * t == devices and t <= 4  # heads
    ]


def hardware(name: str) -> hetmoe.AnalogSpec:
    """Drift compensated, twice with read noise and once with ADCs by column: everything that a mesh could change."""
    noise = make_read_noise("pcm", 0.02) if name != "tied" else None
    axis = "column" if name == "tied" else "tile"
    return hetmoe.analog_spec(
        "pcm", time_s=3600.0, drift_compensation=True, tile_rows=TILE_ROWS[name], bound_axis=axis, read_noise=noise
    )


def load(config: ModelConfig, mesh: jax.sharding.Mesh | None):
    params = random_params(config, 1)
    return params if mesh is None else jax.device_put(params, param_shardings(config, mesh))


def spread(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Differences over the standard deviation of what is compared."""
    off = np.abs(left - right) / right.std()
    return {"high": float(np.quantile(off, 0.9)), "most": float(off.max())}


def main(name: str, wanted: list[str]) -> None:
    config = CONFIGS[name]()
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, config.vocab_size, (BATCH, SEQ)), jnp.int32)
    spec, key, read_key = hardware(name), jax.random.key(5), jax.random.key(6)
    read_key = None if spec.read_noise is None else read_key
    plan, params = all_analog(config), load(config, None)
    one = jax.jit(hetmoe.forward, static_argnums=2)
    programmed = jax.jit(hetmoe.program, static_argnames="dense")(key, params, spec, dense=True)
    analog = {"plan": plan, "spec": spec, "read_key": read_key}
    clean, noisy = (
        np.asarray(one(params, tokens, config)),
        np.asarray(one(params, tokens, config, programmed=programmed, **analog)),
    )
    specs = programmed_specs(config, dense=True, per_column=spec.options.bound_axis == "column")
    for text in wanted:
        mesh = make_mesh(parse_mesh(text))
        there = load(config, mesh)
        found = program_on(mesh, key, there, config, spec, dense=True)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), found, programmed)
        for leaf, where in zip(jax.tree.leaves(found), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, where), leaf.ndim)
        stored = np.asarray(forward_on(mesh, there, tokens, config, programmed=found, **analog))
        result: dict[str, Any] = {"mesh": text}
        if name == "tied":  # programmed in the pass
            layer = hetmoe.seeded_weights(key, dense=True, when="layer")
            again = forward_on(mesh, there, tokens, config, programmed=layer, **analog)
            result["layer"] = spread(np.asarray(again), stored)
        result |= {
            "programmed_differ": [
                jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(same) if not v
            ],
            "digital": spread(np.asarray(forward_on(mesh, there, tokens, config)), clean),
            "analog": spread(stored, noisy),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(sys.argv[1], sys.argv[2:])
