"""Perplexity against K and lambda without programming noise: where the defaults of `hetmoe eval` come from.

    python experiments/converter_ranges.py

K scales the DAC range (K * EMA(std) of a row-block's inputs), lambda the ADC bound (range * lambda * max|w|). Both
small clips, both large wastes levels; 8-bit converters, 512-row tiles. Measured on the 16 windows that `hetmoe eval`
sets aside for calibration, never on the evaluated ones. Cost: about one minute on two CPU cores; one compile for the
whole grid.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import hetmoe
from hetmoe.commands.common import make_console
from hetmoe.evaluate.prepare import WINDOWS_TO_CALIBRATE
from hetmoe.evaluate.run import evaluate_digital, evaluate_seeds, make_batches
from hetmoe.evaluate.text import heldout_files, load_windows, split_windows
from hetmoe.placement.plan import stack_plans

K = (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
LAMBDA = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def main() -> None:
    """Print one table per placement."""
    model = hetmoe.load_model("reference", "float32")
    sources = load_windows(model, heldout_files(), 256)
    _, windows = split_windows(sources, 64, WINDOWS_TO_CALIBRATE)
    batches = make_batches(windows, windows.tokens[:, 1:, None], np.zeros(windows.whole_word.shape, bool), 16)
    key = jax.random.split(jax.random.key(0), 1)
    base = hetmoe.calibrate(model.params, jnp.asarray(windows.tokens[:, :-1]), model.config, hetmoe.RangeMethod(k=1.0))
    digital = np.exp(float(evaluate_digital(model.params, batches, model.config).nll) / windows.byte_count.size)
    console = make_console()
    plans = {"experts analog": hetmoe.experts_analog(model.config), "all analog": hetmoe.all_analog(model.config)}
    for name, plan in plans.items():
        stacked = stack_plans([stack_plans([plan])])
        table = Table(title=f"{name}: perplexity (all digital {digital:.2f})", title_justify="left")
        table.add_column("K", justify="right")
        for bound in LAMBDA:
            table.add_column(f"lambda {bound:g}", justify="right", no_wrap=True)
        for k in K:
            ranges = dataclasses.replace(
                base, layers=jax.tree.map(lambda r, k=k: k * r, base.layers), lm_head=k * base.lm_head
            )
            row = []
            for bound in LAMBDA:
                spec = hetmoe.analog_spec("pcm", noise_scale=0.0, adc_bound=bound)
                totals = evaluate_seeds(model.params, key, stacked, spec, ranges, batches, model.config)
                row.append(f"{float(jnp.exp(totals.nll[0, 0] / windows.byte_count.size)):.2f}")
            table.add_row(f"{k:g}", *row)
        console.print(table)


if __name__ == "__main__":
    main()
