"""The commands about hardware: like `hetmoe.cli` they parse, call and print."""

from pathlib import Path
from typing import Annotated

import typer

from hetmoe.cli_options import (
    CHIP,
    COMPENSATION,
    DEVICE,
    DOWN_AXIS,
    DTYPE,
    JSON_FILE,
    LINK,
    MODEL,
    ONE_NOISE_SCALE,
    PROCESSOR,
    SEED,
    SEEDS,
    SEQ,
    TEXT,
    TIME,
)


def add_hardware_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    app.command(
        epilog="Example: hetmoe hardware reference --rule max_neuron_norm --digital 0.125 --processor a100-80gb "
        "--chip hermes-64core --batch 32 --explain"
    )(hardware)
    app.command(
        epilog="Example: hetmoe allocate reference --levels 2,3,4 --max-bytes 1000000 --max-tiles 300 --noise-scale 5 "
        "--report -o DIR"
    )(allocate)
    app.command(epilog="Example: hetmoe pareto reference --noise-scale 5 --batch 1 --batch 32 -o front")(pareto)
    app.command(
        epilog="Example: hetmoe simulate reference --adaptive --processor jetson-orin-nx --rate 1300 --duration 30 "
        "--noise-scale 2.5 --budget 0=0.3 --budget 10=0.05 --budget 20=0.6 -o run"
    )(simulate)


def hardware(
    model: MODEL = "reference",
    plan: Annotated[Path | None, typer.Option(help="Place by a saved plan.")] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="all_digital, experts_analog or all_analog; default: the plan beside the model (plan.json), else "
            "experts_analog, with quantized experts all_digital."
        ),
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Place by this rule: max_neuron_norm (default with --digital) or router_norm.")
    ] = None,
    digital: Annotated[float | None, typer.Option(help="Fraction of digital experts, with --rule.")] = None,
    processor: PROCESSOR = "a100-80gb",
    chip: CHIP = "ibm-3d-cim",
    link: LINK = "pcie4-x16",
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 32,
    context: Annotated[
        int | None, typer.Option(help="Positions of a decoded sequence; default 1024, or the model's context.")
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt in prefill; default: as --context.")] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="How often experts are chosen: text (measured on --text), uniform, or a file of --save-routing; "
            "default: text where the model's weights are on this machine, else uniform."
        ),
    ] = None,
    save_routing: Annotated[Path | None, typer.Option(help="Write the measured routing here.")] = None,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of text for --routing text.")] = 16384,
    seq: SEQ = 256,
    explain: Annotated[bool, typer.Option("--explain", help="Print every term by kind of module.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the hardware that hetmoe describes, and stop.")] = False,
    show: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print a description, to be copied and changed, and stop.")
    ] = None,
    down_axis: DOWN_AXIS = "hidden",
    dtype: DTYPE = None,
    json_file: JSON_FILE = None,
) -> None:
    """Throughput, energy, memory, tiles and area of a model on described hardware, and what bounds them.

    Decoding and prefill, with digital and analog work one after the other (serial) or side by side (overlap).
    """
    from hetmoe.commands import hardware as command

    if list_ or show is not None:
        command.show(show) if show is not None else command.list_hardware()
        return
    command.run(
        command.HardwareRequest(
            model=model, plan=plan, placement=placement, rule=rule, fraction=digital, processor=processor, chip=chip,
            link=link, batch=batch, context=context, prompt=prompt, routing=routing, save_routing=save_routing,
            text=text, tokens=tokens, seq=seq, explain=explain, down_axis=down_axis, seed=0,
            dtype=dtype, json_file=json_file,
        )
    )  # fmt: skip


def allocate(
    model: MODEL = "reference",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for plan and model; must be new.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Bits that a digital expert may have.")] = "2,3,4,8",
    max_bytes: Annotated[
        str | None, typer.Option(help="Of all digital experts' weights: a number, or such as '1.5 MB'.")
    ] = None,
    max_energy: Annotated[str | None, typer.Option(help="Per token, of all experts' matmuls, such as '20 uJ'.")] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Of crossbars, for analog experts.")] = None,
    no_plain: Annotated[bool, typer.Option("--no-plain", help="Digital experts must be quantized.")] = False,
    quantizer: Annotated[str, typer.Option(help="rtn, hqq or gptq.")] = "hqq",
    group: Annotated[int, typer.Option(help="Rows that share a step: 32, 64 or 128.")] = 128,
    device: DEVICE = "pcm",
    noise_scale: ONE_NOISE_SCALE = 1.0,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    processor: PROCESSOR = "a100-80gb",
    chip: CHIP = "ibm-3d-cim",
    batch: Annotated[int, typer.Option(help="Sequences decoded together, for the energy.")] = 32,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text that losses are estimated on.")] = 4096,
    seq: SEQ = 256,
    seed: SEED = 0,
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report", help="One error bound, and the measured error; default: right after programming."
        ),
    ] = None,
    report_tokens: Annotated[int, typer.Option(help="Tokens of text for --report.")] = 512,
    report_seeds: Annotated[int, typer.Option(help="Noise seeds for --report.")] = 8,
    dtype: DTYPE = None,
    json_file: JSON_FILE = None,
) -> None:
    """Decide for every expert: analog, or digital at so many bits, with the least expected loss within budgets.

    Device noise and quantization are weighed in one currency, and the choice is exact. Writes the quantized model with
    its plan, which eval, hardware and the other commands take.
    """
    from hetmoe.commands.allocate import AllocateRequest, run

    run(
        AllocateRequest(
            model=model, output=output, levels=levels, max_bytes=max_bytes, max_energy=max_energy, max_tiles=max_tiles,
            no_plain=no_plain, quantizer=quantizer, group=group, device=device, noise_scale=noise_scale, time_s=time,
            drift_compensation=drift_compensation, processor=processor, chip=chip, batch=batch, text=text,
            tokens=tokens, seq=seq, seed=seed, report=report, report_tokens=report_tokens, report_seeds=report_seeds,
            dtype=dtype, json_file=json_file,
        )
    )  # fmt: skip


def pareto(
    source: Annotated[
        str, typer.Argument(help="A model, whose deployments are measured, or the directory of a sweep's store.")
    ] = "reference",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; must be new.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Of placement; repeatable; default max_neuron_norm, noise_sensitivity, activation_weight."),
    ] = None,
    digital: Annotated[
        list[float] | None, typer.Option(help="Fraction of digital experts; repeatable; default 0.125, 0.25, 0.5.")
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(help="Of digital experts, 16 = not quantized; repeatable; default 3, 4, 8, 16.")
    ] = None,
    joint: Annotated[
        bool, typer.Option(help="Also assignments of 'hetmoe allocate' with as many bytes and tiles.")
    ] = True,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default 1, 8, 32, 128.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions of a decoded sequence; default 1024, or the model's context.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="serial or overlap.")] = "serial",
    processor: PROCESSOR = "a100-80gb",
    chip: CHIP = "ibm-3d-cim",
    link: LINK = "pcie4-x16",
    device: DEVICE = "pcm",
    noise_scale: ONE_NOISE_SCALE = 1.0,
    time: TIME = None,
    drift_compensation: COMPENSATION = False,
    quantizer: Annotated[str, typer.Option(help="rtn or hqq.")] = "hqq",
    group: Annotated[int, typer.Option(help="Rows that share a step: 32, 64 or 128.")] = 128,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = 8192,
    seq: SEQ = 256,
    seeds: SEEDS = 4,
    seed: SEED = 0,
) -> None:
    """Deployments that no other beats in perplexity, energy per token and tokens per second.

    Of a model, all combinations of rule, digital fraction and bits are measured over noise seeds; of a sweep's store,
    the points that it has. Each is estimated on the described hardware at every batch.
    """
    from hetmoe.commands.pareto import ParetoRequest, run

    run(
        ParetoRequest(
            source=source, output=output,
            rules=["max_neuron_norm", "noise_sensitivity", "activation_weight"] if rule is None else rule,
            fractions=[0.125, 0.25, 0.5] if digital is None else digital, bits=[3, 4, 8, 16] if bits is None else bits,
            joint=joint, batches=[1, 8, 32, 128] if batch is None else batch, context=context, schedule=schedule,
            processor=processor, chip=chip, link=link, device=device, noise_scale=noise_scale, time_s=time,
            drift_compensation=drift_compensation, quantizer=quantizer, group=group, text=text, tokens=tokens, seq=seq,
            seeds=seeds, seed=seed,
        )
    )  # fmt: skip


def simulate(
    model: MODEL = "reference",
    trace: Annotated[
        Path | None, typer.Option(help="CSV of requests: arrival_s, prompt_tokens, output_tokens; default: drawn ones.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Drawn requests per second, as a Poisson process; default 4.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds in which drawn requests arrive; default 60.")] = None,
    prompt: Annotated[float | None, typer.Option(help="Mean tokens of drawn prompts (geometric); default 256.")] = None,
    generate: Annotated[float | None, typer.Option(help="Mean tokens to generate (geometric); default 128.")] = None,
    max_batch: Annotated[int, typer.Option(help="Most requests that run at once.")] = 32,
    plan: Annotated[Path | None, typer.Option(help="Place by a saved plan.")] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="all_digital, experts_analog or all_analog; default: the plan beside the model (plan.json), else "
            "experts_analog, with quantized experts all_digital."
        ),
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Place by this rule: max_neuron_norm (default with --digital) or router_norm.")
    ] = None,
    digital: Annotated[float | None, typer.Option(help="Fraction of digital experts, with --rule.")] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="The runtime policy decides, on chips that drift while requests run.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S=SHARE",
            help="From this second on: the experts' energy, as a share of the way from all analog to all digital; "
            "repeatable; default 0=0.25.",
        ),
    ] = None,
    noise: Annotated[
        list[str] | None,
        typer.Option(metavar="S=FACTOR", help="From this second on: factor of the noise, as of heat; repeatable."),
    ] = None,
    observe: Annotated[
        float | None, typer.Option(help="Seconds between looks of the policy; default: 30 in all.")
    ] = None,
    dwell: Annotated[
        float | None, typer.Option(help="Seconds that an expert stays where it was moved to; default: two looks.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="That drifts, of the policy's chips; default pcm.")] = None,
    noise_scale: Annotated[float | None, typer.Option(help="Scale c of programming noise; default 1.")] = None,
    probes: Annotated[int | None, typer.Option(help="Vectors that probe every expert at each look; default 8.")] = None,
    processor: PROCESSOR = "a100-80gb",
    chip: CHIP = "ibm-3d-cim",
    link: LINK = "pcie4-x16",
    schedule: Annotated[str, typer.Option(help="serial or overlap.")] = "serial",
    routing: Annotated[
        str | None, typer.Option(help="text, uniform, or a file of 'hetmoe hardware --save-routing', as there.")
    ] = None,
    text: TEXT = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of text for --routing text.")] = 16384,
    seq: SEQ = 256,
    span: Annotated[float | None, typer.Option(help="Seconds of a line of the timeline; default: 30 lines.")] = None,
    seed: SEED = 0,
    down_axis: DOWN_AXIS = "hidden",
    dtype: DTYPE = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for figure, timeline and requests; must be new.")
    ] = None,
) -> None:
    """Stream requests through a model on described hardware: throughput, queue, energy and plan over time.

    Requests are batched continuously. The plan is fixed, or the runtime policy's: it probes simulated chips, and keeps
    an energy budget that may change.
    """
    from hetmoe.commands.simulate import SimulateRequest, run

    run(
        SimulateRequest(
            model=model, trace=trace, rate=rate, duration=duration, prompt=prompt, generate=generate,
            max_batch=max_batch, plan=plan, placement=placement, rule=rule, fraction=digital, adaptive=adaptive,
            budget=budget or [], noise=noise or [], observe=observe, dwell=dwell, device=device,
            noise_scale=noise_scale, probes=probes, processor=processor, chip=chip, link=link,
            schedule=schedule, routing=routing,
            save_routing=None, text=text, tokens=tokens, seq=seq, span=span, seed=seed,
            down_axis=down_axis, dtype=dtype, output=output,
        )
    )  # fmt: skip
