"""Evaluations compiled for devices that are not there."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from hetmoe.commands import info_mesh
from hetmoe.models.hf_config import config_from_hf
from hetmoe.ops.grouped_matmul import ragged
from hetmoe.parallel.analysis import Analysis
from hetmoe.parallel.program_costs import ProgramCosts
from hetmoe.parallel.topology import described_devices
from tests.checkpoint.golden_files import ROOT
from tests.parallel.processes import output_of

OLMOE = json.loads((ROOT / "experiments" / "architectures" / "olmoe_7b.json").read_text())


def small(folder: Path, **changes: int) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(OLMOE | {"num_hidden_layers": 3, "max_position_embeddings": 64} | changes))
    return path


def analyzed(folder: Path, mesh: str, *options: object, **changes: int) -> dict[str, Any]:
    record = folder / "record.json"
    output_of(
        "hetmoe.cli", "info", small(folder, **changes), "--mesh", mesh, "--analyze", "--weights", "digital", "--json",
        record, *options,
    )  # fmt: skip
    return json.loads(record.read_text())["mesh"]


def test_flops_and_bytes_follow_from_the_shapes(tmp_path: Path) -> None:
    """On one device: 16 windows of 64 tokens have 8192 copies for 64 experts, in 64 + (8192 - 64) / 32 blocks."""
    one = analyzed(tmp_path, "data=1", "--batch", 16, vocab_size=1024)
    layers, hidden, inner, experts, heads, tokens = 3, 2048, 1024, 64, 16, 16 * 64
    blocks = 64 + (8 * tokens - 64) // 32
    attention = tokens * hidden * 4 * hidden + 2 * tokens * 64 * heads * 128
    added = tokens * 8 * hidden  # results of a token's copies
    per_layer = attention + tokens * hidden * experts + 3 * blocks * 32 * hidden * inner + added
    head = tokens * hidden * 1024
    assert one["compiled"]["flops"] == 2 * (layers * per_layer + head)
    assert not one["compiled"]["uncounted_calls"]  # although routers call TopK
    assert not one["compiled"]["collectives"] and one["compiled"]["sent_bytes"] == 0
    weights = layers * (4 * hidden**2 + 4 * hidden + hidden * experts + 3 * experts * hidden * inner)
    weights += 2 * hidden * 1024 + hidden
    assert one["bytes_per_device"]["parameters"] == 2 * weights
    assert 0 < one["compiled"]["argument_bytes"] - 2 * weights < 1e6  # the text


def test_what_experts_exchange_is_their_buffers(tmp_path: Path) -> None:
    """Per layer: rows of 16 bits there and 32 bits back, and of each two labels of 32 bits; 3 of 4 parts leave."""
    four = analyzed(tmp_path, "expert=4", vocab_size=1024)
    rows = 4 * 2 * 64 * 8 // 4  # twice an even load for each of 4 devices, of 64 tokens' 8 copies
    found = four["compiled"]["collectives"]["all-to-all"]
    # CPUs may widen 16 bits to 32 on the way.
    least, most = (3 * rows * (2048 * wide + 8) * 3 / 4 for wide in (2 + 4, 4 + 4))
    assert least <= found["sent_bytes"] <= most * 1.01
    assert four["compiled"]["unknown_loops"]


def test_what_is_not_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = ProgramCosts(flops=7, opaque_calls={"kernel": 3})
    found = Analysis(arguments=1, results=2, temporaries=3, costs=costs)
    monkeypatch.setattr(info_mesh, "analyze", lambda *_: found)
    question = info_mesh.MeshQuestion(
        mesh="data=1", analyze=True, topology=None, batch=None, seq=None, weights="digital", dtype=None
    )
    config, terminal = config_from_hf(OLMOE), io.StringIO()
    console = Console(file=terminal, width=100)
    record = info_mesh.answer(question, config, info_mesh.workload_of(question, config), [], console)
    assert "not counted: the FLOPs of kernel, which runs 3 times" in terminal.getvalue()
    assert record["compiled"]["uncounted_calls"] == {"kernel": 3}


@pytest.mark.slow
def test_products_of_experts_compile_for_tpus_in_both_widths() -> None:
    """TPU's compiler refused `Precision.HIGHEST` of bfloat16."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    here = jax.sharding.SingleDeviceSharding(described_devices("tpu:v5p:2x2x1")[0])
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((16, 128, 256), dtype, sharding=here)
        w = jax.ShapeDtypeStruct((8, 256, 512), dtype, sharding=here)
        of = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=here)
        jax.jit(lambda x, w, of: (ragged.products(x, w, of, None), ragged.weights_gradient(x, x, of, 8))).lower(
            x, w, of
        ).compile()
