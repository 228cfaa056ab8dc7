"""Perplexity against K and lambda without programming noise: where the defaults of `hetmoe eval` come from.

    python experiments/converter_ranges.py

K scales the DAC range (K * EMA(std) of a row-block's inputs), lambda the ADC bound (range * lambda * max|w|). Both
small clips, both large wastes levels; 8-bit converters, 512-row tiles. Measured on the 16 windows that `hetmoe eval`
sets aside for calibration, never on the evaluated ones. Cost: about one minute on two CPU cores; one compile for the
whole grid.
"""

import jax.numpy as jnp
import numpy as np
from rich.table import Table

import hetmoe
from hetmoe.commands.common import make_console
from hetmoe.evaluate.calibrate import collect_statistics
from hetmoe.evaluate.converter_search import search_by_loss
from hetmoe.evaluate.prepare import WINDOWS_TO_CALIBRATE
from hetmoe.evaluate.text import heldout_files, load_windows, split_windows

K = (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
LAMBDA = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def main() -> None:
    """Print one table per placement."""
    model = hetmoe.load_model("reference", "float32")
    _, aside = split_windows(load_windows(model, heldout_files(), 256), 64, WINDOWS_TO_CALIBRATE)
    windows = jnp.asarray(aside.tokens)
    statistics = collect_statistics(model.params, windows[:, :-1], model.config)
    methods = [hetmoe.RangeMethod(k=k) for k in K]
    console = make_console()
    plans = {"experts analog": hetmoe.experts_analog(model.config), "all analog": hetmoe.all_analog(model.config)}
    for name, plan in plans.items():
        search = search_by_loss(model, statistics, windows, hetmoe.analog_spec("pcm"), plan, methods, LAMBDA)
        table = Table(title=f"{name}: perplexity without programming noise", title_justify="left")
        table.add_column("K", justify="right")
        for bound in LAMBDA:
            table.add_column(f"lambda {bound:g}", justify="right", no_wrap=True)
        for k, row in zip(K, np.exp(search.cost), strict=True):
            table.add_row(f"{k:g}", *(f"{value:.2f}" for value in row))
        console.print(table)


if __name__ == "__main__":
    main()
