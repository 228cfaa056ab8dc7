"""Speed of the kernels against the device's own limits and against plain matmuls, all measured in one run.

    python experiments/bench_kernels.py --json build/kernels.json             # GPU or TPU: the Pallas kernels
    python experiments/bench_kernels.py --small                               # anywhere: shows that it runs
    python experiments/bench_kernels.py --sweep-blocks --case grouped         # other block sizes of the kernels
    python experiments/bench_kernels.py --peer-python ENV/bin/python          # with torch and aihwkit-lightning

No results are stored: it has not been run on a GPU or TPU. Cost there: not known; compiling takes a few seconds a
program, and up to one minute where noise is drawn. OLMoE-1B-7B's weights alone are 14 GB. With `--small` one to two
minutes on two CPU cores, nearly all of it compilation, where `implementation="xla"` runs and times mean little.

    crossbar      x[8192, 8192] by w[8192, 8192], bfloat16, static ranges
    grouped       gate, up and down of OLMoE's 64 experts (top-8, 2048 x 1024), 16,384 tokens
    decode        the same with 32 tokens
    seeds         such a layer's experts for 8 noise seeds, programming included: 8 copies programmed and run, one
                  after the other (`layer`), or programmed in the kernel, seeds one after the other (`kernel`) or in
                  one mapped call (`kernel_vmapped`, with the inputs and results of all seeds in memory; no target);
                  `stored`: one seed, programmed before
    seeds-decode  the same with 32 tokens
    quantized     the products of `grouped` with weights packed at 8, 4, 3 and 2 bits (groups of 64 rows with a step
                  and a zero), by the kernels and by `xla`; the plain programs have bfloat16 weights
    quantized-decode  the same with 32 tokens
    model         log-likelihoods of 8 x 2048 tokens by an OLMoE-1B-7B of random weights for 8 seeds
    backward      the gradient of `grouped` for its rows and weights

A floor is the least time for the case's matmuls at the rate of a large bfloat16 matmul, or for reading its operands
and writing its results once at the bandwidth of a large copy or reduction, whichever took less time per byte. The
plain program is the fastest that runs of `jax.lax.ragged_dot`, for experts of equal load one batched matmul, and the
kernels without converters (on CPU: `grouped_matmul`); for `seeds` it has the three products only, times the seeds; for
`model` it is the digital model. Targets are those of an H200. Memory: what XLA plans beside operands and results, and,
where the device counts it, its peak above the operands, which is an upper bound: earlier programs may have set it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

from bench_cpu import measure, peer
from common import make_table
from hetmoe.commands.common import make_console
from hetmoe.evaluate.provenance import provenance
from kernel_cases import CASES, Case, Program, normal, plain_matmul
from kernel_sweep import SWEPT, candidates
from kernel_work import BYTES, FULL, SMALL, Sizes, Work

BATCH_S, MOST_CALLS = 0.02, 50  # short programs are called several times in a row, so that launching them is hidden
RATE_CALLS = 30
COMPILED_AT_ONCE, MOST_REASON = 4, 2000  # programs; characters of a reason that are kept


@dataclasses.dataclass(frozen=True)
class Ready:
    """A compiled program, warmed up: a timed call, and its memory in bytes where that is known."""

    call: Callable[[], float]
    planned: int | None
    peak: int | None


def compile_program(program: Program) -> Any:
    return jax.jit(program.function).lower(*program.arguments).compile()


def prepare(program: Program, compiled: Any) -> Ready:
    analysis, device = compiled.memory_analysis(), jax.devices()[0]
    before = device.memory_stats()
    jax.block_until_ready(compiled(*program.arguments))
    after = device.memory_stats()
    peak = None if before is None or after is None else after["peak_bytes_in_use"] - before["bytes_in_use"]

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls - 1):
            compiled(*program.arguments)
        jax.block_until_ready(compiled(*program.arguments))
        return (time.perf_counter() - start) / calls

    # A CPU runs several calls side by side; other devices one after the other.
    calls = 1 if device.platform == "cpu" else min(MOST_CALLS, math.ceil(BATCH_S / seconds(1)))
    return Ready(functools.partial(seconds, calls), None if analysis is None else analysis.temp_size_in_bytes, peak)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device reaches in this run."""

    operations_per_s: float
    bytes_per_s: float

    def floors(self, work: Work) -> tuple[float, float]:
        """Seconds for the operations, and for the bytes."""
        return work.operations / self.operations_per_s, work.bytes / self.bytes_per_s


def measure_rates(sizes: Sizes) -> Rates:
    """From the best of many calls: floors are what no program beats."""
    x, w = normal(0, sizes.side, sizes.side), normal(1, sizes.side, sizes.side)
    values = normal(2, sizes.floor_bytes // BYTES)
    programs = {
        "matmul": Program(plain_matmul, (x, w)),
        "copy": Program(lambda v: v + 1, (values,)),
        "reduction": Program(jnp.max, (values,)),
    }
    calls = {name: prepare(program, compile_program(program)).call for name, program in programs.items()}
    best = {name: min(call() for _ in range(RATE_CALLS)) for name, call in calls.items()}
    moved = max(2 * sizes.floor_bytes / best["copy"], sizes.floor_bytes / best["reduction"])
    return Rates(2 * sizes.side**3 / best["matmul"], moved)


def first_line(reason: str) -> str:
    return reason.splitlines()[0][:100]


def why(error: Exception) -> str:
    return str(error)[:MOST_REASON] or type(error).__name__


def prepare_all(programs: dict[str, Program], failed: dict[str, str]) -> dict[str, Ready]:
    """Those that the device can run; the reasons of the others are noted. They are compiled side by side."""
    ready: dict[str, Ready] = {}
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        compiled = {name: pool.submit(compile_program, program) for name, program in programs.items()}
    for name, program in programs.items():
        try:
            ready[name] = prepare(program, compiled[name].result())
        except jax.errors.JaxRuntimeError as error:
            failed[name] = why(error)
    return ready


def run_case(name: str, case: Case, rates: Rates, rounds: int, peers: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """Rows of our programs, the plain ones' and the peers' seconds, and why a plain one did not run."""
    failed: dict[str, str] = {}
    ours = prepare_all(case.ours, failed)
    plain = prepare_all(case.plain, failed)
    calls = {f"ours {way}": r.call for way, r in ours.items()} | {f"plain {n}": r.call for n, r in plain.items()}
    medians = measure(calls | peers, None, [], rounds)
    plain_s = {n: medians[f"plain {n}"] for n in plain}
    fastest = min(plain_s, key=lambda n: plain_s[n], default=None)
    rows: list[dict[str, Any]] = []
    for way, ready in ours.items():
        repeats = 1 if way == "stored" else case.repeats
        work, seconds = case.own_work.get(way, case.work).times(repeats), medians[f"ours {way}"]
        operations_s, bytes_s = rates.floors(work)
        base = None if fastest is None else plain_s[fastest] * repeats
        rows.append({
            "case": name, "way": way, "operations": work.operations, "bytes": work.bytes,
            "floor_operations_s": operations_s, "floor_bytes_s": bytes_s, "ours_s": seconds,
            "to_floor": seconds / max(operations_s, bytes_s),
            "plain": fastest, "plain_s": base, "to_plain": None if base is None else seconds / base,
            "tokens_per_s": None if case.tokens is None else case.tokens / seconds,
            "planned_bytes": ready.planned, "peak_bytes": ready.peak,
            "weight_bytes": case.own_weight_bytes.get(way), "plain_weight_bytes": case.weight_bytes,
        })  # fmt: skip
    judge(rows, case.weight_bytes)
    return {"rows": rows, "failed": failed, "plain_s": plain_s, "peers_s": {n: medians[n] for n in peers}}


def try_case(
    name: str, sizes: Sizes, implementation: str, rates: Rates, rounds: int, peers: dict[str, Callable[[], float]]
) -> dict[str, Any]:
    """As `run_case`; what a device refuses (memory, a kernel's compilation) leaves the other cases alone."""
    try:
        return run_case(name, CASES[name](sizes, implementation), rates, rounds, peers)
    except jax.errors.JaxRuntimeError as error:
        return {"rows": [], "failed": {"ours": why(error)}, "plain_s": {}, "peers_s": {}}


def judge(rows: list[dict[str, Any]], weight_bytes: int | None) -> None:
    """Adds what programming costs beside stored weights, and whether the targets are met, which are an H200's."""
    by_way = {row["way"]: row for row in rows}
    for row in rows:
        if "stored" in by_way and "copies" in by_way and weight_bytes is not None:
            unit = "planned_bytes" if row["peak_bytes"] is None else "peak_bytes"
            row["extra_layers"] = (row[unit] - by_way["stored"][unit]) / weight_bytes
            row["to_copies"] = row["ours_s"] / by_way["copies"]["ours_s"]
        target = TARGETS.get((row["case"], row["way"]))
        if target is None:
            continue
        row["target"] = target.text
        row["met"] = target.met(row) if "H200" in jax.devices()[0].device_kind else None


@dataclasses.dataclass(frozen=True)
class Target:
    text: str
    met: Callable[[dict[str, Any]], bool]


def _of_plain(share: float) -> Target:
    return Target(f">= {share:.0%} of plain", lambda row: row["to_plain"] is not None and row["to_plain"] <= 1 / share)


def _faster(times: float) -> Target:
    return Target(f">= {times:g} x plain", lambda row: row["to_plain"] is not None and row["to_plain"] <= 1 / times)


def _in_passing(row: dict[str, Any]) -> bool:
    return "to_copies" in row and row["to_copies"] <= 1.5 and row["extra_layers"] <= 1


IN_PASSING = Target("<= 1.5 x copies, <= 1 layer", _in_passing)
TARGETS = {
    ("crossbar", ""): _of_plain(0.7),
    ("grouped", ""): _of_plain(0.6),
    ("decode", ""): Target(">= 70% of bandwidth", lambda row: row["floor_bytes_s"] / row["ours_s"] >= 0.7),
    ("quantized-decode", "4 bits"): _faster(2.5),
    ("quantized-decode", "2 bits"): _faster(3.5),
    ("seeds", "layer"): IN_PASSING,
    ("seeds", "kernel"): IN_PASSING,
}


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def verdict(row: dict[str, Any]) -> str:
    if row.get("met") is None:
        return "-"
    return f"{row['target']}: {'met' if row['met'] else 'not met'}"


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """One case."""
    table = make_table(name, "", HEADINGS)
    for row in result["rows"]:
        floors = (ms(row["floor_operations_s"]), ms(row["floor_bytes_s"]))
        times = (ms(row["ours_s"]), ratio(row["to_floor"]), ms(row["plain_s"]), ratio(row["to_plain"]))
        table.add_row(row["way"] or "ours", *floors, *times, row["plain"] or "-", verdict(row))
    console.print(table)
    for row in result["rows"]:
        if row["tokens_per_s"] is not None:
            console.print(f"{row['tokens_per_s']:,.0f} tokens/s, the seeds' counted each")
        if row["weight_bytes"] is not None:
            console.print(
                f"{row['way']}: weights {mb(row['weight_bytes'])} MB of {mb(row['plain_weight_bytes'])}, "
                f"{ratio(row['plain_weight_bytes'] / row['weight_bytes'])} x fewer; {ratio(1 / row['to_plain'])} x as "
                "fast as plain"
            )
        if "to_copies" in row:
            console.print(
                f"{row['way']}: {row['to_copies']:.2f} x copies, planned {mb(row['planned_bytes'])} MB, "
                f"peak at most {mb(row['peak_bytes'])} MB, {row['extra_layers']:+.2f} layers more than stored"
            )
    for program, seconds in (result["plain_s"] | result["peers_s"]).items():
        console.print(f"{program}: {ms(seconds)} ms")
    for program, reason in result["failed"].items():
        console.print(f"{program or 'ours'} did not run: {first_line(reason)}")


HEADINGS = ("floor: op ms", "bytes ms", "ours ms", "/ floor", "plain ms", "/ plain", "plain program", "target")


def sweep(cases: list[str], sizes: Sizes, implementation: str, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Times the kernels with other block sizes."""
    console.print("case, product, rows: columns, chunk, warps, stages: ms")
    rows: list[dict[str, Any]] = []
    for one in candidates(cases, sizes, implementation):
        cut = None if one.sizes is None else dataclasses.asdict(one.sizes)
        row: dict[str, Any] = {"case": one.case, "product": one.product, "rows": one.rows, "sizes": cut}
        try:
            ready = prepare(one.program, compile_program(one.program))
            row["ours_s"] = measure({"ours": ready.call}, None, [], rounds)["ours"]
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # such as more shared memory than there is
            row |= {"ours_s": None, "failed": first_line(why(error))}
        rows.append(row)
        chosen = "table" if cut is None else ", ".join(str(value) for value in cut.values())
        result = row.get("failed") or ms(row["ours_s"])
        console.print(f"{one.case}, {one.product}, {one.rows}: {chosen}: {result}", highlight=False)
    return rows


@contextlib.contextmanager
def peers_of(python: Path | None, sizes: Sizes) -> Generator[dict[str, Callable[[], float]]]:
    """Timed calls of torch and aihwkit-lightning, with and, on a GPU, also without its own kernels."""
    modes = {"torch": ("plain", "0"), "aihwkit-lightning": ("crossbar_static", "0")}
    if jax.default_backend() == "gpu":
        modes["aihwkit-lightning, Triton"] = ("crossbar_static", "1")
    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], float]] = {}
        for name, (command, triton) in modes.items():
            options = ("--side", str(sizes.side))
            call = stack.enter_context(peer(python, "crossbar", *options, AIHWKIT_USE_TRITON=triton))
            if call is not None:
                calls[name] = functools.partial(call, command)
        yield calls


def check_names(cases: list[str] | None, implementation: str, *, sweep_blocks: bool) -> list[str]:
    """The cases to run, in the order of the table."""
    known = [name for name in CASES if not sweep_blocks or name in SWEPT]
    for name in cases or ():
        if name not in known:
            raise SystemExit(f"--case {name}: choose from {', '.join(known)}")
    if sweep_blocks and implementation == "xla":
        raise SystemExit("--sweep-blocks: only the kernels have block sizes; name one by --implementation")
    return [name for name in known if cases is None or name in cases]


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; all by default.")] = None,
    *,
    small: Annotated[bool, typer.Option(help="Small shapes.")] = False,
    implementation: Annotated[str | None, typer.Option(help="Default: pallas, on CPU xla.")] = None,
    sweep_blocks: Annotated[bool, typer.Option(help="Other block sizes of the kernels.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed calls of each program.")] = 9,
    peer_python: Annotated[Path | None, typer.Option(help="Python with torch and aihwkit-lightning.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write all numbers with provenance.")] = None,
) -> None:
    """Measure and print."""
    device, sizes, console = jax.devices()[0], SMALL if small else FULL, make_console()
    name = implementation or ("xla" if device.platform == "cpu" else "pallas")
    chosen = check_names(case, name, sweep_blocks=sweep_blocks)
    console.print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, implementation {name}")
    command = ["python", "experiments/bench_kernels.py", *sys.argv[1:]]
    record: dict[str, Any] = {"provenance": provenance() | {"command": command}, "implementation": name, "small": small}

    def save() -> None:
        if output is not None:
            output.write_text(json.dumps(record, indent=1) + "\n")

    try:
        if sweep_blocks:
            record["sweep"] = sweep(chosen, sizes, name, rounds, console)
        else:
            rates = measure_rates(sizes)
            record |= {"rates": dataclasses.asdict(rates), "cases": {}}
            console.print(f"{rates.operations_per_s / 1e12:.3g} T operations/s, {rates.bytes_per_s / 1e9:.4g} GB/s")
            for one in chosen:
                with peers_of(peer_python if one == "crossbar" else None, sizes) as peers:
                    record["cases"][one] = try_case(one, sizes, name, rates, rounds, peers)
                show(console, one, record["cases"][one])
                save()
    except NotImplementedError as error:
        raise SystemExit(str(error)) from None
    save()


if __name__ == "__main__":
    typer.run(main)
