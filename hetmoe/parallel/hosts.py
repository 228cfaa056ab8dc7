"""A run of several processes: how it starts, and what the processes tell each other.

All processes run the same program on the same arguments; JAX's own runtime (`jax.distributed`) connects them. Process 0
is the one that prints and writes.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hetmoe.errors import InputError

CLUSTERS = {"slurm": "slurm", "k8s": "", "mpi": "ompi"}  # on the command line: as `jax.distributed` calls it
K8S_INDEX = "JOB_COMPLETION_INDEX"  # that Kubernetes gives each pod of an indexed Job
HEARTBEAT_S = 30  # without a sign of life from a process for so long, JAX's runtime ends all others
WAIT_S = 120  # for the others, at the start
WAIT_AT_END_S = 20  # a process that stops for an error does not wait for the others longer

# JAX's runtime ends a process from outside Python, with a stack trace of its own: what that means is said by a child,
# which reads to the end of a pipe and finds that this process did not say goodbye.
_GOODBYE = b"goodbye"
_LISTENER = f"import sys\nif sys.stdin.buffer.read() != {_GOODBYE!r}: print(sys.argv[1], file=sys.stderr, flush=True)"


_listeners: list[subprocess.Popen[bytes]] = []  # of this process: at most one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Where this process stands: by an address and numbers, or by the variables that a cluster sets."""

    coordinator: str | None = None  # host:port, on which process 0 listens
    count: int | None = None
    number: int | None = None
    cluster: str | None = None  # of CLUSTERS

    def __post_init__(self) -> None:
        given = (self.coordinator, self.count, self.number)
        if self.cluster is not None and self.cluster not in CLUSTERS:
            raise InputError(f"cluster {self.cluster!r} is unknown: use {', '.join(CLUSTERS)}")
        if self.cluster == "k8s":
            if self.coordinator is None or self.count is None or self.number is not None:
                raise InputError(
                    f"--cluster k8s takes the number of a process from {K8S_INDEX} of an indexed Job: give "
                    "--coordinator HOST:PORT (its pod 0 in a headless service) and --processes N (its completions)"
                )
        elif self.cluster is not None and any(value is not None for value in given):
            raise InputError(
                f"--cluster {self.cluster} reads the cluster's variables: leave out --coordinator, --processes and "
                "--process"
            )
        elif self.cluster is not None:
            return
        if all(value is None for value in given):
            return
        if self.coordinator is None or self.count is None or (self.number is None and self.cluster is None):
            raise InputError("--coordinator HOST:PORT, --processes N and --process I go together: give all three")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"--coordinator {self.coordinator!r} must be HOST:PORT, such as 10.0.0.1:1234")
        if self.count < 1:
            raise InputError(f"--processes {self.count} must be at least 1")
        if self.number is not None and not 0 <= self.number < self.count:
            raise InputError(f"--process {self.number} must be from 0 to {self.count - 1} (--processes {self.count})")

    @property
    def several(self) -> bool:
        """Whether this is a run of several processes."""
        return self.cluster is not None or self.coordinator is not None


def start(processes: Processes) -> None:
    """Connects this process to the others. To be called before JAX is used; nothing happens if it is the only one.

    Raises:
        InputError: if the cluster's variables are not there, or the others cannot be reached in time.
    """
    if not processes.several:
        return
    number = _index_of_pod(processes.count) if processes.cluster == "k8s" else processes.number
    method = CLUSTERS.get(processes.cluster or "") or "deactivate"
    logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # what is wrong is said below
    try:
        jax.distributed.initialize(
            coordinator_address=processes.coordinator,
            num_processes=processes.count,
            process_id=number,
            cluster_detection_method=method,
            initialization_timeout=WAIT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=WAIT_AT_END_S,
        )
    except (ValueError, KeyError) as error:
        raise InputError(
            f"--cluster {processes.cluster}: the variables of its jobs are not set ({_first_line(error)}): start the "
            "processes by its launcher, such as srun, or give --coordinator, --processes and --process"
        ) from None
    except RuntimeError as error:
        raise InputError(
            f"the processes of this run did not meet in {WAIT_S} s ({_first_line(error)}): are all of them started, "
            "with the same --coordinator and --processes?"
        ) from None

    _say_if_cut_off()


def _index_of_pod(count: int | None) -> int:
    found = os.environ.get(K8S_INDEX, "")
    if not found.isdecimal() or count is None or int(found) >= count:
        raise InputError(
            f"--cluster k8s: {K8S_INDEX}={found!r} must be a number below --processes {count}: run in an indexed Job "
            "(completionMode: Indexed), or give --process"
        )
    return int(found)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def _say_if_cut_off() -> None:
    message = (
        f"hetmoe: process {jax.process_index()} of {jax.process_count()} was ended before it had finished: it was "
        "killed, or another process of this run was, and the run cannot go on without it. Finished parts (--progress) "
        "and finished points of a sweep are kept: start all processes again with the same command"
    )
    listener = subprocess.Popen(
        [sys.executable, "-c", _LISTENER, message], stdin=subprocess.PIPE, start_new_session=True
    )

    _listeners.append(listener)
    atexit.register(_say_goodbye)


def _say_goodbye() -> None:
    while _listeners:
        _listeners.pop().communicate(_GOODBYE)


@contextlib.contextmanager
def failures_of_others() -> Generator[None]:
    """Ends this process with one line where the runtime raises an error because another one of the run is gone.

    At once: on its way out Python would have the runtime wait for the others, and be aborted by it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        sys.stdout.flush()
        sys.stderr.write(
            f"hetmoe: process {jax.process_index()} of {jax.process_count()}: the run cannot go on, probably because "
            f"another process ended ({_first_line(error)}); finished parts and points are kept: start all processes "
            "again with the same command\n"
        )
        sys.stderr.flush()
        _say_goodbye()
        os._exit(1)


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def check_same(facts: dict[str, Any], name: str = "start") -> None:
    """Refuses to go on where processes differ in versions, code or arguments, before anything is compiled.

    `name` tells several comparisons of one run apart. The facts travel through the coordinator, not through a compiled
    program, which versions that differ might not even be able to run together.

    Raises:
        InputError: in every process, naming what differs, in which process, and both values.
    """
    first, *others = everyone(name, facts)
    for number, other in enumerate(others, start=1):
        for fact in first | other:
            if first.get(fact) != other.get(fact):
                raise InputError(
                    f"process {number} of {len(others) + 1} differs from process 0 in {fact}: {other.get(fact)!r} and "
                    f"{first.get(fact)!r}; all processes need the same versions, code, files and arguments"
                )


def everyone(name: str, value: Any) -> list[Any]:
    """What every process gives, by its number, as JSON has it; `name` is used once in a run.

    Raises:
        InputError: if a process does not answer in time.
    """
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value, default=str))]
    client = _client()
    client.key_value_set(f"hetmoe/{name}/{jax.process_index()}", json.dumps(value, default=str))
    return [
        json.loads(client.blocking_key_value_get(f"hetmoe/{name}/{number}", WAIT_S * 1000))
        for number in range(jax.process_count())
    ]


def _client() -> Any:
    from jax._src import distributed  # noqa: PLC0415 (JAX has no public access to its key-value store)

    return distributed.global_state.client


def from_main(content: bytes | None) -> bytes:
    """What process 0 gives, in all processes; the others give None."""
    if jax.process_count() == 1:
        assert content is not None
        return content
    size = multihost_utils.broadcast_one_to_all(np.int32(0 if content is None else len(content)))
    values = np.zeros(int(size), np.uint8)
    if content is not None:
        values[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(values)).astype(np.uint8).tobytes()
