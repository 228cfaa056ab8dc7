"""The commands that evaluate models: like `hetmoe.cli` they parse, call and print."""

from pathlib import Path
from typing import Annotated

import typer

from hetmoe.cli_options import (
    ADC_BITS,
    ADC_BOUND,
    BOUND_AXIS,
    CALIBRATION,
    CLUSTER,
    COMPENSATION,
    COORDINATOR,
    CPU_DEVICES,
    DAC_BITS,
    DEVICE,
    DOWN_AXIS,
    IMPLEMENTATION,
    INPUT_RANGE,
    JSON_FILE,
    MESH,
    MODEL,
    ONE_NOISE_SCALE,
    PROCESS,
    PROCESSES,
    RANGE_K,
    READ_NOISE,
    READ_NOISE_KIND,
    RULE,
    RUN_DTYPE,
    SEED,
    SEEDS,
    SEQ,
    TEXT,
    TILE_ROWS,
    TIME,
    WEIGHTS,
    chosen_adc_bound,
)


def add_evaluation_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    app.command(
        epilog="Example: hetmoe eval reference --digital 0.125 --device pcm --noise-scale 0 --noise-scale 5 --seeds 8 "
        "--plot sweep.png"
    )(eval)
    app.command(epilog="Example: hetmoe sweep rules.toml -o build/rules")(sweep)
    app.command(epilog="Example: hetmoe report rules -o rules-report")(report)
    app.command(
        epilog="Example: hetmoe tasks allenai/OLMoE-1B-7B-0924 --task piqa --task arc_easy --device pcm "
        "--noise-scale 1.5 --seeds 8 -o results"
    )(tasks)


def eval(  # noqa: A001
    model: MODEL = "reference",
    rule: RULE = "max_neuron_norm",
    digital: Annotated[
        list[float] | None, typer.Option(help="Fraction of digital experts; repeatable; default 0.125.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Evaluate a saved plan too; repeatable.")] = None,
    device: DEVICE = "pcm",
    noise_scale: Annotated[
        list[float] | None, typer.Option(help="Scale c of programming noise; repeatable; default 1.")
    ] = None,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    read_noise: READ_NOISE = 0.0,
    read_noise_kind: READ_NOISE_KIND = "pcm",
    seeds: SEEDS = 8,
    seed: SEED = 0,
    text: TEXT = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to evaluate; default 16384, or what there is.")] = None,
    seq: SEQ = 256,
    batch: Annotated[int, typer.Option(help="Windows run at once.")] = 16,
    jobs: Annotated[int | None, typer.Option(help="Seeds run side by side; default 2 on CPU, 1 elsewhere.")] = None,
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
    dtype: RUN_DTYPE = "float32",
    json_file: JSON_FILE = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG with error bands.")] = None,
    progress: Annotated[
        Path | None, typer.Option(help="File of finished parts of the text: the same command goes on there.")
    ] = None,
    mesh: MESH = None,
    coordinator: COORDINATOR = None,
    processes: PROCESSES = None,
    process: PROCESS = None,
    cluster: CLUSTER = None,
    cpu_devices: CPU_DEVICES = None,
) -> None:
    """Perplexity, bits per byte and next-word accuracy of placements over noise scales and seeds."""
    from hetmoe.commands.evaluate import EvalRequest, run
    from hetmoe.commands.mesh_options import MeshOptions

    run(
        EvalRequest(
            model=model, rule=rule, fractions=[0.125] if digital is None else digital, plans=plan or [], device=device,
            noise_scales=[1.0] if noise_scale is None else noise_scale, time_s=time,
            drift_compensation=drift_compensation, read_noise=read_noise, read_noise_kind=read_noise_kind,
            seeds=seeds, seed=seed, text=text, tokens=tokens, seq=seq,
            batch=batch, jobs=jobs, weights=weights, implementation=implementation,
            input_range=input_range, range_k=range_k,
            adc_bound=chosen_adc_bound(adc_bound, input_range, calibration),
            bound_axis=bound_axis, dac_bits=dac_bits or None, adc_bits=adc_bits or None, tile_rows=tile_rows,
            calibration_file=calibration,
            down_axis=down_axis,
            dtype=dtype, json_file=json_file, plot=plot, progress=progress,
            devices=MeshOptions(
                mesh=mesh, coordinator=coordinator, processes=processes, process=process, cluster=cluster,
                cpu_devices=cpu_devices,
            ),
        )
    )  # fmt: skip


def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file: model, text, grid of points, hardware.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the results; default: CONFIG without suffix.")
    ] = None,
    extend: Annotated[bool, typer.Option(help="Add points: the axes of the grid have only grown.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Evaluate points again that gave no number.")
    ] = False,
    status: Annotated[bool, typer.Option(help="Count finished, failed, claimed and open points, and stop.")] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Evaluate part I (from 0) of N into DIR/parts; 'slurm' takes both from the job array. For machines "
            "that share DIR.",
        ),
    ] = None,
    collect: Annotated[bool, typer.Option("--collect", help="Gather what parts have finished, and stop.")] = False,
    ray: Annotated[
        int | None, typer.Option(metavar="N", help="Run N parts as tasks of Ray (extra 'cluster'), then collect.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto or HOST:6379; default: Ray on this machine.")
    ] = None,
    mesh: MESH = None,
    coordinator: COORDINATOR = None,
    processes: PROCESSES = None,
    process: PROCESS = None,
    cluster: CLUSTER = None,
    cpu_devices: CPU_DEVICES = None,
) -> None:
    """Evaluate a grid of placements, devices, noise scales, times, bits and seeds into DIR/sweep.sqlite.

    The same command goes on where it was stopped, however that was. Run it several times at once on one machine to
    share the work; on several machines, run a part on each, and collect.
    """
    from hetmoe.commands.mesh_options import MeshOptions
    from hetmoe.commands.sweep import SweepRequest, run

    run(
        SweepRequest(
            config_file=config, output=output, extend=extend, retry_failed=retry_failed, status=status, part=part,
            collect=collect, ray=ray, ray_address=ray_address,
            devices=MeshOptions(
                mesh=mesh, coordinator=coordinator, processes=processes, process=process, cluster=cluster,
                cpu_devices=cpu_devices,
            ),
        )
    )  # fmt: skip


def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a sweep's store (`hetmoe sweep`).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; default: DIRECTORY/report.")
    ] = None,
) -> None:
    """Make a page, figures (PNG, SVG) and tables (CSV) of a sweep, finished or not."""
    from hetmoe.commands.report import run

    run(directory, output)


def tasks(
    model: Annotated[str, typer.Argument(help="Model directory, name on the hub, or 'reference'.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results by task and seed; a stopped run goes on there.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="piqa, arc_easy, arc_challenge, boolq, hellaswag, winogrande, mathqa, mmlu, or another "
            "multiple-choice task of lm-eval; repeatable; default: these eight."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Run a saved plan.")] = None,
    rule: Annotated[str | None, typer.Option(help="Place by this rule; default max_neuron_norm.")] = None,
    digital: Annotated[float | None, typer.Option(help="Fraction of digital experts; default 0.125.")] = None,
    placement: Annotated[str | None, typer.Option(help="all_digital, experts_analog or all_analog.")] = None,
    device: DEVICE = "pcm",
    noise_scale: ONE_NOISE_SCALE = 1.0,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    read_noise: READ_NOISE = 0.0,
    read_noise_kind: READ_NOISE_KIND = "pcm",
    seeds: SEEDS = 8,
    seed: SEED = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of questions: snapshots of the hub's repositories (DIR/baber/piqa), or JSONL files of the "
            "same fields (DIR/piqa/validation.jsonl, DIR/mmlu/anatomy/test.jsonl); default: the hub."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First questions of every task (of every subject of mmlu).")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples per prompt; default: the task's own.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; default: the embedded one.")] = None,
    seq: Annotated[int, typer.Option(help="Tokens per window of that text.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens run at once, padding included.")] = 4096,
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
    dtype: RUN_DTYPE = "float32",
    json_file: JSON_FILE = None,
) -> None:
    """Accuracy on multiple-choice tasks by lm-eval (extra: eval), digital and over noise seeds."""
    from hetmoe.commands.tasks import TasksRequest, run
    from hetmoe.evaluate.tasks.names import PAPER_TASKS

    run(
        TasksRequest(
            model=model, tasks=list(PAPER_TASKS) if task is None else task, plan=plan, rule=rule, fraction=digital,
            placement=placement, device=device, noise_scale=noise_scale, time_s=time,
            drift_compensation=drift_compensation, read_noise=read_noise, read_noise_kind=read_noise_kind,
            seeds=seeds, seed=seed, data=data, limit=limit, num_fewshot=num_fewshot, text=text, seq=seq,
            batch_tokens=batch_tokens, implementation=implementation, input_range=input_range, range_k=range_k,
            adc_bound=chosen_adc_bound(adc_bound, input_range, calibration),
            bound_axis=bound_axis, dac_bits=dac_bits or None, adc_bits=adc_bits or None, tile_rows=tile_rows,
            calibration_file=calibration,
            down_axis=down_axis,
            dtype=dtype, output=output, json_file=json_file,
        )
    )  # fmt: skip
