"""The kernels' benchmark runs, counts the work of its cases rightly, and refuses in one line."""

import functools
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import bench_kernels
import kernel_cases
import kernel_quantized
import kernel_sweep
from hetmoe.models.abstract import abstract_params, is_leaf
from kernel_work import (
    FULL,
    SMALL,
    Work,
    backward_work,
    crossbar_work,
    grouped_work,
    model_work,
    quantized_work,
    seed_work,
)


def record_of(folder, cases: list[str] | None) -> dict[str, Any]:
    file = folder / "kernels.json"
    bench_kernels.main(cases, small=True, rounds=1, output=file)
    record = json.loads(file.read_text())
    for case in record["cases"].values():
        assert not case["failed"]
        for row in case["rows"]:
            for name in ("floor_operations_s", "floor_bytes_s", "ours_s", "plain_s", "to_floor", "to_plain"):
                assert row[name] > 0 and math.isfinite(row[name])
            assert row.get("met") is None  # targets are those of an H200
    return record


def test_cases_on_small_shapes(tmp_path, capsys) -> None:
    record, printed = record_of(tmp_path, ["crossbar", "decode"]), capsys.readouterr().out
    assert record["provenance"]["command"][:2] == ["python", "experiments/bench_kernels.py"]
    assert jax.devices()[0].device_kind in printed
    assert set(record["cases"]) == {"crossbar", "decode"}


@pytest.mark.slow
def test_every_case_on_small_shapes(tmp_path, capsys) -> None:
    record = record_of(tmp_path, None)
    assert "4 bits: weights 0.0 MB of 0.1, 3.20 x fewer" in capsys.readouterr().out
    assert set(record["cases"]) == set(kernel_cases.CASES)
    assert [row["way"] for row in record["cases"]["seeds"]["rows"]] == [
        "stored", "kernel", "kernel_vmapped", "layer", "copies",
    ]  # fmt: skip
    assert record["cases"]["model"]["rows"][0]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("case", "way", "numbers", "met"),
    [
        ("crossbar", "", {"to_plain": 1.42}, True),
        ("crossbar", "", {"to_plain": 1.44}, False),
        ("grouped", "", {"to_plain": 1.6}, True),
        ("grouped", "", {"to_plain": None}, False),
        ("decode", "", {"floor_bytes_s": 0.71}, True),
        ("decode", "", {"floor_bytes_s": 0.69}, False),
        ("quantized-decode", "4 bits", {"to_plain": 0.39}, True),
        ("quantized-decode", "4 bits", {"to_plain": 0.41}, False),
        ("quantized-decode", "2 bits", {"to_plain": 0.29}, False),
        ("quantized-decode", "2 bits, xla", {}, None),
        ("seeds", "layer", {"ours_s": 3.0, "planned_bytes": 110}, True),
        ("seeds", "layer", {"ours_s": 3.1, "planned_bytes": 110}, False),
        ("seeds", "kernel", {"ours_s": 3.0, "planned_bytes": 111}, False),
        ("seeds", "kernel", {"ours_s": 3.0, "planned_bytes": 150, "peak_bytes": 109}, True),
        ("backward", "", {}, None),
    ],
)
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100"])
def test_targets(monkeypatch, case: str, way: str, numbers: dict[str, Any], met: bool | None, kind: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    stored = {"case": case, "way": "stored", "ours_s": 1.0, "planned_bytes": 10, "peak_bytes": None}
    copies = stored | {"way": "copies", "ours_s": 2.0}
    row = stored | {"way": way} | numbers
    if "peak_bytes" in numbers:
        stored["peak_bytes"] = copies["peak_bytes"] = 9
    rows = [stored, copies, row] if case == "seeds" else [row]
    bench_kernels.judge(rows, 100 if case == "seeds" else None)
    assert row.get("met") is (met if "H200" in kind else None)


def test_work_of_the_full_shapes() -> None:
    assert crossbar_work(FULL) == Work(2 * 8192**3, 2 * 8192**2 + 2 * 8192**2 + 4 * 8192**2)
    copies, expert = 16384 * 8, 3 * 2048 * 1024
    rows = copies * (2 * 2048 + 4 * 1024 + 4 * 1024 + 2 * 1024 + 4 * 2048)
    assert grouped_work(FULL, 16384, 64) == Work(6 * copies * 2048 * 1024, 64 * 2 * expert + rows)
    rows = 256 * (2 * 2048 + 4 * 1024 + 4 * 1024 + 2 * 1024 + 4 * 2048)
    assert grouped_work(FULL, 32, 63) == Work(6 * 256 * 2048 * 1024, 63 * 2 * expert + rows)
    # Read: rows, weights, gradients of the results. Written: gradients of rows and weights.
    rows = copies * 2 * (2 * 2048 + 2 * 1024) + copies * 4 * (1024 + 1024 + 2048)
    assert backward_work(FULL, 16384) == Work(12 * copies * 2048 * 1024, 2 * 64 * 2 * expert + rows)
    assert seed_work(FULL, 32, 63) == Work(6 * 256 * 2048 * 1024, 2 * (63 * expert + 32 * 2048 + 32 * 2048))
    per_token = 16 * (4 * 2048 * 2048 + 2048 * 64 + 8 * expert) + 2048 * 50304
    scores = 16 * 8 * (2048 * 2049 // 2) * 2 * 2 * 2048  # queries by keys, and weights by values
    assert model_work(FULL).operations == 2 * 8 * 2048 * per_token + scores


def test_work_of_packed_weights_is_their_bytes() -> None:
    """Bytes of the stored arrays, and of nothing else: a step and a zero of 2 bytes for every 32 weights."""
    clean, rows = kernel_cases.make_clean(SMALL), grouped_work(SMALL, 8, 0)
    weights = SMALL.config.num_experts * SMALL.expert_weights
    for bits in kernel_quantized.BITS:
        grid = kernel_quantized.make_grid(SMALL, bits)
        layer = jax.eval_shape(functools.partial(kernel_quantized.quantize_layer, grid=grid), clean)
        stored = kernel_quantized.weight_bytes(layer)
        assert stored == weights * bits // 8 + weights // 32 * 4
        assert quantized_work(SMALL, 8, SMALL.config.num_experts, grid) == Work(rows.operations, rows.bytes + stored)
    assert kernel_quantized.weight_bytes(clean) == 2 * weights
    assert kernel_quantized.make_grid(FULL, 4).group == 64


def test_quantized_products_are_near_the_plain_ones(monkeypatch) -> None:
    monkeypatch.setattr(kernel_cases, "BITS", (8, 2))
    case = kernel_cases.quantized_case(SMALL, SMALL.decode_tokens, "xla")
    assert list(case.ours) == ["8 bits", "2 bits"] and set(case.own_work) == set(case.ours)
    x, mid, _, block_expert, used = case.ours["8 bits"].arguments
    wanted = kernel_cases._block_products(x, mid, kernel_cases.make_clean(SMALL), block_expert)
    for way, least in (("8 bits", 0.9999), ("2 bits", 0.85)):
        for y, other in zip(case.ours[way].function(*case.ours[way].arguments), wanted, strict=True):
            found, expected = (np.asarray(leaf)[np.asarray(used)].ravel() for leaf in (y, other))
            assert least < np.corrcoef(found, expected)[0, 1] < 1


def test_bytes_of_the_model_are_its_matrices() -> None:
    leaves = jax.tree.leaves(abstract_params(FULL.config), is_leaf=is_leaf)
    matrices = sum(math.prod(leaf.shape) for leaf in leaves if leaf.init and not leaf.key.startswith("model.embed"))
    assert model_work(FULL).bytes == 2 * matrices


def test_work_is_that_of_the_plain_programs(monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = kernel_cases.random_routing(SMALL, SMALL.tokens)
    assert len(np.unique(chosen)) == SMALL.config.num_experts
    assert all(len(set(experts)) == len(experts) for experts in chosen.tolist())
    programs = kernel_cases.plain_products(SMALL, chosen, kernel_cases.make_clean(SMALL))
    work = grouped_work(SMALL, SMALL.tokens, SMALL.config.num_experts)
    for name, program in programs.items():
        results = jax.eval_shape(program.function, *program.arguments)
        operands = program.arguments[:3]
        moved = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves((results, operands)))
        assert moved > work.bytes if name == "digital kernels" else moved == work.bytes  # these pad their blocks
    equal = programs["equal groups"]
    analysis = jax.jit(equal.function).lower(*equal.arguments).cost_analysis()
    assert analysis["flops"] == work.operations
    ragged = kernel_cases._gradient(programs["ragged_dot"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(ragged.function)(*ragged.arguments)))


def test_products_are_near_the_plain_ones() -> None:
    """Noise and converters aside, ours multiply the same rows by the same experts."""
    chosen = kernel_cases.random_routing(SMALL, SMALL.decode_tokens)
    operands = kernel_cases.make_experts(SMALL, chosen, 8)
    o = operands
    plain = jax.jit(kernel_cases._block_products)(o.x, o.mid, o.programmed, o.block_expert)
    for ours, other in zip(kernel_cases.crossbar_products(operands, "xla"), plain, strict=True):
        used = np.asarray(o.used)
        assert np.corrcoef(np.asarray(ours)[used].ravel(), np.asarray(other)[used].ravel())[0, 1] > 0.99


def test_sweep_uses_the_sizes_it_names(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(kernel_sweep.ALTERNATIVES, "cuda", kernel_sweep.CUDA[:1])
    monkeypatch.setattr(kernel_sweep, "ROWS", (16,))
    file = tmp_path / "sweep.json"
    bench_kernels.main(
        ["decode"], small=True, sweep_blocks=True, implementation="interpret_cuda", rounds=1, output=file
    )
    rows = json.loads(file.read_text())["sweep"]
    assert [(row["product"], row["sizes"] and row["sizes"]["chunk"]) for row in rows] == [
        ("gate+up", None), ("gate+up", 32), ("down", None), ("down", 32),
    ]  # fmt: skip
    assert all(row["ours_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "pallas", "case": ["crossbar"]}, "runs on TPU and NVIDIA GPU"),
        ({"implementation": "cudnn", "case": ["crossbar"]}, "choose one of xla, pallas"),
        ({"case": ["encode"]}, "choose from seeds-decode, seeds"),
        ({"sweep_blocks": True}, "only the kernels have block sizes"),
    ],
)
def test_what_cannot_run_ends_in_one_line(options, message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        bench_kernels.main(small=True, rounds=1, **options)
    assert "\n" not in str(caught.value)
