"""CPU speed: ratios to plain matmuls, to aihwkit-lightning and to transformers, all measured in one run.

    python experiments/bench_cpu.py                                   # ours alone
    python experiments/bench_cpu.py --peer-python ENV/bin/python      # beside the peers

ENV is an environment with torch (CPU), aihwkit-lightning 2.1 and transformers 5 (`bench_peers.py`). The two programs
take turns call by call, so that a ratio is not one of two moments of the machine; medians over the rounds. Cost: about
four minutes on two idle cores. Run it on an otherwise idle machine: the first line says how busy it is.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import hetmoe
from hetmoe.analog.programming import program_matrix
from hetmoe.analog.tiles import block_max
from hetmoe.checkpoint.load import model_directory
from hetmoe.evaluate.provenance import provenance
from hetmoe.models.abstract import init_params
from hetmoe.models.model import Model
from hetmoe.ops.dispatch import choose_block_size, dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_matmul.feed_forward import grouped_feed_forward, matrix_by_matrix
from hetmoe.ops.grouped_matmul.xla import grouped_matmul

ROWS, INPUTS, OUTPUTS, SEEDS = 512, 2048, 1024, 8
BATCH, LENGTH = 16, 256
Commands = dict[str, Callable[[], float]]


def timed(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A call of a compiled function that returns its seconds; compiled and warmed up here."""
    for _ in range(3):
        jax.block_until_ready(function(*arguments))

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    return call


def crossbar_commands() -> Commands:
    """One matrix: converters, and programming for several seeds."""
    x = jax.random.normal(jax.random.key(0), (ROWS, INPUTS))
    w = 0.02 * jax.random.normal(jax.random.key(1), (INPUTS, OUTPUTS))
    ranges, maxima = jnp.full((4,), 3.0), block_max(w, 512, per_column=False)
    keys = jax.random.split(jax.random.key(2), SEEDS)

    def over_seeds(device: str) -> Callable[[], float]:
        spec = hetmoe.analog_spec(device)

        def run(x: jax.Array, w: jax.Array, keys: jax.Array) -> jax.Array:
            return jax.lax.map(
                lambda key: hetmoe.crossbar_matmul(x, program_matrix(key, w, spec, expert=0), input_range=ranges), keys
            )

        return timed(jax.jit(run), x, w, keys)

    plain = jax.jit(lambda x, w: x @ w)
    return {
        "plain": timed(plain, x, w),
        "static": timed(jax.jit(lambda x, w: hetmoe.crossbar_matmul(x, w, input_range=ranges)), x, w),
        "dynamic": timed(jax.jit(hetmoe.crossbar_matmul), x, w),
        "static, weight maximum given": timed(
            jax.jit(lambda x, w, m: hetmoe.crossbar_matmul(x, w, input_range=ranges, weight_max=m)), x, w, maxima
        ),
        "plain x 8": timed(lambda x, w: [plain(x, w) for _ in range(SEEDS)], x, w),
        "8 seeds, one draw (afm)": over_seeds("afm"),
        "8 seeds, one draw (additive)": over_seeds("additive"),
        "8 seeds, pair (pcm)": over_seeds("pcm"),
        "8 seeds, pair (hermes)": over_seeds("hermes"),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardCase:
    """A digital model whose forward pass is timed, all logits."""

    name: str
    directory: Path
    batch: int


def forward_cases(folder: Path) -> list[ForwardCase]:
    """The embedded model, and random weights of OLMoE's proportions at a quarter of its width, saved in `folder`."""
    config = dataclasses.replace(
        hetmoe.load_model("reference").config, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64,
        num_experts=16, experts_per_token=4, expert_intermediate_size=512, vocab_size=8192,
    )  # fmt: skip
    params = init_params(jax.random.key(0), config)
    random = Model(params=params, config=config, tokenizer=None, eos_token_id=None, name="proportions")
    hetmoe.save_model(folder, random)
    return [
        ForwardCase(name="reference", directory=model_directory("reference"), batch=BATCH),
        ForwardCase(name="proportions", directory=folder, batch=8),
    ]


def forward_commands(case: ForwardCase) -> Commands:
    """Ours."""
    model = hetmoe.load_model(str(case.directory), "float32")
    tokens = jax.random.randint(jax.random.key(0), (case.batch, LENGTH), 0, model.config.vocab_size)
    return {"forward": timed(jax.jit(hetmoe.forward, static_argnames="config"), model.params, tokens, model.config)}


def block_size_commands() -> Commands:
    """Grouped matmul at the reference model's shape for several block sizes."""
    tokens, experts, width = 4096, 32, 128
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    w = jax.random.normal(jax.random.key(1), (experts, width, width))
    chosen = jax.random.randint(jax.random.key(2), (tokens, 2), 0, experts)
    commands = {}
    for size in (16, 32, 64, 128, 256):

        @jax.jit
        def run(x: jax.Array, w: jax.Array, chosen: jax.Array, size: int = size) -> jax.Array:
            plan = dispatch(chosen, experts, size)
            return grouped_matmul(to_blocks(x, plan), w, plan.block_expert, None)

        commands[f"block {size}"] = timed(run, x, w, chosen)
    return commands


def experts_commands() -> Commands:
    """The experts of one layer of `proportions`, and the plain matmul of as many products."""
    tokens, experts, copies, width = 2048, 16, 4, 512
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    gate, up, down = jax.random.normal(jax.random.key(1), (3, experts, width, width)) * width**-0.5
    chosen = jax.vmap(lambda key: jax.random.permutation(key, experts)[:copies])(
        jax.random.split(jax.random.key(2), tokens)
    )
    size = choose_block_size(chosen.size, experts)

    def run(network: Callable[..., jax.Array]) -> Callable[[], float]:
        @jax.jit
        def experts_of(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, chosen: jax.Array) -> jax.Array:
            plan = dispatch(chosen, experts, size)
            used = (plan.slot_token < tokens).reshape(-1, size).any(axis=1)
            y = network(to_blocks(x, plan), gate, up, down, plan.block_expert, used)
            return from_blocks(y, plan).sum(axis=1)

        return timed(experts_of, x, gate, up, down, chosen)

    rows, wide = jnp.tile(x, (copies, 1)), jnp.concatenate([gate[0], up[0], down[0]], axis=1)
    return {
        "plain matmul": timed(jax.jit(jnp.matmul), rows, wide),
        "block by block": run(grouped_feed_forward),
        "matrix by matrix": run(matrix_by_matrix),
    }


@contextlib.contextmanager
def peer(python: Path | None, what: str, *options: str, **environment: str) -> Generator[Callable[[str], float] | None]:
    """A running `bench_peers.py`, as a function from a command's name to its seconds; None without a peer."""
    if python is None:
        yield None
        return
    script = Path(__file__).with_name("bench_peers.py")
    process = subprocess.Popen(
        [str(python), str(script), "--what", what, "--serve", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    asks, answers = process.stdin, process.stdout

    def call(name: str) -> float:
        asks.write(name + "\n")
        asks.flush()
        answer = answers.readline()
        if not answer:
            raise SystemExit(f"the peer process ended at {name!r}: run {script.name} --what {what} by hand to see why")
        return float(answer)

    try:
        yield call
    finally:
        asks.close()
        process.wait(timeout=60)


def measure(
    ours: Commands, peer_call: Callable[[str], float] | None, theirs: list[str], rounds: int
) -> dict[str, float]:
    """Median seconds of every command, all taken in turns."""
    calls: Commands = dict(ours)
    if peer_call is not None:
        calls |= {f"peer {name}": functools.partial(peer_call, name) for name in theirs}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call())
    return {name: statistics.median(values) for name, values in times.items()}


def show(console: Console, title: str, medians: dict[str, float], base: Callable[[str], str]) -> None:
    """A table of milliseconds and ratios to each row's base."""
    table = Table(title=title, title_justify="left")
    for heading in ("what", "ms", "ratio", "to"):
        table.add_column(heading, justify="left" if heading in ("what", "to") else "right")
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / medians[base(name)]:.2f}", base(name))
    console.print(table)


def base_of_crossbar(name: str) -> str:
    """What a row of the crossbar table is compared with: the plain matmul of the same program."""
    several = "8" in name
    if name.startswith("peer"):
        return "peer plain8" if several else "peer plain"
    return "plain x 8" if several else "plain"


def main(
    peer_python: Annotated[Path | None, typer.Option(help="Python with torch and the peers.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each command.")] = 15,
    output: Annotated[Path | None, typer.Option("--json", help="Write medians with provenance.")] = None,
) -> None:
    """Measure and print."""
    console = Console()
    console.print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, jax {jax.__version__}")
    results: dict[str, dict[str, float]] = {}
    with peer(peer_python, "crossbar") as call:
        names = ["plain", "crossbar_static", "crossbar_dynamic", "plain8", "seeds8"]
        results["crossbar"] = measure(crossbar_commands(), call, names, rounds)
    show(console, f"x[{ROWS}, {INPUTS}] @ w[{INPUTS}, {OUTPUTS}], 8-bit converters, 512-row tiles",
         results["crossbar"], base_of_crossbar)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in forward_cases(Path(folder)):
            ours = forward_commands(case)
            for code in ("grouped_mm", "eager")[: 1 if peer_python is None else 2]:
                options = ("--model", str(case.directory), "--batch", str(case.batch), "--length", str(LENGTH))
                with peer(peer_python, "forward", *options, "--experts", code) as call:
                    medians = measure(ours, call, ["forward"], rounds)
                results[f"forward, {case.name}, {code}"] = medians
                show(console, f"{case.name}, {case.batch} x {LENGTH} tokens, float32 (peer: transformers, {code})",
                     medians, lambda _: "forward")  # fmt: skip
    results["blocks"] = measure(block_size_commands(), None, [], rounds)
    show(console, "dispatch and grouped matmul, 4096 tokens, top-2 of 32 experts, 128 x 128",
         results["blocks"], lambda _: "block 64")  # fmt: skip
    results["experts"] = measure(experts_commands(), None, [], rounds)
    show(console, "experts of a layer of proportions, dispatch included; as many products in one matmul",
         results["experts"], lambda _: "plain matmul")  # fmt: skip
    if output is not None:
        output.write_text(json.dumps({"provenance": provenance(), "median_s": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
