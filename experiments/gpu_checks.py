"""The Pallas kernels, compiled for the GPU that is here, against the references of the tests.

    PYTHONPATH=. python experiments/gpu_checks.py --json build/gpu_checks.json
    PYTHONPATH=. python experiments/gpu_checks.py --group packed --group drawn        # some of it
    PYTHONPATH=. python experiments/gpu_checks.py --implementation interpret_cuda --seconds 3000 --jobs 2    # anywhere

It needs pytest and hypothesis beside the package. The cases (`gpu_check_cases.py`) are products of real models' sizes
and the tests of `tests/ops` and `tests/models` that run interpreted elsewhere. Tolerances are those of the tests. Every
group of cases has a process of its own, which begins anew behind a case that took the device down. What has not
finished after `--seconds` is ended, and counted as not run.

Cost: at most `--seconds` (150), nearly all of it compilation. Expected: every case ok. No results are stored.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

ROOT = Path(__file__).parents[1]
NAMES = (
    "matrix", "experts", "packed", "gradients", "drawn", "xla", "models", "experts, tests", "matrix, tests",
    "packed, tests", "golden files, tests",
)  # fmt: skip
MARK, DEVICE_IS_DOWN = "result: ", 3


def import_cases() -> Any:
    """`gpu_check_cases`, which finds this repository's tests whatever else an environment has under that name."""
    package = types.ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package
    import gpu_check_cases

    return gpu_check_cases


def work(group: str, implementation: str, done: int) -> None:
    """Runs a group's cases but for the first `done`, and prints a line of JSON when one begins and when it ends."""
    jax.config.update("jax_default_matmul_precision", "highest")  # what is compared with is float32, not TF32
    cases = import_cases()
    cases.enter(implementation)

    def say(**line: Any) -> None:
        print(MARK + json.dumps(line), flush=True)

    chosen = cases.GROUPS[group](implementation)
    say(names=list(chosen))
    for name, case in list(chosen.items())[done:]:
        say(began=name)
        start = time.perf_counter()
        result: dict[str, Any] = {"status": "ok", "note": "", "traceback": None}
        try:
            result["note"] = case()
        except Exception as error:  # noqa: BLE001
            # An AssertionError is a wrong result; anything else did not get that far.
            status = "wrong" if isinstance(error, AssertionError) else "failed"
            first = " ".join(" ".join(str(error).split())[:400].split("Error Message:"))
            result = {"status": status, "note": f"{type(error).__name__}: {first}", "traceback": traceback.format_exc()}
        say(ended=name, seconds=time.perf_counter() - start, **result)
        if result["status"] == "failed" and not device_works():
            sys.exit(DEVICE_IS_DOWN)


def device_works() -> bool:
    try:
        jax.block_until_ready(jax.numpy.arange(4) + 1)
    except jax.errors.JaxRuntimeError:
        return False
    return True


@dataclasses.dataclass
class Group:
    """A group's process and results; read while its thread adds to them."""

    name: str
    names: list[str] = dataclasses.field(default_factory=list)
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    running: str | None = None
    process: subprocess.Popen[str] | None = None
    stopped: bool = False
    errors: str = ""

    def run(self, implementation: str, report: Any) -> None:
        """Until every case has a result, or the group is stopped."""
        while not self.stopped and (not self.names or len(self.results) < len(self.names)):
            before = len(self.results)
            with tempfile.TemporaryFile("w+") as errors:
                command = [sys.executable, __file__, "--worker", self.name, "--done", str(before)]
                self.process = subprocess.Popen(
                    [*command, "--implementation", implementation],
                    stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), process_group=0,
                )  # fmt: skip
                if self.stopped:
                    self.stop()
                self._read(report)
                code = self.process.wait()
                errors.seek(0)
                self.errors = errors.read()[-4000:]
            if code and self.running is not None and not self.stopped:
                last = {"name": self.running, "status": "failed", "note": f"the process ended: exit code {code}"}
                self._add(last | {"seconds": None, "traceback": self.errors}, report)
            elif code and len(self.results) == before:
                return  # it does not even start

    def _read(self, report: Any) -> None:
        assert self.process is not None and self.process.stdout is not None
        for text in self.process.stdout:
            if not text.startswith(MARK):
                continue
            line = json.loads(text.removeprefix(MARK))
            self.names, self.running = line.get("names", self.names), line.get("began", self.running)
            if "ended" in line:
                self._add({"name": line.pop("ended"), **line}, report)

    def _add(self, result: dict[str, Any], report: Any) -> None:
        self.results.append(result)
        self.running = None
        report()

    def stop(self) -> None:
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # and the assembler that it may have started

    def record(self) -> dict[str, Any]:
        left = self.names[len(self.results) :]
        return {"group": self.name, "results": list(self.results), "running": self.running, "not_run": left,
                "errors": None if self.results and not left else self.errors}  # fmt: skip


def environment() -> dict[str, str]:
    """Processes share a device's memory, and matmuls that are not ours are not tuned."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags, "PYTHONPATH": path}


def show(groups: list[Group]) -> None:
    """One line a group, and those of its cases that are not ok."""
    for group in groups:
        record = group.record()
        counts = [f"{sum(r['status'] == s for r in group.results)} {s}" for s in ("ok", "wrong", "failed")]
        seconds = sum(result["seconds"] or 0 for result in group.results)
        print(f"{group.name:20} {', '.join(counts)}, {len(record['not_run'])} not run, {seconds:.0f} s")
        if not group.names:
            print(f"    did not start: {group.errors[-300:]}")
        if group.running is not None:
            print(f"    not finished: {group.running}")
        for result in group.results:
            if result["status"] != "ok":
                print(f"    {result['status']}: {result['name']}: {result['note'][:230]}")


def main(
    group: Annotated[list[str] | None, typer.Option(help=f"Of {'; '.join(NAMES)}; all by default.")] = None,
    *,
    implementation: Annotated[str, typer.Option(help="pallas, or an interpreted one.")] = "pallas",
    seconds: Annotated[float, typer.Option(help="After which what still runs is ended.")] = 150,
    jobs: Annotated[int, typer.Option(help="Groups at a time.")] = len(NAMES),
    output: Annotated[Path | None, typer.Option("--json", help="Write results with tracebacks and provenance.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    done: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Check and print."""
    if worker is not None:
        work(worker, implementation, done)
        return
    for name in group or ():
        if name not in NAMES:
            raise SystemExit(f"--group {name}: choose from {'; '.join(NAMES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from hetmoe.evaluate.provenance import provenance

    command = ["python", "experiments/gpu_checks.py", *sys.argv[1:]]
    record: dict[str, Any] = {"provenance": provenance() | {"command": command}, "implementation": implementation}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, implementation {implementation}", flush=True)
    groups, lock = [Group(name) for name in NAMES if group is None or name in group], threading.Lock()

    def save() -> None:
        with lock:
            record["groups"] = [one.record() for one in groups]
            if output is not None:
                output.write_text(json.dumps(record, indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        timer = threading.Timer(seconds, lambda: [one.stop() for one in groups])
        timer.start()
        for future in [pool.submit(one.run, implementation, save) for one in groups]:
            future.result()
        timer.cancel()
    save()
    show(groups)


if __name__ == "__main__":
    typer.run(main)
