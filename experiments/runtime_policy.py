"""What a policy that watches its chips makes of three days of drift, a noise step and a changing energy budget.

    python experiments/runtime_policy.py --seeds 4 --tokens 4096   # docs/experiments/runtime_policy.json, .png

Chips are probed every three hours. From hour 24 to 42 every deviation from the target weights is 1.8 times as large, as
if it were warmer. The energy budget lies `budget` of the way from all experts analog to all digital: 25 %, then 10 %
from hour 36 on, 50 % from 54 and 25 % from 63. Compared, on the same chips of the same seeds:

- *adaptive*: `hetmoe.runtime.policy`, which sees eight probes of every expert, the clock and the budget; and the same
  without reprogramming.
- *static*: the best plan in hindsight, for each seed, of those that keep the smallest budget (by expected noise loss,
  max_neuron_norm, expected drift loss, and four random ones), with and without compensation. Compensation is exact here
  and costs nothing, which the policy's is not. *static, mean budget*: the same with the mean of the budgets, which
  breaks the smallest.
- *oracle*: at every time all chips just programmed, exactly compensated, and the plan of least expected loss within the
  budget; all for free. It is not a bound for one chip: a lucky draw may do better.

Energies are those of the A100-80GB, the 3D-CiM chip and PCIe 4 x16 as hetmoe describes them. The device's noise is
scaled by 2.5 since the reference model hardly feels it otherwise. Cost: half an hour on two CPU cores.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import typer

from common import Options, Setup, as_record, digits, make_table, prepare, run
from hetmoe.evaluate.statistics import mean_interval
from hetmoe.hardware.description import KINDS, Kind, open_description
from hetmoe.hardware.routing_file import observe_routing
from hetmoe.placement.scores import random_scores
from hetmoe.runtime.knowledge import Costs, make_knowledge
from hetmoe.runtime.policy import Knowledge, best_within
from hetmoe.runtime.scenario import Moment, Scenario, Simulator

HOURS, EVERY = 72, 3
HOT, HOTTER = (24, 42), 1.8
SHARES = ((0, 0.25), (36, 0.10), (54, 0.50), (63, 0.25))  # from this hour on: of the way from analog to digital
TOKENS_PER_S = 2000.0
NEVER = 1e9  # a growth of noise that is never reached
DESCRIBED: dict[Kind, str] = {"digital": "a100-80gb", "analog": "ibm-3d-cim", "link": "pcie4-x16"}
COLOURS = {
    "oracle": "#595959", "adaptive": "#0072B2", "adaptive, never reprogrammed": "#56B4E9",
    "static, compensated": "#D55E00", "static, uncompensated": "#CC79A7", "static, mean budget": "#E69F00",
}  # fmt: skip
Runs = dict[str, list[list[Moment]]]  # by policy: for each seed, over time


def three_days(knowledge: Knowledge) -> Scenario:
    hours = list(range(0, HOURS, EVERY))
    base, extra = _ends(knowledge)
    shares = [[share for start, share in SHARES if start <= hour][-1] for hour in hours]
    return Scenario(
        times_s=tuple(3600.0 * hour for hour in hours),
        noise=tuple(HOTTER if HOT[0] <= hour < HOT[1] else 1.0 for hour in hours),
        budget=tuple(base + share * extra for share in shares),
        tokens=(TOKENS_PER_S * 3600 * EVERY,) * len(hours),
    )


def _ends(knowledge: Knowledge) -> tuple[float, float]:
    """(J per token with all experts analog, J more with all digital)."""
    base = float(jnp.sum(knowledge.analog_energy))
    return base, float(jnp.sum(knowledge.digital_energy)) - base


def static_plans(setup: Setup, knowledge: Knowledge, budget: float) -> dict[str, np.ndarray]:
    """True = analog; by what chose the digital experts."""
    scores = {
        "noise loss": knowledge.noise_loss,
        "drift loss": knowledge.scale_loss,
        "max_neuron_norm": setup.scorer().scores("max_neuron_norm", setup.spec(1.0)),
    }
    for number in range(4):
        scores[f"random {number}"] = random_scores(jax.random.fold_in(setup.score_key, number), setup.config)
    room = jnp.float32(budget - _ends(knowledge)[0])
    extra = knowledge.digital_energy - knowledge.analog_energy
    return {name: ~np.asarray(best_within(jnp.asarray(values), extra, room)) for name, values in scores.items()}


def run_all(setup: Setup, simulator: Simulator, scenario: Scenario) -> tuple[Runs, list[dict[str, Any]]]:
    know, runs = simulator.knowledge, {name: list[list[Moment]]() for name in COLOURS}
    smallest = static_plans(setup, know, min(scenario.budget))
    mean = static_plans(setup, know, float(np.average(scenario.budget, weights=scenario.tokens)))
    still = Simulator(
        setup.model, dataclasses.replace(know, stale=jnp.float32(NEVER)), simulator.spec, setup.calibration,
        setup.text.batches, probes=simulator.probes,
    )  # fmt: skip
    chosen: list[dict[str, Any]] = []
    for number, key in enumerate(setup.keys):
        setup.console.print(f"seed {number + 1} of {len(setup.keys)}")
        runs["oracle"].append(simulator.oracle(key, scenario))
        runs["adaptive"].append(simulator.adaptive(key, scenario))
        runs["adaptive, never reprogrammed"].append(still.adaptive(key, scenario))
        best: dict[str, Any] = {}
        for name, plans, compensated in (
            ("static, compensated", smallest, True),
            ("static, uncompensated", smallest, False),
            ("static, mean budget", mean, True),
        ):
            found = simulator.fixed(key, scenario, list(plans.values()), compensated=compensated)
            means = [mean_loss(moments, scenario) - setup.digital_loss for moments in found]
            runs[name].append(found[int(np.argmin(means))])
            best[name] = {
                "chosen": list(plans)[int(np.argmin(means))],
                "increase": dict(zip(plans, digits(means), strict=True)),
            }
        chosen.append(best)
    return runs, chosen


def mean_loss(moments: list[Moment], scenario: Scenario) -> float:
    """Nats per token over all tokens served."""
    return float(np.average([moment.loss for moment in moments], weights=scenario.tokens))


def summary(setup: Setup, runs: Runs, scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Loss increase, regret, energy and actions of each policy; intervals over seeds, paired for regrets."""
    tokens = np.array(scenario.tokens)
    losses = {name: np.array([mean_loss(m, scenario) for m in seeds]) for name, seeds in runs.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, seeds in runs.items():
        spent = np.array([[m.running + m.actions / t for m, t in zip(s, tokens, strict=True)] for s in seeds])
        over = spent > np.array(scenario.budget) * (1 + 1e-6)
        actions = np.array([[m.actions for m in s] for s in seeds]).sum(1)
        found[name] = {
            "increase": as_record(mean_interval(losses[name] - setup.digital_loss)),
            "regret_to_oracle": as_record(mean_interval(losses[name] - losses["oracle"])),
            "gain_on_static": as_record(mean_interval(losses["static, compensated"] - losses[name])),
            "joules_per_token": float(np.mean(np.average(spent, axis=1, weights=tokens))),
            "action_joules": float(np.mean(actions)),
            "share_of_times_over_budget": float(over.mean()),
            "moved": float(np.mean([sum(m.moved for m in s) for s in seeds])),
            "reprogrammed": float(np.mean([sum(m.reprogrammed for m in s) for s in seeds])),
        }
    return found


def resident(simulator: Simulator) -> dict[str, float]:
    """Memory of both copies of all experts: on hardware as described, and in this simulation."""
    know, params = simulator.knowledge, simulator.model.params
    experts = know.noise_loss.size
    weights = sum(leaf.size for leaf in jax.tree.leaves(params.layers.moe) if leaf.ndim == 4)
    return {
        "experts": experts, "weights": weights, "digital_bytes_at_16_bit": 2 * weights,
        "analog_devices_pairs": weights, "simulated_bytes_digital": 4 * weights, "simulated_bytes_analog": 4 * weights,
    }  # fmt: skip


def draw(setup: Setup, runs: Runs, scenario: Scenario) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(10, 9.5), layout="constrained")
    loss, energy, actions = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    hours = np.array(scenario.times_s) / 3600
    for name, seeds in runs.items():
        values = np.array([[m.loss for m in s] for s in seeds]) - setup.digital_loss
        look = {"color": COLOURS[name], "ls": "--" if name == "oracle" else "-", "marker": ".", "lw": 1.4}
        loss.plot(hours, values.mean(0), label=name, **look)
        loss.fill_between(hours, values.min(0), values.max(0), color=COLOURS[name], alpha=0.12, lw=0)
        if name in ("static, uncompensated", "adaptive, never reprogrammed"):
            continue
        spent = np.array([[m.running + m.actions / t for m, t in zip(s, scenario.tokens, strict=True)] for s in seeds])
        energy.step(hours, spent.mean(0) * 1e6, where="post", color=COLOURS[name], lw=1.4)
    energy.step(hours, np.array(scenario.budget) * 1e6, where="post", color="black", lw=1, ls=":", label="budget")
    adaptive = runs["adaptive"]
    for field, colour in (("digital", "#0072B2"), ("moved", "#009E73"), ("reprogrammed", "#D55E00")):
        counts = np.mean([[getattr(m, field) for m in s] for s in adaptive], axis=0)
        actions.step(hours, counts, where="post", color=colour, label=f"experts {field}")
    for axes in (loss, energy, actions):
        axes.axvspan(*HOT, color="#D55E00", alpha=0.07, lw=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, ncols=3)
    loss.set(yscale="log", ylabel="loss increase (nats per token)")
    energy.set(ylabel="experts' energy (µJ per token)")
    actions.set(xlabel="hours since programming; shaded: noise 1.8 times as large", ylabel="adaptive: experts")
    figure.suptitle(f"{setup.model.name}: policies over three days, mean and range of {len(setup.keys)} seeds")
    return figure


def main(
    options: Options,
    noise_scale: Annotated[float, typer.Option(help="Noise scale c.")] = 2.5,
    probes: Annotated[int, typer.Option(help="Vectors per expert and probing.")] = 8,
) -> None:
    """Simulate and print."""
    setup = prepare("runtime_policy", options)
    spec = dataclasses.replace(setup.spec(noise_scale), time_s=1.0)
    sample = setup.text.sample.tokens
    knowledge = make_knowledge(
        setup.model, sample, spec, observe_routing(setup.model, sample[:, :-1]).frequency,
        **{kind: open_description(DESCRIBED[kind], kind) for kind in KINDS},
        costs=Costs(probes=probes), key=setup.score_key,
    )  # fmt: skip
    scenario = three_days(knowledge)
    simulator = Simulator(setup.model, knowledge, spec, setup.calibration, setup.text.batches, probes=probes)
    runs, chosen = run_all(setup, simulator, scenario)
    found, memory = summary(setup, runs, scenario), resident(simulator)

    table = make_table(f"means over {HOURS} hours and {len(setup.keys)} seeds; digital loss {setup.digital_loss:.4f}",
                       "policy", ["increase", "regret to oracle", "gain on static", "µJ/token", "actions J",
                                  "times over budget", "moves", "reprogrammed"])  # fmt: skip
    for name, row in found.items():
        intervals = [row[field] for field in ("increase", "regret_to_oracle", "gain_on_static")]
        table.add_row(
            name, *(f"{i['mean']:.4f} ± {i['high'] - i['mean']:.4f}" for i in intervals),
            f"{row['joules_per_token'] * 1e6:.2f}", f"{row['action_joules']:.2f}",
            f"{row['share_of_times_over_budget']:.0%}", f"{row['moved']:.0f}", f"{row['reprogrammed']:.0f}",
        )  # fmt: skip
    setup.console.print(table)
    setup.console.print(
        f"Both copies of {memory['experts']} experts are resident: {memory['digital_bytes_at_16_bit'] / 2**20:.1f} MiB "
        f"of digital memory at 16 bit, and {memory['weights']:,} pairs of devices"
    )
    results = {
        "scenario": dataclasses.asdict(scenario), "described": DESCRIBED, "probes": probes, "memory": memory,
        "knowledge": {name: digits(getattr(knowledge, name)) for name in ("ages", "growth", "joules_per_nat")},
        "policies": found, "best_static": chosen,
        "moments": {name: [[digits(list(m)) for m in s] for s in seeds] for name, seeds in runs.items()},
        "moment_fields": list(Moment._fields),
    }  # fmt: skip
    setup.save(results, draw(setup, runs, scenario), spec)


if __name__ == "__main__":
    run(main)
