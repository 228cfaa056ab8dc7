"""`hetmoe info --mesh`: what an evaluation would take of each device of a mesh, without weights or devices."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from hetmoe.analog.spec import analog_spec
from hetmoe.checkpoint.load import parse_dtype
from hetmoe.commands.mesh_options import memory_table
from hetmoe.commands.tables import bytes_text
from hetmoe.errors import InputError
from hetmoe.evaluate.execution import WEIGHTS
from hetmoe.models.config import ModelConfig
from hetmoe.parallel.analysis import Analysis, analyze, tokens_per_device
from hetmoe.parallel.memory import Workload, bytes_per_device
from hetmoe.parallel.mesh import check_divides, describe_mesh, parse_mesh, parts_of
from hetmoe.parallel.shard import Shard
from hetmoe.parallel.topology import described_devices, memory_of

DIGITAL = "digital"
DEFAULT_SEQ = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshQuestion:
    """The options of `hetmoe info` that speak of a mesh, named as there."""

    mesh: str
    analyze: bool
    topology: str | None  # to compile for; None = simulated devices
    batch: int | None  # None = a window for each part of data and expert
    seq: int | None  # None = 1024, or the model's context
    weights: str  # of `WEIGHTS`, or "digital"
    dtype: str | None

    def shard(self) -> Shard:
        """The mesh.

        Raises:
            InputError: for options that contradict each other or are out of range.
        """
        if self.mesh == "auto":
            raise InputError("--mesh auto needs devices: name the axes, as in --mesh data=2,expert=4")
        if self.topology is not None and not self.analyze:
            raise InputError("--topology says what --analyze compiles for: give both or neither")
        if self.weights not in (*WEIGHTS, DIGITAL):
            raise InputError(f"--weights {self.weights!r} is unknown: use {', '.join((*WEIGHTS, DIGITAL))}")
        for name in ("seq", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        return parse_mesh(self.mesh)

    def workload(self, shard: Shard, config: ModelConfig) -> Workload:
        """What would run: in bfloat16, unless told otherwise.

        Raises:
            InputError: for windows longer than the model's context.
        """
        most = config.max_position_embeddings
        if self.seq is not None and self.seq > most:
            raise InputError(f"--seq {self.seq} exceeds the model's context of {most}")
        return Workload(
            batch=shard.data * shard.expert if self.batch is None else self.batch,
            seq=min(DEFAULT_SEQ, most) if self.seq is None else self.seq, seeds=shard.seed,
            dtype=parse_dtype(self.dtype or "bfloat16"), weights=None if self.weights == DIGITAL else self.weights,
            dense=True, calibrated=False,
        )  # fmt: skip


def devices_for(question: MeshQuestion) -> list[Any] | None:
    """What to compile for, None = nothing is compiled. To be called before JAX is used: it may have to be simulated.

    Raises:
        InputError: for a topology that cannot be compiled for, or has fewer devices than the mesh.
    """
    shard = question.shard()
    if not question.analyze:
        return None
    devices = described_devices(question.topology or f"cpu:{parts_of(shard)}")
    if len(devices) < parts_of(shard):
        raise InputError(
            f"--topology {question.topology} has {len(devices)} devices, mesh {describe_mesh(shard)} "
            f"{parts_of(shard)} parts"
        )
    return devices


def workload_of(question: MeshQuestion, config: ModelConfig) -> Workload:
    """What would run, if the mesh divides it.

    Raises:
        InputError: if it does not, or for windows longer than the model's context.
    """
    shard = question.shard()
    run = question.workload(shard, config)
    check_divides(shard, config, batch=run.batch)
    return run


def answer(
    question: MeshQuestion, config: ModelConfig, run: Workload, devices: list[Any] | None, console: Console
) -> dict[str, Any]:
    """Prints tables, and gives what a record says of them.

    Raises:
        InputError: for a program that does not fit.
    """
    shard = question.shard()
    estimate = bytes_per_device(config, shard, run)
    kind = None if devices is None or question.topology is None else devices[0].device_kind
    console.print(memory_table(shard, estimate, None if kind is None else memory_of(kind)))
    record: dict[str, Any] = {
        "axes": dataclasses.asdict(shard), "batch": run.batch, "seq": run.seq, "weights": question.weights,
        "dtype": jnp.dtype(run.dtype).name, "bytes_per_device": estimate,
    }  # fmt: skip
    if devices is not None:
        spec = None if run.weights is None else analog_spec()
        found = analyze(config, shard, run, devices, spec)
        console.print(_analysis_table(found, kind or "simulated CPU", tokens_per_device(shard, run)))
        for loop in found.costs.unknown_loops:
            console.print(
                f"counted once, though it may run more often under uneven load: a round of the experts' exchange, "
                f"{loop.flops / 1e9:,.1f} GFLOP and {bytes_text(loop.sent_bytes)}"
            )
        for target, times in found.costs.opaque_calls.items():
            console.print(f"not counted: the FLOPs of {target}, which runs {times:,} times", markup=False)
        record |= {"compiled_for": question.topology or "cpu", "compiled": analysis_record(found)}
    return record


def analysis_record(found: Analysis) -> dict[str, Any]:
    """Plain values."""
    return {
        "argument_bytes": found.arguments,
        "result_bytes": found.results,
        "temporary_bytes": found.temporaries,
        "flops": found.costs.flops,
        "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in found.costs.collectives.items()},
        "sent_bytes": found.costs.sent_bytes,
        "unknown_loops": [dataclasses.asdict(loop) for loop in found.costs.unknown_loops],
        "uncounted_calls": dict(found.costs.opaque_calls),
    }


def _analysis_table(found: Analysis, kind: str, tokens: int) -> Table:
    table = Table(title=f"Compiled for {kind}: one batch, {tokens:,} tokens on each device", title_justify="left")
    table.add_column("per device")
    table.add_column("amount", justify="right")
    for name, value in (
        ("weights and inputs", found.arguments), ("temporaries", found.temporaries), ("results", found.results),
        ("memory in all", found.memory),
    ):  # fmt: skip
        table.add_row(name, bytes_text(value))
    table.add_row("FLOPs of products, at most", f"{found.costs.flops / 1e9:,.1f} GFLOP")
    for name, traffic in sorted(found.costs.collectives.items()):
        table.add_row(f"sent by {traffic.count:,} {name}", bytes_text(traffic.sent_bytes))
    table.add_row("sent in all", bytes_text(found.costs.sent_bytes))
    return table
