"""One process of a run of several, each with four simulated devices.

`python -m tests.parallel.host_cases CASE PORT PROCESSES PROCESS [DIRECTORY]`; with one process there are eight.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from hetmoe.checkpoint import read
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
from hetmoe.evaluate.progress import open_progress
from hetmoe.models.model import model_fingerprint
from hetmoe.parallel import hosts
from hetmoe.parallel.mesh import make_mesh, parse_mesh
from hetmoe.placement.scores import score_experts
from tests.checkpoint.golden_files import GOLDEN
from tests.parallel.evaluation_cases import evaluated, model


def evaluate() -> None:
    """Prints what process 0 finds."""
    mesh = make_mesh(parse_mesh("data=2,expert=2,tensor=2"))
    perplexity, digital, load = evaluated(mesh, few=True)
    of = model(mesh)
    scores = np.asarray(score_experts(of, "max_neuron_norm"))
    if hosts.is_main():
        print(json.dumps([perplexity.tolist(), digital, load.tolist(), scores.tolist(), model_fingerprint(of)]))


def load() -> None:
    """Prints which tensors this process read of a checkpoint whose experts lie on eight devices."""
    seen: list[str] = []
    fill = read._Reader.fill

    def watched(self, target, leaf, piece, region):
        seen.append(piece.key)
        fill(self, target, leaf, piece, region)

    read._Reader.fill = watched
    load_model(GOLDEN / "olmoe_tiny", mesh=make_mesh(parse_mesh("expert=8")))
    print(json.dumps(seen))


def killed(directory: str) -> None:
    """Process 1 is killed in the second part of three; `wait` is a computation of all."""
    mesh = make_mesh(parse_mesh("expert=8"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    add = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    values = np.arange(8.0, dtype=np.float32)
    x = jax.make_array_from_callback((8,), spread, lambda index: values[index])
    with open_progress(
        Path(directory) / "progress", {"what": "sums"}, 1, is_main=hosts.is_main(), share=hosts.from_main
    ) as store:
        sums: dict[str, np.ndarray] = {}
        for part in range(3):
            if part == 1 and jax.process_index() == int(os.environ["VICTIM"]) and store.finished < 2:
                os.kill(os.getpid(), signal.SIGKILL)
            sums = store.sums(str(part), lambda part=part: {"sum": np.asarray(add(x)) + part})
        if hosts.is_main():
            print(float(sums["sum"]), store.finished)


def refused() -> None:
    """What is refused before anything is compiled."""
    number = jax.process_index()
    for name, facts in (("same", {"jax": "0.10.2"}), ("different", {"jax": f"0.10.{number}"})):
        try:
            hosts.check_same(facts, name)
        except InputError as error:
            print(error)
    for text in ("expert=1", "expert=4", "expert=16"):
        try:
            make_mesh(parse_mesh(text))
        except InputError as error:
            print(error)


def main(case: str, port: str, count: str, number: str, *more: str) -> None:
    several = int(count) > 1
    jax.config.update("jax_num_cpu_devices", 4 if several else 8)
    if several:
        hosts.start(hosts.Processes(coordinator=f"127.0.0.1:{port}", count=int(count), number=int(number)))
    with hosts.failures_of_others():
        {"evaluate": evaluate, "load": load, "killed": killed, "refused": refused}[case](*more)


if __name__ == "__main__":
    main(*sys.argv[1:])
