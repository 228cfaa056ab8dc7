"""`hetmoe sweep --part I/N` and `--ray N`: a sweep on several machines that share its directory."""

from hetmoe.commands.sweep_job import SweepJob, evaluate, goes_on, print_collection, print_summary
from hetmoe.errors import InputError
from hetmoe.sweep.collect import collect
from hetmoe.sweep.lock import part_lock
from hetmoe.sweep.part_store import open_part
from hetmoe.sweep.parts import Part, part_directory
from hetmoe.sweep.points import point_id
from hetmoe.sweep.ray_parts import find_ray, run_parts
from hetmoe.sweep.setup import load_for_sweep, model_identity
from hetmoe.sweep.survey import make_survey


def run_part(job: SweepJob, part: Part) -> None:
    """Evaluates what is left of a part, as far as no store in the directory has it."""
    folder = part_directory(job.directory, part)
    make_survey(job.directory).check(job.identity, extend=job.extend)  # before anything is made
    with part_lock(folder), goes_on(job):
        survey = make_survey(job.directory)
        survey.check(job.identity, extend=job.extend)
        groups = survey.share(part, job.groups, retry_failed=job.retry_failed)
        done = survey.of_part(part, retry_failed=job.retry_failed)
        if all(point_id(point) in done for group in groups for point in group):
            job.console.print(f"part {part}: nothing is left to evaluate")
            return
        model = load_for_sweep(job.config, job.mesh())
        identity = job.identity | {"model": model_identity(model)}
        survey.check(identity, extend=job.extend)
        total = len(job.points)
        evaluate(
            job, model, lambda: open_part(folder, identity, groups, total=total, extend=job.extend),
            f"{model.name}, part {part}",
        )  # fmt: skip
    job.console.print(f"part {part} is finished: {folder}; hetmoe sweep with --collect gathers all parts")


def run_with_ray(job: SweepJob, count: int, address: str | None) -> None:
    """Runs all parts as tasks of Ray, and collects what they finished, whether or not all did.

    Raises:
        InputError: if Ray is not installed or not reached, or a part failed.
    """
    ray = find_ray()
    parts = [Part(index=index, of=count) for index in range(count)]
    options = [*(["--extend"] if job.extend else []), *(["--retry-failed"] if job.retry_failed else [])]
    arguments = ["sweep", str(job.config.source.absolute()), "-o", str(job.directory.absolute()), *options]
    with goes_on(job):
        failures = run_parts(ray, parts, arguments, address, lambda line: job.console.print(line, markup=False))
    collection = collect(job.directory, job.identity, job.points, extend=job.extend)
    print_collection(job, collection)
    if collection.parts:
        print_summary(job)
    if failures:
        shown = "; ".join(f"part {part}: {line}" for part, line in list(failures.items())[:3])
        more = f"; {len(failures) - 3} more" if len(failures) > 3 else ""
        raise InputError(f"{len(failures)} of {count} parts failed ({shown}{more}); the same command goes on")
