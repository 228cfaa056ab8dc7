"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

MODEL = Annotated[
    str,
    typer.Argument(help="Model directory, name on the hub (owner/name or owner/name@revision), or 'reference'."),
]
DTYPE = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
RULE = Annotated[
    str,
    typer.Option(
        help="max_neuron_norm, activation_frequency, activation_weight, router_norm, random, noise_sensitivity or "
        "measured."
    ),
]
DOWN_AXIS = Annotated[str, typer.Option(help="What a neuron of 'down' is: hidden or output.")]
TEXT = Annotated[Path | None, typer.Option(help="UTF-8 text; default: the embedded held-out text.")]
SEQ = Annotated[int, typer.Option(help="Tokens predicted per window; windows do not overlap.")]

DEVICE = Annotated[
    str,
    typer.Option(help="pcm, hermes, hermes1, state_independent, reram_wan, reram_cmo, afm, additive or proportional."),
]
TIME = Annotated[float | None, typer.Option(help="Seconds from programming to reading (drift, read noise).")]
COMPENSATION = Annotated[bool, typer.Option(help="Undo the mean drift of every tile.")]
READ_NOISE = Annotated[float, typer.Option(help="Std of per-product read noise, normalised; 0 = off.")]
READ_NOISE_KIND = Annotated[str, typer.Option(help="pcm (grows with the weights) or additive.")]
INPUT_RANGE = Annotated[str, typer.Option(help="DAC ranges: ema_std, quantile, max, or dynamic.")]
RANGE_K = Annotated[float, typer.Option(help="K of the ema_std range.")]
ADC_BOUND = Annotated[
    float | None,
    typer.Option(help="Lambda: ADC bound / (input range x weight maximum); default 3, with dynamic ranges 12."),
]
BOUND_AXIS = Annotated[str, typer.Option(help="Weight maximum of the ADC bound: tile or column.")]
DAC_BITS = Annotated[int, typer.Option(help="DAC bits; 0 = ideal.")]
ADC_BITS = Annotated[int, typer.Option(help="ADC bits; 0 = ideal.")]
TILE_ROWS = Annotated[int, typer.Option(help="Rows of a crossbar tile.")]
CALIBRATION = Annotated[
    Path | None, typer.Option(help="Input ranges and lambda made by 'hetmoe calibrate', instead of from text.")
]
IMPLEMENTATION = Annotated[
    str,
    typer.Option(
        help="Of products of experts and crossbars: xla, pallas (TPU, NVIDIA GPU); for checks interpret_tpu or "
        "interpret_cuda (slow)."
    ),
]
WEIGHTS = Annotated[
    str,
    typer.Option(help="When crossbars are programmed: stored (once), layer or kernel (in every pass: less memory)."),
]
ONE_NOISE_SCALE = Annotated[float, typer.Option(help="Scale c of programming noise.")]
SEEDS = Annotated[int, typer.Option(help="Noise seeds.")]
SEED = Annotated[int, typer.Option(help="Base seed.")]
RUN_DTYPE = Annotated[str, typer.Option(help="float32, bfloat16 or float16 for weights and activations.")]
JSON_FILE = Annotated[Path | None, typer.Option("--json", help="Write results with provenance.")]

MESH = Annotated[
    str | None,
    typer.Option(
        help="Parts by axis (data, seed, expert, tensor), such as data=2,expert=4, or auto; default: chosen where "
        "there are several devices."
    ),
]
COORDINATOR = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, in a run of several processes that are started by hand.")
]
PROCESSES = Annotated[int | None, typer.Option(help="How many processes there are, with --coordinator.")]
PROCESS = Annotated[int | None, typer.Option(help="Number of this process, from 0.")]
CLUSTER = Annotated[
    str | None, typer.Option(help="Several processes by the variables of slurm, mpi, or k8s (an indexed Job).")
]
CPU_DEVICES = Annotated[int | None, typer.Option(help="Simulate so many devices on this CPU.")]

PROCESSOR = Annotated[str, typer.Option(help="Digital unit: a name of 'hetmoe hardware --list', or a TOML file.")]
CHIP = Annotated[str, typer.Option(help="Analog chips: a name of 'hetmoe hardware --list', or a TOML file.")]
LINK = Annotated[str, typer.Option(help="Between both: a name of 'hetmoe hardware --list', or a TOML file.")]


def chosen_adc_bound(given: float | None, input_range: str, calibration: Path | None) -> float:
    """Lambda: as given, as a calibration file says, or the default for the way that ranges are chosen."""
    from hetmoe.evaluate.calibration_file import stored_adc_bound

    if given is not None:
        return given
    if calibration is not None:
        return stored_adc_bound(calibration)
    return 12.0 if input_range == "dynamic" else 3.0
