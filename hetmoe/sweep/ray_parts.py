"""Parts of a sweep as tasks of Ray: each is `hetmoe sweep --part I/N`, in a process of its own.

A process that Ray keeps for its tasks has imported who knows what before; JAX begins afresh in every part. Ray gives a
part one GPU where the cluster has any, since it hides GPUs from tasks that did not ask for one.
"""

import importlib
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.sweep.parts import Part

LOCAL = "local"  # Ray's word for a cluster of this machine alone
SECONDS_TO_CONNECT = 20.0


def find_ray() -> Any:
    """The module.

    Raises:
        InputError: if it is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("hetmoe sweep --ray needs Ray: pip install 'hetmoe[cluster]'")
    return importlib.import_module("ray")


def run_parts(
    ray: Any, parts: Sequence[Part], arguments: Sequence[str], address: str | None, tell: Callable[[str], Any]
) -> dict[Part, str]:
    """Runs all parts, as many at a time as the cluster has room for, and waits for all of them.

    Args:
        ray: the module.
        parts: to run.
        arguments: of `hetmoe`, without the part; paths are absolute, and the same on all machines.
        address: of a cluster; None = this machine.
        tell: called with a line about each part that ended.

    Returns:
        Why parts failed: the last line that each wrote to stderr.

    Raises:
        InputError: if there is no cluster at the address.
    """
    _connect(ray, address)
    try:
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        task = ray.remote(run_command).options(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")
        folder = str(Path.cwd())  # CONFIG may name the model relative to it
        running = {task.remote([*arguments, "--part", str(part)], folder): part for part in parts}
        failures: dict[Part, str] = {}
        while running:
            (ended,), _ = ray.wait(list(running))
            part = running.pop(ended)
            try:
                failure = ray.get(ended)
            except ray.exceptions.RayError as error:  # the machine or the task's process died
                failure = _last_line(str(error)) or type(error).__name__
            if failure is not None:
                failures[part] = failure
            tell(f"part {part}: {failure or 'finished'}")
        return failures
    finally:
        ray.shutdown()


def run_command(arguments: list[str], folder: str) -> str | None:
    """Runs hetmoe in a process of its own and waits for it; why it failed, in one line."""
    command = [sys.executable, "-m", "hetmoe.cli", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if not done.returncode:
        return None
    died = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return _last_line(done.stderr) or died


def _check_reachable(address: str) -> None:
    """Ray itself waits for many minutes where nobody answers."""
    found = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:  # the latter: a port that cannot be
        raise InputError(f"--ray-address {address}: nobody answers ({error})") from None


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _connect(ray: Any, address: str | None) -> None:
    where = LOCAL if address is None else address
    _check_reachable(where)
    options = {"include_dashboard": False} if where == LOCAL else {}
    try:
        with warnings.catch_warnings():
            # JAX warns of forks, for fear of its threads. Those of Ray run another program at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(address=where, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray ({where}): {_last_line(str(error)) or type(error).__name__}") from None
