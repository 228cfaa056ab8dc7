"""Times what others offer for the same work: aihwkit-lightning's crossbar layer and transformers' OLMoE forward.

Commands, in an environment with torch (CPU), and aihwkit-lightning 2.1 or transformers 5 as the choice needs:

    python experiments/bench_peers.py --what crossbar
    python experiments/bench_peers.py --what forward --model DIRECTORY --batch 2 --length 128

Each runs every command of its choice in turn, `--rounds` times, and prints one JSON line: the median seconds of each
command, the single times, shapes, threads and versions. Cost of the first: about 10 seconds on two cores.

`--side N` makes the matrices of the first choice N x N and bfloat16, on a GPU if torch sees one; with
AIHWKIT_USE_TRITON=1 in the environment aihwkit-lightning then runs its Triton kernels. Not run on a GPU yet.

With `--serve` it is a process that another benchmark drives, so that two programs are timed in turns on one machine:
it warms up, then reads one command per line from standard input and answers each with one line, the seconds of one
timed call, until the input ends. Nothing else goes to standard output.

    crossbar_static   x[512, 2048] by w[2048, 1024] through 512-row tiles, 8-bit converters, static input ranges
    crossbar_dynamic  the same with one input range per token and row-block
    plain             torch's linear layer on the same operands
    seeds8            8 calls of crossbar_static, each with weight noise of its own seed
    plain8            8 calls of plain
    forward           transformers' OlmoeForCausalLM on tokens [batch, length], float32

The layer adds weight noise (Gaussian, relative to the tile's largest weight) only in training mode: `seeds8` runs in
that mode without gradients, with the updating of input ranges switched off.

Threads of torch that wait for one another sleep instead of spinning (OMP_WAIT_POLICY=PASSIVE, unless it is set). With
spinning, one other busy process on a machine of two cores made crossbar_static 15 times slower, and a peer that waits
for its next command would take time from the program that it is compared with. On an idle machine try ACTIVE as well
and quote the faster.

Expected (one thread of a two-core machine, the other core busy): crossbar_static 1.5 times plain, crossbar_dynamic 1.4
times (the static path also keeps what training needs), seeds8 1.9 times plain8.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads its OpenMP

import torch  # pyright: ignore[reportMissingImports]

Commands = dict[str, Callable[[], Any]]

ROWS, INPUTS, OUTPUTS, TILE_ROWS, SEEDS = 512, 2048, 1024, 512, 8
STEPS, ADC_BOUND, INPUT_RANGE, NOISE = 254, 12.0, 3.0, 0.0175
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_crossbar_layer(weight: Any, *, dynamic: bool, noisy: bool) -> Any:
    """An AnalogLinear that holds `weight` `[outputs, inputs]`; it is in training mode if it is to add noise."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints when it is imported without triton
        from aihwkit_lightning.nn import AnalogLinear  # pyright: ignore[reportMissingImports]
        from aihwkit_lightning.simulator.configs import (  # pyright: ignore[reportMissingImports]
            TorchInferenceRPUConfig,
            WeightNoiseInjectionType,
        )

    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = STEPS
    config.forward.out_bound = ADC_BOUND
    config.mapping.max_input_size = TILE_ROWS
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.dynamic = dynamic
    config.pre_post.input_range.init_value = INPUT_RANGE
    config.pre_post.input_range.init_from_data = 0
    config.pre_post.input_range.learn_input_range = False
    if noisy:
        config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL
        config.modifier.std_dev = NOISE
    outputs, inputs = weight.shape
    layer = AnalogLinear(inputs, outputs, bias=False, rpu_config=config).to(weight.device, weight.dtype)
    layer.set_weights(weight)
    return layer.train(noisy)


def crossbar_commands(side: int | None) -> Commands:
    """One matrix: lightning's layer in four uses, and torch's linear layer."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = (side or size for size in (ROWS, INPUTS, OUTPUTS))
    x = torch.randn(rows, inputs, generator=generator)
    weight = 0.02 * torch.randn(outputs, inputs, generator=generator)
    if side is not None:
        x, weight = (values.to(DEVICE, torch.bfloat16) for values in (x, weight))
    static = make_crossbar_layer(weight, dynamic=False, noisy=False)
    dynamic = make_crossbar_layer(weight, dynamic=True, noisy=False)
    noisy = make_crossbar_layer(weight, dynamic=False, noisy=True)
    plain = torch.nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype)
    plain.weight.data.copy_(weight)

    def over_seeds() -> None:
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            noisy(x)

    return {
        "crossbar_static": lambda: static(x),
        "crossbar_dynamic": lambda: dynamic(x),
        "plain": lambda: plain(x),
        "seeds8": over_seeds,
        "plain8": lambda: [plain(x) for _ in range(SEEDS)],
    }


def forward_commands(directory: str, batch: int, length: int, experts: str | None) -> Commands:
    """The forward pass of a model directory, with transformers' own choice of expert code if `experts` is None."""
    with contextlib.redirect_stdout(sys.stderr):
        import transformers  # pyright: ignore[reportMissingImports]

        transformers.logging.disable_progress_bar()
        options = {} if experts is None else {"experts_implementation": experts}
        model = transformers.OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    return {"forward": lambda: model(tokens, use_cache=False).logits}


def time_call(call: Callable[[], Any]) -> float:
    """Seconds of one call without gradients."""
    with torch.no_grad():
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def warm_up(commands: Commands, calls: int) -> None:
    """Calls every command `calls` times."""
    for call in commands.values():
        for _ in range(calls):
            time_call(call)


def serve(commands: Commands) -> None:
    """Answers each line of standard input with the seconds of one call of the command that it names."""
    for line in sys.stdin:
        name = line.strip()
        if name not in commands:
            raise SystemExit(f"unknown command {name!r}: choose from {', '.join(commands)}")
        print(f"{time_call(commands[name]):.9f}", flush=True)


def measure(commands: Commands, rounds: int) -> dict[str, list[float]]:
    """Seconds of every command, one call of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, call in commands.items():
            times[name].append(time_call(call))
    return times


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"torch": torch.__version__}
    for package in ("aihwkit-lightning", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time aihwkit-lightning's crossbar layer or transformers' OLMoE.")
    parser.add_argument("--what", choices=("crossbar", "forward"), required=True)
    parser.add_argument("--model", help="directory with config.json and safetensors; required for forward")
    parser.add_argument("--side", type=int, help="of the square bfloat16 matrices of crossbar (default: see above)")
    parser.add_argument("--batch", type=int, default=2, help="sequences of forward")
    parser.add_argument("--length", type=int, default=128, help="tokens of each sequence of forward")
    parser.add_argument(
        "--experts", help="transformers' expert code: eager, batched_mm or grouped_mm (default: its own)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=3, help="untimed calls of each command")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each command, without --serve")
    parser.add_argument("--serve", action="store_true", help="answer commands from standard input")
    arguments = parser.parse_args()
    if arguments.what == "forward" and arguments.model is None:
        parser.error("--what forward needs --model")
    for name in ("batch", "length", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    """Serves, or measures and prints one JSON line."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "crossbar":
        commands = crossbar_commands(arguments.side)
        rows, inputs, outputs = (arguments.side or size for size in (ROWS, INPUTS, OUTPUTS))
        shapes: dict[str, Any] = {"x": [rows, inputs], "w": [inputs, outputs], "tile_rows": TILE_ROWS, "seeds": SEEDS}
    else:
        commands = forward_commands(arguments.model, arguments.batch, arguments.length, arguments.experts)
        shapes = {"tokens": [arguments.batch, arguments.length], "experts": arguments.experts}
    warm_up(commands, arguments.warm_up)
    if arguments.serve:
        serve(commands)
        return
    times = measure(commands, arguments.rounds)
    result = {
        "what": arguments.what,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "times_s": times,
        "shapes": shapes,
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
