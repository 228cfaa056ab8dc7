"""Command line: parses, calls, prints. Bad input is one line on stderr and exit code 2."""

import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, cast

import typer

from hetmoe.cli_evaluate import add_evaluation_commands
from hetmoe.cli_hardware import add_hardware_commands
from hetmoe.cli_options import (
    ADC_BITS,
    ADC_BOUND,
    BOUND_AXIS,
    CALIBRATION,
    CHIP,
    COMPENSATION,
    DAC_BITS,
    DEVICE,
    DOWN_AXIS,
    DTYPE,
    IMPLEMENTATION,
    INPUT_RANGE,
    JSON_FILE,
    MODEL,
    ONE_NOISE_SCALE,
    PROCESSOR,
    RANGE_K,
    READ_NOISE,
    READ_NOISE_KIND,
    RULE,
    RUN_DTYPE,
    SEED,
    SEQ,
    TEXT,
    TILE_ROWS,
    TIME,
    WEIGHTS,
    chosen_adc_bound,
)
from hetmoe.errors import CheckpointWarning, InputError, Interrupted

# Typer carries its own copy of click and exports only this leaf of its exceptions: take the root of usage errors.
_ROOT = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
USAGE_ERRORS = cast("type[typer.BadParameter]", _ROOT)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_evaluation_commands(app)
add_hardware_commands(app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Run mixture-of-experts language models with most experts on noisy analog crossbars."""
    if version:
        print(f"hetmoe {metadata.version('hetmoe')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog="Example: hetmoe info reference, or what a mesh would take: hetmoe info reference --mesh data=2,expert=4 "
    "--analyze"
)
def info(
    model: MODEL = "reference",
    dtype: DTYPE = None,
    mesh: Annotated[
        str | None, typer.Option(help="Also count what each device of a mesh would take, such as data=2,expert=4.")
    ] = None,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Compile for that mesh, and read memory, FLOPs and communication.")
    ] = False,
    topology: Annotated[
        str | None,
        typer.Option(help="What to compile for, such as tpu:v5p:4x4x4 (needs libtpu, no TPU); default: this CPU."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows run at once on the mesh; default: one for each part of data x expert.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(help="Tokens per window of that batch; default: 1024, or the model's context.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="When crossbars are programmed: stored (the default), layer or kernel; or digital: nothing is analog."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the same as JSON.")] = None,
) -> None:
    """Describe a model: architecture, parameters by module, memory, tokenizer; and what it would take on a mesh.

    MODEL may also be a config.json without weights, of whatever name.
    """
    from hetmoe.commands.info import run  # imports of JAX wait until a command needs them
    from hetmoe.commands.info_mesh import MeshQuestion
    from hetmoe.errors import InputError

    question = None
    if mesh is not None:
        question = MeshQuestion(
            mesh=mesh,
            analyze=analyze,
            topology=topology,
            batch=batch,
            seq=seq,
            weights=weights or "stored",
            dtype=dtype,
        )
    elif analyze or any(option is not None for option in (topology, batch, seq, weights)):
        raise InputError(
            "--analyze, --topology, --batch, --seq and --weights need --mesh, such as --mesh data=2,expert=4"
        )
    run(model, dtype, json_file, question)


@app.command(
    epilog="Example: hetmoe place reference --rule max_neuron_norm --digital 0.125 -o plan.json, or for all modules: "
    "hetmoe place reference --rule noise_sensitivity --noise-scale 5 --budget parameters --dense --digital 0.2 "
    "-o plan.json"
)
def place(
    model: MODEL = "reference",
    rule: RULE = "max_neuron_norm",
    digital: Annotated[float, typer.Option(help="Fraction (see --budget) to keep digital.")] = 0.125,
    budget: Annotated[
        str,
        typer.Option(
            help="per_layer (of each layer's experts), parameters (of those of all modules that compete), or energy "
            "(of their extra energy when digital); the last two are solved exactly over all layers."
        ),
    ] = "per_layer",
    dense: Annotated[
        bool,
        typer.Option(help="Attention, shared experts, dense layers and LM head compete too; else they are digital."),
    ] = False,
    compare: Annotated[bool, typer.Option(help="Spearman correlation of the other rules with this one.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here.")] = None,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Most tokens for the rules that read text.")] = 16384,
    seq: SEQ = 256,
    seed: Annotated[int, typer.Option(help="Seed of rules 'random', 'noise_sensitivity' and 'measured'.")] = 0,
    seeds: Annotated[int, typer.Option(help="Noise seeds of rule 'measured'.")] = 8,
    down_axis: DOWN_AXIS = "hidden",
    device: DEVICE = "pcm",
    noise_scale: Annotated[float, typer.Option(help="Scale c that 'noise_sensitivity' and 'measured' look at.")] = 1.0,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    calibration: CALIBRATION = None,
    energy_batch: Annotated[int, typer.Option(help="Tokens decoded together, for --budget energy.")] = 32,
    energy_bytes: Annotated[float, typer.Option(help="Bytes of a digital weight, for --budget energy.")] = 2.0,
    processor: PROCESSOR = "a100-80gb",
    chip: CHIP = "ibm-3d-cim",
    dtype: DTYPE = None,
) -> None:
    """Score experts (or all modules) and decide which stay digital.

    max_neuron_norm, router_norm and random need no text and read the files of a checkpoint in under 1 GB of memory; the
    other rules, and converted (Orbax) checkpoints, load the model. noise_sensitivity is the expected loss increase
    under the device's noise, measured the one measured with one module analog at a time; without --calibration it has
    dynamic input ranges.
    """
    from hetmoe.commands.place import PlaceRequest, run

    run(
        PlaceRequest(
            model=model, rule=rule, fraction=digital, budget=budget, dense=dense, compare=compare, output=output,
            text=text, tokens=tokens, seq=seq, seed=seed, seeds=seeds, down_axis=down_axis, device=device,
            noise_scale=noise_scale, time_s=time, drift_compensation=drift_compensation, calibration=calibration,
            energy_batch=energy_batch, energy_bytes=energy_bytes, processor=processor, chip=chip, dtype=dtype,
        )
    )  # fmt: skip


@app.command(epilog="Example: hetmoe calibrate reference --by loss --analog all -o calibration.safetensors")
def calibrate(
    model: MODEL = "reference",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write ranges and lambda here.")] = None,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to calibrate on.")] = 16384,
    seq: SEQ = 256,
    method: Annotated[str, typer.Option(help="ema_std, quantile or max.")] = "ema_std",
    k: Annotated[list[float] | None, typer.Option(help="K of ema_std; repeatable; default: a grid.")] = None,
    quantile: Annotated[list[float] | None, typer.Option(help="Quantile of |x|; repeatable.")] = None,
    adc_bound: Annotated[list[float] | None, typer.Option(help="Lambda; repeatable; default: a grid.")] = None,
    by: Annotated[
        str, typer.Option(help="What the search minimises: output (error of each matrix) or loss.")
    ] = "output",
    analog: Annotated[str, typer.Option(help="Whose converters count: experts or all.")] = "experts",
    min_tokens: Annotated[int, typer.Option(help="Experts that saw fewer have the range of their layer.")] = 32,
    bound_axis: BOUND_AXIS = "tile",
    dac_bits: DAC_BITS = 8,
    adc_bits: ADC_BITS = 8,
    tile_rows: TILE_ROWS = 512,
    dtype: RUN_DTYPE = "float32",
) -> None:
    """Calibrate DAC input ranges (K) and the ADC bound (lambda) on text, together.

    One pass collects statistics; ranges by every K follow from them. With one K and one lambda nothing is searched.
    """
    from hetmoe.commands.calibrate import CalibrateRequest, run

    run(
        CalibrateRequest(
            model=model, output=output, text=text, tokens=tokens, seq=seq, method=method, k=k, quantile=quantile,
            adc_bound=adc_bound, by=by, analog=analog, min_tokens=min_tokens, bound_axis=bound_axis,
            dac_bits=dac_bits or None, adc_bits=adc_bits or None, tile_rows=tile_rows, dtype=dtype,
        )
    )  # fmt: skip


@app.command(
    epilog="Example: hetmoe convert allenai/OLMoE-1B-7B-0924 olmoe-orbax, or as a program: hetmoe convert reference "
    "--stablehlo --plan plan.json --noise-scale 2 -o forward"
)
def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory, name on the hub, or converted checkpoint.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="Directory to write; must not exist. Or name it with -o.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")] = None,
    to: Annotated[str, typer.Option(help="orbax, or safetensors (the Hugging Face layout).")] = "orbax",
    stablehlo: Annotated[
        bool, typer.Option("--stablehlo", help="Write the forward pass as programs instead (options below).")
    ] = False,
    platform: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda or tpu; repeatable; default: all that the implementation runs on."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of tokens; default: any number.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; default: any number up to 512.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Place by a saved plan.")] = None,
    rule: Annotated[str | None, typer.Option(help="Place by this rule; default max_neuron_norm.")] = None,
    digital: Annotated[float | None, typer.Option(help="Fraction of digital experts; default 0.125.")] = None,
    placement: Annotated[str | None, typer.Option(help="all_digital, experts_analog or all_analog.")] = None,
    device: DEVICE = "pcm",
    noise_scale: ONE_NOISE_SCALE = 1.0,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    read_noise: READ_NOISE = 0.0,
    read_noise_kind: READ_NOISE_KIND = "pcm",
    seed: SEED = 0,
    text: TEXT = None,
    seq: SEQ = 256,
    weights: WEIGHTS = "stored",
    implementation: IMPLEMENTATION = "xla",
    input_range: INPUT_RANGE = "ema_std",
    range_k: RANGE_K = 12.0,
    adc_bound: ADC_BOUND = None,
    bound_axis: BOUND_AXIS = "tile",
    dac_bits: DAC_BITS = 8,
    adc_bits: ADC_BITS = 8,
    tile_rows: TILE_ROWS = 512,
    calibration: CALIBRATION = None,
    down_axis: DOWN_AXIS = "hidden",
    dtype: DTYPE = None,
) -> None:
    """Convert a model to an Orbax checkpoint, or back, or (--stablehlo) its forward pass to programs.

    Programs (jax.export: versioned, one for each platform) take all weights as arguments and run without hetmoe.
    Without --plan, --rule, --digital or --placement they are digital.
    """
    from hetmoe.commands import convert, export

    where = convert.only_output(target, output)
    given = frozenset(n for n in context.params if _typed(context, n))
    if not stablehlo:
        convert.refuse_program_options(given)
        convert.run(model, where, to, dtype)
        return
    platforms = platform or list(export.default_platforms(implementation))
    export.run(
        export.ExportRequest(
            model=model, output=where, plan=plan, rule=rule, fraction=digital, placement=placement, device=device,
            noise_scale=noise_scale, time_s=time, drift_compensation=drift_compensation, read_noise=read_noise,
            read_noise_kind=read_noise_kind, seed=seed, text=text, seq=seq, weights=weights,
            implementation=implementation, input_range=input_range, range_k=range_k,
            adc_bound=chosen_adc_bound(adc_bound, input_range, calibration),
            bound_axis=bound_axis, dac_bits=dac_bits or None, adc_bits=adc_bits or None, tile_rows=tile_rows,
            calibration_file=calibration, down_axis=down_axis, platforms=platforms, batch=batch, length=length,
            dtype=dtype, given=given,
        )
    )  # fmt: skip


def _typed(context: typer.Context, name: str) -> bool:
    """Whether an option was on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command(epilog="Example: hetmoe quantize reference --bits 2.5 --levels 1,2,3 -o quantized")
def quantize(
    model: MODEL = "reference",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; must be new.")] = None,
    bits: Annotated[
        float | None, typer.Option(help="Average bits per weight of the digital experts, without overhead.")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Bits that an expert may get, such as 1,2,3; default: --bits.")] = (
        None
    ),
    rule: Annotated[
        str | None,
        typer.Option(
            help="router_change (needs --initial), router_norm, activation_frequency, random, uniform or "
            "expected_loss; default: router_norm, with --initial router_change, with one level uniform."
        ),
    ] = None,
    quantizer: Annotated[str, typer.Option(help="rtn, hqq or gptq.")] = "hqq",
    initial: Annotated[str | None, typer.Option(help="The model before training or fine-tuning, as MODEL.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Analog experts of this plan stay as they are.")] = None,
    group: Annotated[int, typer.Option(help="Rows that share a step: 32, 64 or 128.")] = 128,
    zeros: Annotated[str, typer.Option(help="symmetric, asymmetric, or auto (symmetric at 1 bit only).")] = "auto",
    zeta: Annotated[float, typer.Option(help="MaxVar ratio that moves an expert ahead; 0 = none moves.")] = 3.0,
    max_var: Annotated[str, typer.Option(help="MaxVar of the highest_norm neuron, or of all.")] = "highest_norm",
    alternative: Annotated[str, typer.Option(help="Counts at three levels: paper, or fewest_lowest.")] = "paper",
    more_bits: Annotated[str, typer.Option(help="For activation_frequency: rare or frequent.")] = "rare",
    max_bytes: Annotated[
        int | None, typer.Option(help="For expected_loss: bytes of all digital experts, instead of --bits.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Calibration text; default: the embedded one, apart from what eval reads.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of that text to use.")] = 8192,
    seq: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: SEED = 0,
    dtype: DTYPE = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also error bounds, certified routing, and what is observed.")
    ] = False,
    report_tokens: Annotated[int, typer.Option(help="Tokens of text for --report.")] = 512,
    json_file: JSON_FILE = None,
) -> None:
    """Give each digital expert its own precision, pack it, and say what is certain of the result.

    The same command goes on where it was stopped, layer by layer.
    """
    from hetmoe.commands.quantize import QuantizeRequest, run

    run(
        QuantizeRequest(
            model=model, output=output, bits=bits, levels=levels, rule=rule, quantizer=quantizer, initial=initial,
            plan=plan, group=group, zeros=zeros, zeta=zeta, max_var=max_var, alternative=alternative,
            more_bits=more_bits, max_bytes=max_bytes, text=text, tokens=tokens, seq=seq, seed=seed, dtype=dtype,
            report=report, report_tokens=report_tokens, json_file=json_file,
        )
    )  # fmt: skip


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Our own warnings are one line for the user; others show where they come from, as Python does."""
    del file, line  # Unused.
    where = "" if issubclass(category, CheckpointWarning) else f"{filename}:{lineno}: {category.__name__}: "
    print(f"hetmoe: warning: {where}{message}", file=sys.stderr)


def main() -> None:
    """Entry point of the `hetmoe` command."""
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except (InputError, NotImplementedError) as error:  # the latter: an implementation that cannot run this
        print(f"hetmoe: {error}", file=sys.stderr)
        sys.exit(2)
    except USAGE_ERRORS as error:  # an unknown option, a value that is no number
        print(f"hetmoe: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that fills up, a name that is too long
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"hetmoe: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(f"hetmoe: interrupted; {error}", file=sys.stderr)
        sys.exit(130)
    except (typer.Abort, KeyboardInterrupt):
        print("hetmoe: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
