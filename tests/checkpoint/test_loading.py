"""Loading onto a mesh of devices, and the memory that loading takes; each in processes of their own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.orbax_directory import write
from tests.checkpoint.golden_files import GOLDEN, ROOT, copy, load_refuses, read_tensors, shard
from tests.models.directories import assert_same_bits

ON_EIGHT_DEVICES = """
import sys, warnings
import jax, numpy as np
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import CheckpointWarning
from hetmoe.models.abstract import abstract_params, is_leaf

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Sharding|.*predict further tokens")
assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
sizes = dict(mesh.shape)
for directory in sys.argv[1:]:
    plain, spread = load_model(directory), load_model(directory, mesh=mesh)
    leaves = jax.tree.leaves(abstract_params(plain.config), is_leaf=is_leaf)
    cut = 0
    for leaf, one, all in zip(leaves, jax.tree.leaves(plain.params), jax.tree.leaves(spread.params), strict=True):
        assert (one.dtype, one.shape) == (all.dtype, all.shape) and one.devices() == {jax.devices()[0]}
        expected = np.asarray(one)
        assert len(all.addressable_shards) == 8
        for part in all.addressable_shards:
            row, column = np.argwhere(mesh.devices == part.device)[0]
            position = {"expert": row, "tensor": column}
            cuts = {axis: "expert" for axis in leaf.axes if axis == "expert"}
            is_bias = "self_attn" in leaf.key and leaf.key.endswith(".bias")
            if (leaf.transposed and not leaf.key.endswith("gate.weight")) or is_bias:  # not routers and shared gates
                cuts[leaf.axes[-1]] = "tensor"
            elif leaf.axes[0] == "vocab":
                cuts["vocab"] = "tensor"
            index = []
            for number, (axis, size) in enumerate(zip(leaf.axes, leaf.shape, strict=True)):
                last = number == len(leaf.axes) - 1
                by = cuts.get(axis) if axis in ("expert", "vocab") or last else None
                step = size // sizes.get(by, 1)
                begin = step * position.get(by, 0)
                index.append(slice(begin, begin + step))
            assert np.asarray(part.data).tobytes() == expected[tuple(index)].tobytes(), (leaf.key, part.device)
        cut += all.addressable_shards[0].data.size < all.size
    print(cut)
"""


def run(script, *arguments, devices=1):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_mesh_has_every_shard_in_its_place(tmp_path):
    """One tensor per expert, fused, FP8, in shards, and converted; cut are experts, columns and the vocabulary."""
    names = ["olmoe_tiny", "olmoe_fused", "mixtral_fused", "deepseek_v3_fp8", "qwen2_moe_tiny"]
    shard(copy("deepseek_v2_tiny", tmp_path / "sharded"), 3)
    write(tmp_path / "converted", load_model(GOLDEN / "olmoe_tiny"))
    output = run(
        ON_EIGHT_DEVICES, *[GOLDEN / n for n in names], tmp_path / "sharded", tmp_path / "converted", devices=8
    )
    # Embedding, LM head, 4 projections and 3 matrices of experts. With dense layers and shared experts (fp8, qwen2, v2)
    # 2 + 2 x 4 or 5 projections + 3 x 3 matrices, and biases of 3 projections a layer (qwen2; v2).
    assert output.split() == ["9", "9", "9", "21", "25", "27", "9"]


def test_every_expert_in_a_mesh_is_counted_once(tmp_path):
    """NaN in what all devices hold, and in what few hold, are as many as in the file."""
    from tests.checkpoint.golden_files import edit_tensors, read_tensors

    folder = copy("olmoe_tiny", tmp_path / "model")
    spoilt = {}
    for key in ("model.norm.weight", "model.layers.0.mlp.experts.3.up_proj.weight"):
        spoilt[key] = read_tensors(folder / "model.safetensors")[key].copy()
        spoilt[key].reshape(-1)[5] = np.nan
    edit_tensors(folder, **spoilt)
    script = """
import sys, warnings
import jax
import jax.numpy as jnp
from hetmoe.checkpoint.load import load_model
mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    load_model(sys.argv[1], mesh=mesh)
print(*[w.message for w in caught])
"""
    output = run(script, folder, devices=8)
    assert all(f"{key} (1)" in output for key in spoilt)
    assert "2 weights are NaN" in output


def test_mesh_must_fit(tmp_path):
    script = """
import sys
import jax
import jax.numpy as jnp
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
kinds = {"axis_types": (jax.sharding.AxisType.Auto,)}
for directory in sys.argv[1:]:
    for part in "2 model,2 inner,3 expert,3 tensor,8 tensor,2 data".split(","):
        devices, axis = int(part[0]), part[2:]
        mesh = jax.make_mesh((devices,), (axis,), devices=jax.devices()[:devices], **kinds)
        try:
            load_model(directory, mesh=mesh)
        except InputError as error:
            print(axis, error)
        else:
            print(axis, "loaded")
"""
    converted = tmp_path / "converted"
    write(converted, load_model(GOLDEN / "qwen2_moe_tiny"))
    for directory in (GOLDEN / "qwen2_moe_tiny", converted):
        lines = run(script, directory, devices=8).splitlines()
        assert len(lines) == 6
        for line in lines[:2]:
            assert "is unknown; use data, seed, expert, tensor" in line
        for line, size, parts in zip(
            lines[2:5], ("8 experts", "4 attention heads", "4 attention heads"), (3, 3, 8), strict=True
        ):
            assert f"of {parts} parts does not divide the {size}" in line
        assert lines[5] == "data loaded"


MEMORY = """
import sys, threading
import jax, jax.numpy as jnp
from hetmoe.checkpoint.load import load_model
load_model("reference")  # whatever is made once
def held():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
before, peak, done = held(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
thread = threading.Thread(target=watch)
thread.start()
params = load_model(sys.argv[1], None if sys.argv[2] == "None" else sys.argv[2]).params
jax.block_until_ready(params)
peak = max(peak, held())
done.set()
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((peak - before) * 1024 / size, size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB of bfloat16 in one file, written without the library."""
    import json

    import ml_dtypes

    from hetmoe.models.hf_config_write import config_to_hf
    from tests.checkpoint.golden_files import write_tensors
    from tests.models.tiny import tiny_config

    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(num_layers=4, num_experts=16, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64,
                         expert_intermediate_size=960, vocab_size=512)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    shapes = {"model.embed_tokens.weight": (512, 512), "lm_head.weight": (512, 512), "model.norm.weight": (512,)}
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}layernorm.weight": (512,) for name in ("input_", "post_attention_")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (512, 512) for name in "qkvo"}
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (512,) for name in "qk"}
        shapes |= {f"{prefix}.mlp.gate.weight": (16, 512)}
        for expert in range(16):
            shapes |= {f"{prefix}.mlp.experts.{expert}.{name}_proj.weight": (960, 512) for name in ("gate", "up")}
            shapes |= {f"{prefix}.mlp.experts.{expert}.down_proj.weight": (512, 960)}
    write_tensors(folder / "model.safetensors", {k: np.full(s, 0.5, ml_dtypes.bfloat16) for k, s in shapes.items()})
    return folder


@pytest.fixture(scope="module")
def large_fused(large, tmp_path_factory):
    """The same model with the experts of a layer in one tensor."""
    from tests.checkpoint.golden_files import write_tensors

    folder = tmp_path_factory.mktemp("large_fused")
    (folder / "config.json").write_bytes((large / "config.json").read_bytes())
    tensors = {k: v for k, v in read_tensors(large / "model.safetensors").items() if ".experts." not in k}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        tensors[f"{prefix}.gate_up_proj"] = np.full((16, 1920, 512), 0.5, jnp.bfloat16)
        tensors[f"{prefix}.down_proj"] = np.full((16, 512, 960), 0.5, jnp.bfloat16)
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_stacked_experts_take_no_more_memory_with_eight_threads(large_fused, dtype):
    ratio, _ = map(float, run("import os\nos.cpu_count = lambda: 8\n" + MEMORY, large_fused, dtype).split())
    assert 0.9 < ratio < 1.2


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("float32", 4), ("float16", 2)])
def test_loading_takes_little_more_memory_than_the_parameters(large, dtype, size):
    ratio, total = map(float, run(MEMORY, large, dtype).split())
    assert total > 95e6 * size
    assert 0.9 < ratio < 1.2


def test_parameters_are_the_memory_that_was_filled(monkeypatch):
    """JAX takes over what was read: every array begins where `host_memory` made it."""
    from hetmoe.checkpoint import read

    made = []
    original = read.host_memory

    def noted(shape, dtype):
        made.append(original(shape, dtype))
        return made[-1]

    monkeypatch.setattr(read, "host_memory", noted)
    leaves = jax.tree.leaves(load_model(GOLDEN / "olmoe_tiny", "bfloat16").params)
    assert [leaf.unsafe_buffer_pointer() for leaf in leaves] == [array.ctypes.data for array in made]


def test_shards_are_read_like_one_file(tmp_path):
    for name in ("mixtral_fused", "qwen3_moe_bias"):
        folder = copy(name, tmp_path / name)
        shard(folder, 4)
        for dtype in ("float32", "bfloat16"):
            assert_same_bits(load_model(folder, dtype).params, load_model(GOLDEN / name, dtype).params)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", "", np.int32, np.float64, bool, object])
def test_other_dtypes_are_refused(dtype):
    load_refuses(GOLDEN / "olmoe_tiny", "dtype", "float32, bfloat16, float16", dtype=dtype)
