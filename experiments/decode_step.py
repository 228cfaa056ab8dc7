"""The digital model's prediction beside measured decoding steps, on the device that runs this.

    python experiments/decode_step.py                                   # docs/experiments/decode_step.cpu.json
    python experiments/decode_step.py --processor h200-sxm --layers 16  # on a GPU: all of OLMoE-1B-7B

A model of OLMoE-1B-7B's shapes and random weights, with `--layers` of its 16 layers, decodes one token for each of
`--batch` sequences behind `--context` positions, with a key-value cache written in place (`hetmoe.models.decode`).
The prediction is `hetmoe.hardware.estimate` for ceilings measured in the same run: first those of the device (a sum
over 1 GB, a large square matmul), then the bandwidth that one matmul with as many rows as there are sequences reaches
(the LM head's), which is what the libraries under this program make of the device. With `--processor` a described one
stands beside them. Random routers choose experts nearly equally often, so the uniform routing is taken. Cost: three
minutes and 8 GB on two CPU cores; a minute beside compilation on a GPU, and 15 GB with 16 layers in bfloat16.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from common import RESULTS, make_table
from hetmoe.checkpoint.load import parse_dtype
from hetmoe.commands.common import make_console
from hetmoe.evaluate.provenance import provenance
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import deployment
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import estimate
from hetmoe.hardware.machine import System, system_of
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import decode_step
from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.decode import KeyValueCache, empty_cache, extend
from hetmoe.models.params import Params
from hetmoe.placement.plan import all_digital
from memory_olmoe import OLMOE_7B

READ_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Rates:
    """Ceilings that were reached."""

    bytes_per_s: float
    flops_per_s: float


def seconds(function: Any, *arguments: Any, calls: int) -> float:
    """The best of several calls, each several times in a row where launching one would count."""
    compiled = jax.jit(function).lower(*arguments).compile()
    repeats, best = 1 if jax.default_backend() == "cpu" else 10, float("inf")
    jax.block_until_ready(compiled(*arguments))
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arguments) for _ in range(repeats)][-1])
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def measure_rates(dtype: Any) -> Rates:
    on_cpu = jax.default_backend() == "cpu"
    side = 2048 if on_cpu else 8192
    values = jnp.ones(READ_BYTES // 4, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(dtype)
    calls = 5 if on_cpu else 20
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return Rates(READ_BYTES / seconds(jnp.sum, values, calls=calls), 2 * side**3 / seconds(multiply, x, x, calls=calls))


def few_rows(rows: int, dtype: Any) -> Rates:
    """Of a matmul with few rows, all of whose time counts as reading."""
    x, w = (jnp.ones(shape, dtype) for shape in ((rows, OLMOE_7B.hidden_size), (OLMOE_7B.hidden_size, 50304)))
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return Rates(w.nbytes / seconds(multiply, x, w, calls=5), float("inf"))


def with_rates(system: System, rates: Rates) -> System:
    unit = dataclasses.replace(
        system.digital, bandwidth=jnp.float32(rates.bytes_per_s), rate=jnp.float32(rates.flops_per_s)
    )
    return dataclasses.replace(system, digital=unit)


def measured(
    params: Params, config: ModelConfig, batch: int, context: int, dtype: Any, implementation: str, steps: int
) -> float:
    """Seconds of a decoding step; several in a row, so that launching them is hidden where the device allows it."""
    run = jax.jit(extend, static_argnames=("config", "implementation"), donate_argnames="cache")
    tokens = jax.random.randint(jax.random.key(1), (batch, 1), 0, config.vocab_size)
    cache = empty_cache(config, batch, context + 4 * steps, dtype)
    cache = KeyValueCache(keys=cache.keys, values=cache.values, length=jnp.int32(context - 1))
    rounds: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(steps):
            logits, cache = run(params, tokens, cache, config, implementation=implementation)
            tokens = jnp.argmax(logits, axis=-1)[:, None].astype(tokens.dtype)  # as in decoding
        jax.block_until_ready(tokens)
        rounds.append((time.perf_counter() - start) / steps)
    return statistics.median(rounds[1:])  # the first compiles


def predicted(config: ModelConfig, batch: int, context: int, itemsize: int, system: System) -> tuple[float, str]:
    """(seconds of a step, what takes most of it)."""
    where = deployment(all_digital(config), config, weight_bytes=itemsize, element_bytes=itemsize)
    step = decode_step(config, uniform_frequency(config), batch, context)
    found = estimate(config, model_demand(config, where, step), system)
    return float(found.step_time), found.parts._fields[int(found.bound)]


def main(
    layers: Annotated[int | None, typer.Option(help="Of OLMoE's 16 layers; default 2 on CPU, else 16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default float32 on CPU, else bfloat16.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default 1, 8, 32.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Repeatable; default 128, 2048.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Repeatable; default xla.")] = None,
    processor: Annotated[str | None, typer.Option(help="A described digital unit to compare with too.")] = None,
    steps: Annotated[int | None, typer.Option(help="Timed in a row; default 2 on CPU, else 20.")] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Default: docs/experiments/decode_step.DEVICE.json.")
    ] = (None),
) -> None:
    """Measure, predict and print."""
    device, console = jax.devices()[0], make_console()
    on_cpu = device.platform == "cpu"
    kind = parse_dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    config = dataclasses.replace(OLMOE_7B, num_layers=layers or (2 if on_cpu else 16))
    rates = measure_rates(kind)
    console.print(
        f"{device.device_kind}: {rates.bytes_per_s / 1e9:.4g} GB/s read, {rates.flops_per_s / 1e12:.4g} TFLOP/s in "
        f"{jnp.dtype(kind).name}; OLMoE-1B-7B with {config.num_layers} layers"
    )
    described = system_of(
        open_description(processor or "a100-80gb", "digital"), open_description("ibm-3d-cim", "analog"),
        open_description("pcie4-x16", "link"),
    )  # fmt: skip
    params = jax.jit(init_params, static_argnames=("config", "dtype"))(jax.random.key(0), config, kind)
    columns = ["measured ms", "predicted ms", "measured / predicted", "most of it", "by few rows ms", "measured / that"]
    table = make_table(
        "a decoding step", "batch, context, implementation", columns + ([processor] if processor else [])
    )
    rows: list[dict[str, Any]] = []
    itemsize = jnp.dtype(kind).itemsize
    for size in batch or [1, 8, 32]:
        narrow = few_rows(size, kind)
        for seen in context or [128, 2048]:
            expected, most = predicted(config, size, seen, itemsize, with_rates(described, rates))
            by_rows = predicted(config, size, seen, itemsize, with_rates(described, narrow))[0]
            on_paper = predicted(config, size, seen, itemsize, described)[0]
            for way in implementation or ["xla"]:
                row: dict[str, Any] = {
                    "batch": size, "context": seen, "implementation": way, "predicted_s": expected, "most": most,
                    "few_rows_bytes_per_s": narrow.bytes_per_s, "predicted_by_few_rows_s": by_rows,
                }  # fmt: skip
                row |= {"described_s": on_paper} if processor else {}
                try:
                    found = measured(params, config, size, seen, kind, way, steps or (2 if on_cpu else 20))
                    row["measured_s"] = found
                    cells = [
                        ms(found),
                        ms(expected),
                        f"{found / expected:.2f}",
                        most,
                        ms(by_rows),
                        f"{found / by_rows:.2f}",
                    ]
                except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # such as too little memory
                    row["failed"] = str(error).splitlines()[0][:200]
                    cells = [row["failed"][:40], ms(expected), "-", most, ms(by_rows), "-"]
                rows.append(row)
                table.add_row(f"{size}, {seen}, {way}", *cells, *([ms(on_paper)] if processor else []))
    console.print(table)
    record = {
        "format": "hetmoe-experiment-1",
        "experiment": "decode_step",
        "provenance": provenance() | {"command": ["python", "experiments/decode_step.py", *sys.argv[1:]]},
        "layers": config.num_layers, "dtype": jnp.dtype(kind).name, "rates": dataclasses.asdict(rates),
        "processor": processor, "rows": [{k: _short(v) for k, v in row.items()} for row in rows],
    }  # fmt: skip
    name = device.device_kind.lower().replace(" ", "_")
    path = output or RESULTS / f"decode_step.{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path}")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _short(value: Any) -> Any:
    return float(np.format_float_positional(value, 5, fractional=False)) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
