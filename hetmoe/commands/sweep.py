"""`hetmoe sweep`: from a CONFIG to a store of results, and a summary."""

import contextlib
import dataclasses
import os
from collections.abc import Generator
from pathlib import Path

from hetmoe.commands.mesh_options import MeshOptions, console_of_main
from hetmoe.commands.sweep_job import SweepJob, evaluate, goes_on, print_collection, print_summary
from hetmoe.commands.sweep_parts import run_part, run_with_ray
from hetmoe.errors import InputError
from hetmoe.parallel import hosts
from hetmoe.sweep.collect import collect
from hetmoe.sweep.config import read_config
from hetmoe.sweep.ledger import Ledger, open_ledger
from hetmoe.sweep.parts import PARTS, check_count, parse_part, part_directory
from hetmoe.sweep.points import expand, group_points
from hetmoe.sweep.setup import early_identity, load_for_sweep, model_identity
from hetmoe.sweep.shared_ledger import SharedLedger
from hetmoe.sweep.survey import Survey, make_survey


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The options of `hetmoe sweep`, named as there."""

    config_file: Path
    output: Path | None
    extend: bool
    retry_failed: bool
    status: bool
    part: str | None
    collect: bool
    ray: int | None
    ray_address: str | None
    devices: MeshOptions

    def check(self) -> None:
        """Raises InputError for options that exclude each other."""
        given = [
            name
            for name, there in (
                ("--status", self.status), ("--part", self.part is not None), ("--collect", self.collect),
                ("--ray", self.ray is not None),
            )
            if there
        ]  # fmt: skip
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} exclude each other: give one of them")
        if self.retry_failed and (self.status or self.collect):
            deed = "counts" if self.status else "gathers what is finished"
            raise InputError(f"{given[0]} only {deed}: leave out --retry-failed")
        if self.ray_address is not None and self.ray is None:
            raise InputError("--ray-address needs --ray N")
        self.devices.check()
        if given and self.devices.several:
            raise InputError(f"{given[0]} is for one process: leave out --coordinator and --cluster")
        if given and given[0] != "--part" and self.devices != MeshOptions():
            raise InputError(f"{given[0]} evaluates nothing here: leave out --mesh and --cpu-devices")


def run(request: SweepRequest) -> None:
    """Evaluates what is left, or a part of it, or collects what parts have finished, or only counts."""
    request.check()
    how = {"--extend": request.extend, "--retry-failed": request.retry_failed}
    with hosts.failures_of_others():
        request.devices.start({"config": str(request.config_file), "output": str(request.output)} | how)
        _run(request)


def _run(request: SweepRequest) -> None:
    part = None if request.part is None else parse_part(request.part, os.environ)
    config = read_config(request.config_file)
    directory = request.config_file.with_suffix("") if request.output is None else request.output
    points = expand(config)
    groups = group_points(points)
    for count in [part.of] if part is not None else [] if request.ray is None else [request.ray]:
        check_count(count, len(groups))
    job = SweepJob(
        config=config,
        directory=directory,
        points=points,
        groups=groups,
        identity=early_identity(config),
        extend=request.extend,
        retry_failed=request.retry_failed,
        console=console_of_main(),
        devices=request.devices,
    )
    if part is not None:
        run_part(job, part)
        return
    hosts.check_same(job.identity, "what is swept")
    if not hosts.is_main():  # process 0 alone looks at the store
        _evaluate(job)
        return
    survey = make_survey(directory)
    survey.check(job.identity, extend=job.extend)
    if request.status:
        _print_status(job, survey)
    elif request.collect:
        _collect(job, survey)
    elif request.ray is not None:
        run_with_ray(job, request.ray, request.ray_address)
    else:
        with goes_on(job):
            _evaluate(job)
        print_summary(job)


def _evaluate(job: SweepJob) -> None:
    """What parts have finished counts; all the rest is evaluated here."""
    model = load_for_sweep(job.config, job.mesh())
    identity = job.identity | {"model": model_identity(model)}
    if hosts.is_main():
        print_collection(job, collect(job.directory, identity, job.points, extend=job.extend))

    @contextlib.contextmanager
    def open_store() -> Generator[Ledger | SharedLedger]:
        if not hosts.is_main():
            yield SharedLedger(None, job.groups)
            return
        with open_ledger(job.directory, identity, job.groups, extend=job.extend) as ledger:
            yield ledger if hosts.count() == 1 else SharedLedger(ledger, job.groups)

    evaluate(job, model, open_store, model.name)


def _collect(job: SweepJob, survey: Survey) -> None:
    if not survey.parts:
        raise InputError(
            f"{job.directory / PARTS}: no part has finished anything; run hetmoe sweep with --part I/N first"
        )
    print_collection(job, collect(job.directory, job.identity, job.points, extend=job.extend))
    print_summary(job)


def _print_status(job: SweepJob, survey: Survey) -> None:
    counts = survey.count(job.points)
    failed = f"{counts.failed} failed, " if counts.failed else ""
    job.console.print(
        f"{job.directory}: {counts.finished} of {counts.points} points finished, {failed}{counts.claimed} claimed by "
        f"processes that run, {counts.open} open"
    )
    for part, store in survey.parts.items():
        folder = part_directory(job.directory, part).relative_to(job.directory)
        job.console.print(f"{folder}: {len(store.finished | store.failed)} points, the last at {store.last_utc}")
    if counts.uncollected:
        job.console.print(f"{counts.uncollected} points are in parts only: --collect gathers them")
