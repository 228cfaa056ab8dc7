"""`hetmoe tasks`: multiple-choice tasks by lm-eval, on the digital model and on noisy chips."""

import contextlib
import dataclasses
import hashlib
import io
import logging
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hetmoe.analog.spec import describe
from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.commands.analog_options import AnalogOptions
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.one_placement import PlacementOptions
from hetmoe.errors import InputError, Interrupted
from hetmoe.evaluate.execution import check_execution
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.evaluate.prepare import WINDOWS_TO_CALIBRATE, noise_keys
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.rules import scoring_scale
from hetmoe.evaluate.tasks.names import Metrics
from hetmoe.evaluate.tasks.run import Analog, chips_to_run, run_tasks
from hetmoe.evaluate.tasks.store import Store
from hetmoe.evaluate.tasks.summary import Line, summarise, ties_note
from hetmoe.evaluate.text import load_windows, split_windows
from hetmoe.files import check_writable
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.sweep.code_digest import code_record
from hetmoe.sweep.setup import model_identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksRequest(AnalogOptions, PlacementOptions):
    """The options of `hetmoe tasks`, named as there."""

    model: str
    tasks: list[str]
    noise_scale: float
    seeds: int
    data: Path | None
    limit: int | None
    num_fewshot: int | None
    text: Path | None
    seq: int
    batch_tokens: int
    implementation: str
    dtype: str
    output: Path
    json_file: Path | None

    def check(self) -> None:
        """Raises InputError for values that need neither model nor data to be seen wrong."""
        at_least = {"seeds": 1, "seq": 1, "batch_tokens": 1, "limit": 1, "seed": 0, "num_fewshot": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        self.check_placement()
        if len(set(self.tasks)) != len(self.tasks):
            raise InputError("--task may name a task only once")
        self.check_hardware([self.noise_scale])
        check_execution("--", "stored", self.implementation, read_noise=self.read_noise != 0)
        parse_dtype(self.dtype)
        if self.data is not None and not self.data.is_dir():
            raise InputError(f"--data {self.data}: no such directory")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output}: is not a directory; choose another output folder")
        check_writable(self.output / "settings.json")
        if self.json_file is not None:
            check_writable(self.json_file)


def run(request: TasksRequest) -> None:
    """Evaluates and reports."""
    if find_spec("lm_eval") is None:
        raise InputError("hetmoe tasks needs lm-eval: pip install 'hetmoe[eval]'")
    request.check()
    console = make_console()
    model = load_model(request.model, request.dtype)
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    files = choose_text(request.text)
    sample = split_windows(load_windows(model, files, request.seq), WINDOWS_TO_CALIBRATE, 0)[0]
    calibration = request.calibration(model, sample)
    scored = request.spec(scoring_scale([request.noise_scale]))
    placement = request.chosen_placement(model, sample, calibration, scored, request.seeds)
    for plan in placement.plans:
        check_quantized(model.params, plan)
    store = Store(
        folder=request.output,
        settings=_settings(request, model, placement, files),
        provenance=provenance() | {"lm_eval": metadata.version("lm_eval")},
    )
    store.open()
    tasks = _load_tasks(request, model, console)
    analog = Analog(
        spec=request.spec(request.noise_scale),
        calibration=calibration,
        placement=placement,
        keys=noise_keys(request.seed, request.seeds),
    )
    chips = chips_to_run(analog)
    console.print(
        f"[bold]{model.name}[/bold]: {placement.name}, device {request.device}, c = {request.noise_scale:g}, "
        f"{chips} noise seeds, {sum(len(t.requests) for t in tasks):,} answers to score, {jax.devices()[0].device_kind}"
    )
    try:
        results = _run_with_progress(request, model, tasks, analog, store, console)
    except KeyboardInterrupt:
        raise Interrupted(f"results so far are in {request.output}; the same command goes on from there") from None
    lines, averages = summarise(results)
    console.print(_table(lines, averages, f"{placement.name}, c = {request.noise_scale:g}", chips))
    console.print(
        f"± noise: standard error of the mean over {chips} noise seeds (other chips, same questions). ± questions: "
        "lm-eval's standard error of sampling questions (same chip), on chips its mean over seeds.\n"
        "Averages weigh every task alike; mmlu is one task, the mean over all its questions. The paper's average is "
        "that of acc. Their ± noise is over the averages of each seed."
    )
    if ties := ties_note(results):
        console.print(ties)
    if request.json_file is not None:
        write_json(request.json_file, _record(store, tasks, results, lines, averages))
        console.print(f"results: {request.json_file}")


def _settings(request: TasksRequest, model: Model, placement: Placement, files: list[Path]) -> dict[str, Any]:
    """What all results of a folder have in common, as plain values."""
    text = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    spec: Any = describe(request.spec(request.noise_scale))
    return {
        "model": model.name,
        "fingerprint": model_fingerprint(model),
        "weights_sha256": model_identity(model)["weights_sha256"],
        "code": code_record(),
        "dtype": str(model.params.embed.dtype),
        "placement": placement.name,
        **{f"analog {name}": value for name, value in spec.items()},
        "ranges": _ranges(request),
        "calibration text": {"sha256": text, "seq": request.seq},
        "seed": request.seed,
        "num_fewshot": request.num_fewshot,
        "limit": request.limit,
        "batch_tokens": request.batch_tokens,
        "implementation": request.implementation,
        "lm_eval": metadata.version("lm_eval"),
    }


def _ranges(request: TasksRequest) -> dict[str, Any]:
    """Where the DAC ranges come from."""
    if request.calibration_file is None:
        return {"input_range": request.input_range, "range_k": request.range_k}
    return {"calibration_sha256": hashlib.sha256(request.calibration_file.read_bytes()).hexdigest()}


def _load_tasks(request: TasksRequest, model: Model, console: Console) -> list[Any]:
    """Every task with its requests built; says where the questions come from."""
    from hetmoe.evaluate.tasks.harness import load_task, task_manager  # noqa: PLC0415  needs lm-eval, takes seconds

    tasks: list[Any] = []
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that its own tasks rely on
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar for each of 57 subjects of mmlu
        manager = task_manager()
        for name in request.tasks:
            task = load_task(manager, name, model, root=request.data, shots=request.num_fewshot, limit=request.limit)
            console.print(f"{name}: {task.questions:,} questions, {task.shots} examples each, from {task.where}")
            tasks.append(task)
    return tasks


def _run_with_progress(
    request: TasksRequest, model: Model, tasks: list[Any], analog: Analog, store: Store, console: Console
) -> dict[str, list[Metrics]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("tasks x chips", total=len(tasks) * (1 + chips_to_run(analog)))

        def advance(chip: str, task: str, metrics: Metrics, fresh: bool) -> None:
            bar.advance(shown)
            bar.update(shown, description=f"{chip}: {task}")
            if not console.is_terminal:  # a log has no bar
                kept = "" if fresh else " (from an earlier run)"
                console.print(f"{chip} {task}: acc {metrics['acc']:.2%} of {metrics['questions']:,}{kept}")

        return run_tasks(
            model, tasks, analog, store, tokens_per_batch=request.batch_tokens, implementation=request.implementation,
            progress=advance,
        )  # fmt: skip


def _table(lines: list[Line], averages: list[Line], title: str, chips: int) -> Table:
    table = Table(title=f"Accuracy in %: all digital beside {title}", title_justify="left", title_style="bold")
    headings = ["task", "metric", "all digital", "± questions"]
    if chips:
        headings += ["on chips", "± noise", "± questions"]
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value * 100:.2f}"

    for part in (lines, averages):
        for line in part:
            cells = [line.digital, line.digital_sampling, line.mean, line.standard_error, line.sampling]
            table.add_row(line.task, line.metric, *(percent(v) for v in cells[: len(headings) - 2]))
        table.add_section()
    return table


def _record(
    store: Store, tasks: list[Any], results: dict[str, list[Metrics]], lines: list[Line], averages: list[Line]
) -> dict[str, Any]:
    return {
        "format": "hetmoe-tasks-1",
        "provenance": store.provenance,
        "settings": store.settings,
        "tasks": {
            task.name: {
                "questions": task.questions,
                "requests": len(task.requests),
                "num_fewshot": task.shots,
                "source": task.where,
                "digest": task.digest,
                "digital": results[task.name][0],
                "per_seed": results[task.name][1:],
            }
            for task in tasks
        },
        "lines": [_plain(line) for line in lines],
        "averages": [_plain(line) for line in averages],
    }


def _plain(line: Line) -> dict[str, Any]:
    return dataclasses.asdict(line) | {"mean": line.mean, "standard_error": line.standard_error}
