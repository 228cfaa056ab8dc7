"""How time and memory of an evaluation grow with experts, hidden size, seeds, and devices.

    python experiments/scaling.py      # docs/experiments/scaling.json and scaling.png

One batch of 2048 tokens through a model with two layers, 2 experts per token, all modules on PCM crossbars: the program
of `hetmoe eval`, which programs the crossbars of every seed and runs the text through them. Each axis is varied alone,
around 64 experts, a hidden size of 256 (experts' inner width and heads follow it) and one seed, up to what two cores
finish in minutes. Time is the median of three runs after the first; memory is that of the compiled program, weights and
temporaries. The exponent is the slope of a straight line through the logarithms of the last four points, where fixed
costs matter least. Devices are simulated ones along `expert`, whose memory only is measured. Takes 20 minutes on two
cores. Expected: memory about linear in experts (weights), quadratic in the hidden size, flat in seeds, which share it;
time linear in seeds, and in experts where programming them outweighs the products of the tokens.
"""

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hetmoe
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.run import evaluate_seeds, loss_batches
from hetmoe.files import write_bytes, write_text
from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.parallel.analysis import analyze
from hetmoe.parallel.memory import Workload, bytes_per_device
from hetmoe.parallel.shard import Shard
from hetmoe.placement.plan import all_analog, stack_plans

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "experiments" / "scaling.json"
AXES = {
    "experts": (8, 16, 32, 64, 128, 256),
    "hidden": (64, 128, 256, 512, 1024),
    "seeds": (1, 2, 4, 8),
    "devices": (1, 2, 4, 8),
}
BASE = {"experts": 64, "hidden": 256, "seeds": 1, "devices": 1}
BATCH, SEQ, REPEATS, FITTED = 16, 128, 3, 4


def config(experts: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        family="olmoe", qk_norm="width", vocab_size=1024, hidden_size=hidden, expert_intermediate_size=hidden,
        num_layers=2, num_heads=8, num_kv_heads=8, head_dim=hidden // 8, num_experts=experts, experts_per_token=2,
        norm_topk_prob=False, clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=10000.0), max_position_embeddings=SEQ,
        tie_embeddings=False,
    )  # fmt: skip


def measure(experts: int, hidden: int, seeds: int) -> tuple[float, int]:
    """Seconds of a run, and bytes of its program."""
    of = config(experts, hidden)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), of)
    tokens = np.random.default_rng(0).integers(0, of.vocab_size, (BATCH, SEQ + 1)).astype(np.int32)
    plans = stack_plans([stack_plans([all_analog(of)])] * seeds)
    arguments = (
        params, jax.random.split(jax.random.key(1), seeds), plans, hetmoe.analog_spec("pcm"), None,
        loss_batches(tokens, BATCH),
    )  # fmt: skip
    compiled = evaluate_seeds.lower(*arguments, of, first_batch=0).compile()
    seconds: list[float] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments, first_batch=0))
        seconds.append(time.perf_counter() - start)
    of_program = compiled.memory_analysis()
    assert of_program is not None
    return float(np.median(seconds[1:])), of_program.argument_size_in_bytes + of_program.temp_size_in_bytes


def memory(experts: int, hidden: int, devices: int) -> tuple[int, int]:
    """Bytes of one of several devices, by the compiled program and by the estimate."""
    of, shard, run = config(experts, hidden), Shard(expert=devices), workload(1)
    found = analyze(of, shard, run, jax.devices(), hetmoe.analog_spec("pcm"))
    return found.memory, sum(bytes_per_device(of, shard, run).values())


def workload(seeds: int) -> Workload:
    return Workload(batch=BATCH, seq=SEQ, seeds=seeds, dtype=jnp.float32, weights="stored", dense=True)


def exponent(sizes: list[int], values: list[float]) -> float:
    x, y = np.log(sizes[-FITTED:]), np.log(values[-FITTED:])
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    jax.config.update("jax_num_cpu_devices", max(AXES["devices"]))
    made_by = provenance() | {"command": ["python", "experiments/scaling.py"]}
    record: dict[str, Any] = {"format": "hetmoe-scaling-1", "provenance": made_by, "base": BASE, "axes": {}}
    for axis, sizes in AXES.items():
        rows = []
        for size in sizes:
            at = BASE | {axis: size}
            if axis == "devices":
                seconds, (compiled, estimate) = None, memory(at["experts"], at["hidden"], size)
            else:
                seconds, compiled = measure(at["experts"], at["hidden"], at["seeds"])
                of = config(at["experts"], at["hidden"])
                estimate = sum(bytes_per_device(of, Shard(), workload(at["seeds"])).values())
            rows.append({"size": size, "seconds": seconds, "bytes": compiled, "estimated_bytes": estimate})
            print(axis, rows[-1], flush=True)
        fitted = {"bytes": exponent(list(sizes), [row["bytes"] for row in rows])}
        if axis != "devices":
            fitted["seconds"] = exponent(list(sizes), [row["seconds"] for row in rows])
        record["axes"][axis] = {"rows": rows, "exponents": fitted}
        print(axis, fitted, flush=True)
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    write_bytes(RESULTS.with_suffix(".png"), draw(record))


def draw(record: dict[str, Any]) -> bytes:
    figure, panels = plt.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 5.6), layout="constrained")
    for column, (axis, found) in enumerate(record["axes"].items()):
        sizes = [row["size"] for row in found["rows"]]
        for panel, name, factor, unit in zip(
            panels[:, column], ("seconds", "bytes"), (1, 2**-20), ("s", "MiB"), strict=True
        ):
            panel.set(xscale="log", yscale="log", xlabel=axis)
            if name not in found["exponents"]:
                panel.set_axis_off()
                continue
            values = np.array([row[name] for row in found["rows"]]) * factor
            slope = found["exponents"][name]
            panel.plot(sizes, values, "o", color="#0072B2")
            middle = math.exp(np.mean(np.log(values[-FITTED:])) - slope * np.mean(np.log(sizes[-FITTED:])))
            panel.plot(sizes[-FITTED:], middle * np.array(sizes[-FITTED:], float) ** slope, color="#D55E00")
            panel.set_title(f"{name if name == 'seconds' else 'memory'}: exponent {slope:.2f}", fontsize=10)
            panel.set_ylabel(unit)
            panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
            panel.minorticks_off()
            low, high = panel.get_ylim()
            if high < 8 * low:  # so that what hardly changes looks so
                panel.set_ylim(low / 3, high * 3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
