"""Options that say on which devices and processes a command runs, shared by the commands that can use several."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.commands.common import make_console
from hetmoe.commands.tables import bytes_text
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.parallel import hosts
from hetmoe.parallel.memory import (
    Workload,
    bytes_per_device,
    check_fits,
    choose_mesh,
    memory_of_device,
)  # fmt: skip
from hetmoe.parallel.mesh import check_divides, describe_mesh, make_mesh, parse_mesh, parts_of
from hetmoe.parallel.shard import Shard
from hetmoe.sweep.code_digest import code_record


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Mesh and processes, named as on the command line."""

    mesh: str | None = None  # None = chosen where there are several devices, "auto" = chosen in any case
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None
    cpu_devices: int | None = None  # simulated

    def check(self) -> None:
        """Raises InputError for values that need no device to be seen wrong."""
        if self.mesh not in (None, "auto"):
            parse_mesh(self.mesh)
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise InputError(f"--cpu-devices {self.cpu_devices} must be at least 1")
        self._processes()

    def start(self, arguments: dict[str, Any]) -> None:
        """Simulates devices, connects the processes and compares them. To be called before JAX is used.

        Raises:
            InputError: if processes cannot meet, or differ in versions, code or `arguments`.
        """
        if self.cpu_devices is not None:
            jax.config.update("jax_platforms", "cpu")  # also where there is an accelerator
            jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        hosts.start(self._processes())
        hosts.check_same(code_record() | arguments | {"mesh": self.mesh, "cpu_devices": self.cpu_devices})

    @property
    def several(self) -> bool:
        """Whether this is a run of several processes."""
        return self._processes().several

    def _processes(self) -> hosts.Processes:
        return hosts.Processes(
            coordinator=self.coordinator, count=self.processes, number=self.process, cluster=self.cluster
        )

    def choose(
        self, config: ModelConfig, run: Workload, console: Console, *, one: str | None
    ) -> jax.sharding.Mesh | None:
        """The mesh to run on, None for a single device, after a table of what it takes of each device's memory.

        Args:
            config: of the model.
            run: what runs.
            console: for the table.
            one: why this can run on one device only; None = it need not.

        Raises:
            InputError: for a mesh that does not divide the model or the work, does not fit, or that `one` rules out.
        """
        devices = jax.device_count()
        if self.mesh is None and one is not None and hosts.count() == 1:
            if devices > 1:
                console.print(f"{one} runs on one of the {devices} devices")
            return None
        if self.mesh is None and devices == 1:
            return None
        if one is not None:
            raise InputError(f"{one} runs on one device: leave out --mesh and what starts several processes")
        known = [bytes_ for bytes_ in hosts.everyone("memory", memory_of_device(jax.local_devices()[0])) if bytes_]
        available = min(known) if known else None
        shard = self._shard(config, run, available)
        if shard is None:
            return None
        check_divides(shard, config, batch=run.batch, seeds=run.seeds if run.weights is not None else None)
        mesh = make_mesh(shard)
        found = bytes_per_device(config, shard, run)
        console.print(memory_table(shard, found, available))
        check_fits(config, shard, run, available)
        return mesh

    def _shard(self, config: ModelConfig, run: Workload, available: int | None) -> Shard | None:
        if self.mesh not in (None, "auto"):
            return parse_mesh(self.mesh)
        if self.mesh == "auto" or hosts.count() > 1:
            return choose_mesh(config, jax.device_count(), run, available)
        for devices in range(jax.device_count(), 1, -1):  # nobody asked for all of them
            with contextlib.suppress(InputError):
                return choose_mesh(config, devices, run, available)
        return None


def console_of_main() -> Console:
    """The terminal of process 0; the others say nothing."""
    return make_console() if hosts.is_main() else Console(quiet=True)


def mesh_record(mesh: jax.sharding.Mesh | None) -> dict[str, Any] | None:
    """What a result says of its mesh."""
    if mesh is None:
        return None
    return {"axes": dict(mesh.shape), "devices": mesh.size, "processes": jax.process_count()}


def memory_table(shard: Shard, found: dict[str, int], available: int | None) -> Table:
    """Bytes of one device by what they are for, and of how many."""
    table = Table(title=f"Memory per device, {parts_of(shard)} in mesh {describe_mesh(shard)}", title_justify="left")
    table.add_column("for")
    table.add_column("bytes", justify="right")
    total = sum(found.values())
    rows = {**found, "total": total} | ({} if available is None else {"available": available})
    for name, value in rows.items():
        table.add_row(name, bytes_text(value))
    return table


def load_table(load: np.ndarray, mesh: jax.sharding.Mesh) -> Table:
    """How evenly the digital pass spread its token copies `[layers, experts]` over experts and their devices."""
    table = Table(title="Load of experts, digital: fullest over mean", title_justify="left")
    for heading in ("of", "copies on average", "mean of layers", "worst layer"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    parts = int(mesh.shape["expert"])
    for name, counts in (
        ("an expert", load),
        (f"each of {parts} devices along expert", load.reshape(len(load), parts, -1).sum(axis=2)),
    ):
        over = counts.max(axis=1) / counts.mean(axis=1)
        table.add_row(name, f"{counts.mean():,.0f}", f"{over.mean():.2f}", f"{over.max():.2f}")
    return table
