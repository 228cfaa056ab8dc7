"""The command line: `python -m theory all`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hetmoe.cli import USAGE_ERRORS
from hetmoe.errors import InputError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Checks the neuron-norm claims on synthetic training of two-layer mixtures of experts, and the error bounds.",
)  # fmt: skip

INTERRUPTED = 130  # what typer returns after Ctrl-C
MOST_SEEDS = 2**20  # each has a thousand seeds of cases behind it

QUICK = Annotated[bool, typer.Option("--quick", help="Few seeds, frequencies and devices: under a minute.")]
SEEDS = Annotated[int | None, typer.Option(help="Mixtures of each frequency; default 16 (settings: 8), quick 4.")]
SEED = Annotated[int, typer.Option(help="Of everything that is drawn.")]
DIGITAL = Annotated[
    int | None, typer.Option(help="Experts of the highest scores that are digital; default half of them.")
]
OUTPUT = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory for figures and results.json; must be new.")
]


def _run(
    names: list[str], output: Path | None, *, quick: bool, seed: int, seeds: int | None = None,
    digital: int | None = None,
) -> None:  # fmt: skip
    from theory.run import PARTS, Options, run
    from theory.settings import BASE

    if seeds is not None and seeds < 2:
        raise InputError(f"--seeds {seeds} must be at least 2")
    if not 0 <= seed < MOST_SEEDS:
        raise InputError(f"--seed {seed} must be from 0 to {MOST_SEEDS - 1}")
    # Of the settings none has fewer experts than the analysed one.
    most = BASE.model.experts - 1
    if digital is not None and not 0 < digital <= most:
        raise InputError(f"--digital {digital} must be from 1 to {most}")
    options = Options(quick=quick, seeds=seeds, seed=seed, digital=digital)
    run([PARTS[name] for name in names], options, output)


@app.command()
def claims(
    quick: QUICK = False, seeds: SEEDS = None, seed: SEED = 0, digital: DIGITAL = None, output: OUTPUT = None
) -> None:
    """Specialisation, growth, order and tolerances, in the analysed setting on all devices."""
    _run(["claims"], output, quick=quick, seeds=seeds, seed=seed, digital=digital)


@app.command()
def settings(
    quick: QUICK = False, seeds: SEEDS = None, seed: SEED = 0, digital: DIGITAL = None, output: OUTPUT = None
) -> None:
    """The same claims where one thing about the analysed setting is changed."""
    _run(["settings"], output, quick=quick, seeds=seeds, seed=seed, digital=digital)


@app.command()
def bounds(quick: QUICK = False, seed: SEED = 0, output: OUTPUT = None) -> None:
    """Error bounds against simulated chips, on random experts."""
    _run(["bounds"], output, quick=quick, seed=seed)


@app.command()
def reference(quick: QUICK = False, seed: SEED = 0, output: OUTPUT = None) -> None:
    """The same bounds on the embedded model's experts and inputs, layer by layer."""
    _run(["reference"], output, quick=quick, seed=seed)


@app.command(name="all", epilog="Example: python -m theory all -o build/theory")
def everything(
    quick: QUICK = False, seeds: SEEDS = None, seed: SEED = 0, digital: DIGITAL = None, output: OUTPUT = None
) -> None:
    """All of these."""
    names = ["claims", "settings", "bounds", "reference"]
    _run(names, output, quick=quick, seeds=seeds, seed=seed, digital=digital)


def main() -> None:
    """Entry point; what the user got wrong is one line, and without a command there is help."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except InputError as error:
        print(f"theory: {error}", file=sys.stderr)
        sys.exit(2)
    except USAGE_ERRORS as error:
        print(f"theory: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"theory: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("theory: interrupted; with -o, parts that were done are written", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # XLA's threads may be in the middle of a program, and crash when the process is taken down around them.
        os._exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
