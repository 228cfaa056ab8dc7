"""How much memory a run takes on each device of a mesh, before anything is loaded; and which mesh fits.

Weights are counted exactly. Activations are an estimate: the largest buffers that live at once in a layer, as XLA lays
them out on a CPU or GPU (`experiments/sharded_costs.py` compares it with compiled programs).
"""

import dataclasses
import itertools
import math
import os
from typing import Any

import jax
import numpy as np

from hetmoe.analog.programming import DRAWN_AT_ONCE
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import CALIBRATED_AT_ONCE
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.attention import LONG, QUERY_CHUNK
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import CHUNK
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.parallel.exchange import capacity
from hetmoe.parallel.mesh import check_divides, describe_mesh
from hetmoe.parallel.rules import leaf_spec
from hetmoe.parallel.shard import Shard
from hetmoe.parallel.topology import memory_of

GIB = 2**30
HEADROOM = 0.9  # of a device's memory: the rest is for what the estimate leaves out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What runs, as far as memory depends on it.

    Attributes:
        batch: windows run at once, on all devices together.
        seq: tokens of a window.
        seeds: noise seeds.
        dtype: of weights and activations.
        weights: when crossbars are programmed (`hetmoe.evaluate.execution.WEIGHTS`), None = nothing is analog.
        dense: whether modules outside the experts may be on crossbars.
        calibrated: whether DAC ranges are calibrated before.
    """

    batch: int
    seq: int
    seeds: int
    dtype: Any
    weights: str | None
    dense: bool
    calibrated: bool = False


def bytes_per_device(config: ModelConfig, shard: Shard, run: Workload) -> dict[str, int]:
    """Bytes on one device, by what they are for."""
    tree, size = abstract_params(config), np.dtype(run.dtype).itemsize

    def held(leaf: Any) -> int:
        """Weights of a leaf on one device."""
        return math.prod(leaf.shape) // math.prod(getattr(shard, axis) for axis in leaf_spec(leaf) if axis is not None)

    parameters = sum(
        held(leaf) * np.dtype(leaf.dtype(run.dtype)).itemsize for leaf in jax.tree.leaves(tree, is_leaf=is_leaf)
    )
    layers = [layer for layer in (tree.layers, tree.dense_layers) if layer is not None]
    stacks = [crossbar_matrices(layer, dense=run.dense) for layer in layers]
    matrices = [(held(leaf), leaf.shape[0]) for stack in stacks for leaf in stack.values()]
    head = config.hidden_size * config.vocab_size // shard.tensor
    programmed = in_force = drawn = 0
    if run.weights is not None and matrices:
        if run.weights == "stored":
            programmed = (sum(count for count, _ in matrices) + run.dense * head) * size
        elif run.weights == "layer":
            programmed = max(sum(held(leaf) // leaf.shape[0] for leaf in stack.values()) for stack in stacks) * size
        # Clean or programmed, chosen expert by expert: a copy of the largest matrix of a layer.
        in_force = max(*(count // depth for count, depth in matrices), run.dense * head) * size
        # Draws, deviations and results in float32, of the LM head or of a few experts at a time.
        drawn = 16 * max(run.dense * head, min(DRAWN_AT_ONCE, max(count // depth for count, depth in matrices)))
    return {
        "parameters": parameters,
        "programmed weights": programmed,
        "weights in force": in_force,
        "noise while it is drawn": drawn,
        "activations": _activations(config, shard, run),
    }


def _activations(config: ModelConfig, shard: Shard, run: Workload) -> int:
    """The larger of a layer's attention, its experts and the LM head, beside the residual stream.

    Calibration looks at fewer windows, but exchanges all of their token copies at once.
    """
    parts = shard.data * shard.expert
    found = _of_windows(config, shard, run, -(-run.batch // parts), one_round=False)
    if run.calibrated:
        found = max(found, _of_windows(config, shard, run, -(-CALIBRATED_AT_ONCE // parts), one_round=True))
    return found


def _of_windows(config: ModelConfig, shard: Shard, run: Workload, windows: int, *, one_round: bool) -> int:
    size, tensor = np.dtype(run.dtype).itemsize, shard.tensor
    tokens, hidden, copies = windows * run.seq, config.hidden_size, config.experts_per_token
    stream = 4 * tokens * hidden * size + tokens * hidden * 4  # residual, normed, sum, gathered; float32 of the norm
    heads = config.num_heads // tensor
    queries = run.seq if run.seq <= LONG else QUERY_CHUNK
    scores = 2 * windows * heads * queries * run.seq * 4
    projections = 4 * tokens * config.num_heads * config.head_dim * size // tensor + tokens * hidden * 4
    rows = tokens * copies
    if shard.expert > 1:
        rows = shard.expert * capacity(tokens, copies, config.num_experts // shard.expert, shard)[one_round]
    inner = max(config.expert_intermediate_size, config.shared_intermediate_size or 0)
    width = 2 * inner // tensor * 4 + inner * (size + 4)  # gate and up in float32, and what goes into down
    blocks = rows * (2 * hidden * size + width + 2 * hidden // tensor * 4)
    results = 2 * tokens * copies * hidden // tensor * 4
    routing = (
        len(config.moe_layers) * tokens * (config.num_experts + 2 * copies) * 4 + 4 * tokens * config.num_experts * 4
    )
    logits = 3 * min(CHUNK, tokens) * config.vocab_size // tensor * 4
    return stream + max(scores + projections, blocks + results, logits) + routing


def check_fits(config: ModelConfig, shard: Shard, run: Workload, available: int | None) -> dict[str, int]:
    """`bytes_per_device`, if they fit.

    Args:
        config: of the model.
        shard: the mesh.
        run: what runs.
        available: bytes of one device; None = unknown, everything fits.

    Raises:
        InputError: with the numbers, and a mesh that would fit, if one of up to 4096 devices does.
    """
    found = bytes_per_device(config, shard, run)
    total = sum(found.values())
    if available is None or total <= HEADROOM * available:
        return found
    for devices in (2**power for power in range(13)):
        try:
            fits = choose_mesh(config, devices, run, available)
        except InputError:
            continue
        hint = f"--mesh {describe_mesh(fits)} ({devices} devices) would"
        break
    else:
        hint = (
            "no mesh of up to 4096 such devices would; try another --batch (data x expert must divide it), a smaller "
            "--seq or dtype, or --weights layer"
        )
    largest = max(found, key=lambda name: found[name])
    raise InputError(
        f"mesh {describe_mesh(shard)} does not fit: a device needs {total / GIB:.2f} GiB ({largest}: "
        f"{found[largest] / GIB:.2f} GiB), {HEADROOM:.0%} of its {available / GIB:.2f} GiB are "
        f"{HEADROOM * available / GIB:.2f} GiB; {hint}"
    )


def choose_mesh(config: ModelConfig, devices: int, run: Workload, available: int | None) -> Shard:
    """The mesh of `devices` parts that fits and communicates least.

    Seeds are spread first, which takes no communication, then windows; experts only as far as memory asks for, and
    columns, which are gathered after every product, last.

    Raises:
        InputError: with the numbers of the smallest, if none fits or divides the model.
    """
    fitting: list[tuple[tuple[int, ...], Shard]] = []
    smallest: tuple[int, Shard] | None = None
    for sizes in itertools.product(_divisors(devices), repeat=3):
        expert, tensor, seed = sizes
        if devices % (expert * tensor * seed):
            continue
        shard = Shard(data=devices // (expert * tensor * seed), seed=seed, expert=expert, tensor=tensor)
        try:
            check_divides(shard, config, batch=run.batch, seeds=run.seeds if run.weights is not None else 1)
        except InputError:
            continue
        total = sum(bytes_per_device(config, shard, run).values())
        if smallest is None or total < smallest[0]:
            smallest = (total, shard)
        if available is None or total <= HEADROOM * available:
            fitting.append(((tensor, expert, -seed), shard))
    if fitting:
        return min(fitting, key=lambda item: item[0])[1]
    if smallest is None:
        raise InputError(
            f"no mesh of {devices} devices divides {config.num_experts} experts, {config.num_heads} heads, batches of "
            f"{run.batch} windows and {run.seeds} seeds: choose a --batch that {devices} divides"
        )
    assert available is not None
    raise InputError(
        f"no mesh of {devices} devices fits: {describe_mesh(smallest[1])}, the smallest, needs "
        f"{smallest[0] / GIB:.2f} GiB on each, {HEADROOM:.0%} of its {available / GIB:.2f} GiB are "
        f"{HEADROOM * available / GIB:.2f} GiB"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def memory_of_device(device: Any) -> int | None:
    """Bytes that a program may use on a device: as its driver says, or of its kind, or its share of the host's memory.

    None if nobody knows.
    """
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return memory_of(device.device_kind)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
