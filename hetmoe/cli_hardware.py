"""The commands about hardware: like `hetmoe.cli` they parse, call and print."""

from pathlib import Path
from typing import Annotated

import typer

from hetmoe.cli_options import CHIP, DOWN_AXIS, DTYPE, JSON_FILE, LINK, MODEL, PROCESSOR, SEQ, TEXT


def add_hardware_commands(app: typer.Typer) -> None:
    """Adds them to the command line."""
    app.command(
        epilog="Example: hetmoe hardware reference --rule max_neuron_norm --digital 0.125 --processor a100-80gb "
        "--chip hermes-64core --batch 32 --explain"
    )(hardware)


def hardware(
    model: MODEL = "reference",
    plan: Annotated[Path | None, typer.Option(help="Place by a saved plan.")] = None,
    placement: Annotated[
        str | None, typer.Option(help="all_digital, experts_analog or all_analog; default experts_analog.")
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
