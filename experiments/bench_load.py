"""Loading and scoring a synthetic 4 GB checkpoint: time beside a plain read of its files, and peak host memory.

    python experiments/bench_load.py --work build/bench

Writes an OLMoE-shaped bfloat16 checkpoint (5 layers of 64 experts, 4.3 GB in shards of 1 GB, one tensor per expert as
on the hub) once. Then, each in a process of its own: reads the files plainly (over and over into one buffer, and into
new memory, which any loader must fill), loads them with `load_model` as bfloat16 and as float32, and scores them as
`hetmoe place` does, for both axes of `down`. Memory is sampled every 2 ms: anonymous memory is RssAnon + RssShmem
(mapped file pages are not counted), RSS counts everything. Rows are medians of `--repeat` runs, taken in turn; the
files are in the page cache if they fit, so a plain read measures memory and not the disk. Cost: 3 minutes on two CPU
cores, 5 GB of disk.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import typer

JOBS = ("read", "read into new memory", "load bfloat16", "load float32", "place hidden", "place output")
CHUNK = 16 << 20  # bytes of a plain read


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


class Peak:
    """Largest anonymous and resident memory while it is open, and what they were before."""

    def __init__(self) -> None:
        self.before = self._now()
        self.most, self.stop = dict(self.before), threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    @staticmethod
    def _now() -> dict[str, int]:
        return {"anonymous": memory("RssAnon") + memory("RssShmem"), "resident": memory("VmRSS")}

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            for name, value in self._now().items():
                self.most[name] = max(self.most[name], value)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def make(folder: Path) -> None:
    """Writes the checkpoint: random values of the right size, the same block of them over and over."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from hetmoe.checkpoint.pieces import checkpoint_keys, stored_shape
    from hetmoe.models.abstract import abstract_params, is_leaf
    from hetmoe.models.config import ModelConfig, Rope
    from hetmoe.models.hf_config_write import config_to_hf

    config = ModelConfig(
        family="olmoe", vocab_size=8192, hidden_size=2048, num_layers=5, max_position_embeddings=4096,
        tie_embeddings=False, rms_norm_eps=1e-5, rope=Rope(theta=1e4), num_heads=16, num_kv_heads=16, head_dim=128,
        qk_norm="width", num_experts=64, experts_per_token=8, expert_intermediate_size=1024, norm_topk_prob=False,
    )  # fmt: skip
    folder.mkdir(parents=True)
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 25)).astype(jnp.bfloat16)
    tensors: dict[str, np.ndarray] = {}
    table: dict[str, str] = {}
    number = 1

    def flush() -> None:
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name)
        table.update(dict.fromkeys(tensors, name))
        tensors.clear()

    for leaf in jax.tree.leaves(abstract_params(config), is_leaf=is_leaf):
        for piece in checkpoint_keys(leaf):
            shape = stored_shape(leaf, piece)
            size = int(np.prod(shape))
            start = (len(table) + len(tensors)) * 1009 % (block.size - size)
            tensors[piece.key] = block[start : start + size].reshape(shape)
            if sum(t.nbytes for t in tensors.values()) > 1_000_000_000:
                flush()
                number += 1
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | {"dtype": "bfloat16"}))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_plainly(folder: Path) -> None:
    buffer = bytearray(CHUNK)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run_job(folder: Path, job: str) -> dict[str, Any]:
    """Runs one job in this process; `seconds`, `parameters` in bytes of the target dtype, and memory."""
    kind, _, how = job.partition(" ")
    parameters = 0
    if kind == "read":
        with Peak() as peak:
            started = time.perf_counter()
            if how:
                kept = [np.fromfile(path, np.uint8) for path in files_of(folder)]
                assert len(kept) == len(files_of(folder))
            else:
                read_plainly(folder)
            seconds = time.perf_counter() - started
    else:
        import jax

        from hetmoe.checkpoint.load import load_model, open_checkpoint
        from hetmoe.placement.streaming import stream_scores

        jax.block_until_ready(jax.numpy.zeros(3) + 1)  # start-up is not what is measured
        with Peak() as peak:
            started = time.perf_counter()
            if kind == "load":
                model = load_model(folder, how)
                jax.block_until_ready(model.params)
                parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
            else:
                stream_scores(open_checkpoint(folder), "max_neuron_norm", down_axis=how)  # pyright: ignore[reportArgumentType]
            seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "parameters": parameters,
        "anonymous": peak.most["anonymous"] - peak.before["anonymous"],
        "anonymous_total": peak.most["anonymous"],
        "resident_total": peak.most["resident"],
    }


def main(
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint; kept for the next run.")],
    repeat: Annotated[int, typer.Option(help="Runs of every job.")] = 3,
    job: Annotated[str | None, typer.Option(help="Internal: run one job in this process and print JSON.")] = None,
) -> None:
    """Measure loading and scoring."""
    folder = work / "synthetic-4gb"
    if job is not None:
        typer.echo(json.dumps(run_job(folder, job)))
        return
    if not folder.exists():
        make(folder)
    size = sum(path.stat().st_size for path in files_of(folder))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in JOBS}
    for _ in range(repeat):
        for name in JOBS:
            command = [sys.executable, __file__, "--work", str(work), "--job", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[name].append(json.loads(done.stdout))
    middle = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    plain = middle["read"]["seconds"]
    print(f"{size / 1e9:.2f} GB in {len(files_of(folder))} files, median of {repeat}\n")
    print("| job | s | GB/s | times plain read | peak anonymous GB | / parameters | peak RSS GB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in middle.items():
        share = f"{row['anonymous'] / row['parameters']:.3f}" if row["parameters"] else "-"
        print(
            f"| {name} | {row['seconds']:.2f} | {size / 1e9 / row['seconds']:.2f} | {row['seconds'] / plain:.2f} | "
            f"{row['anonymous_total'] / 1e9:.3f} | {share} | {row['resident_total'] / 1e9:.3f} |"
        )


if __name__ == "__main__":
    typer.run(main)
