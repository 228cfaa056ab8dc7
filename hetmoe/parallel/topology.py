"""Devices to compile for that need not be there: described TPUs, and simulated devices of the CPU.

A program that is compiled for described TPUs is the one that they would run: its memory, FLOPs and communication
(`hetmoe.parallel.program_costs`) can be read without them. Only arrays cannot be put there.
"""

import contextlib
import importlib.util
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from hetmoe.errors import InputError

MOST_SIMULATED = 2048  # more would take several processes, which JAX refuses to compile for on CPUs

_GIB = 2**30
_GB = 10**9

# Kinds are `jax.Device.device_kind`. TPUs: Cloud TPU documentation, pages "v4", "v5e", "v5p", "v6e" and "TPU7x", where
# sizes are in GiB or can be taken so: libtpu's compiler has 15.75 GiB on a v5e for programs. Of a TPU7x, JAX makes two
# devices, each with half of the chip's 192 GiB; of other chips one. GPUs: data sheets of NVIDIA, and the names that its
# driver gives; B200 as in a DGX B200.
_MEMORY = {
    "TPU v4": 32 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v6 lite": 32 * _GIB,
    "TPU7x": 96 * _GIB,
    "NVIDIA A100-PCIE-40GB": 40 * _GB,
    "NVIDIA A100-SXM4-40GB": 40 * _GB,
    "NVIDIA A100 80GB PCIe": 80 * _GB,
    "NVIDIA A100-SXM4-80GB": 80 * _GB,
    "NVIDIA H100 PCIe": 80 * _GB,
    "NVIDIA H100 80GB HBM3": 80 * _GB,
    "NVIDIA H100 NVL": 94 * _GB,
    "NVIDIA H200": 141 * _GB,
    "NVIDIA H200 NVL": 141 * _GB,
    "NVIDIA B200": 180 * _GB,
}

# What libtpu otherwise asks a metadata server for, and prints complaints about on file descriptor 2 where there is
# none; that it may be loaded by several processes, because none of them uses a TPU. Any valid type of accelerator will
# do: it does not change what is compiled.
_WITHOUT_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def memory_of(device_kind: str) -> int | None:
    """Bytes of memory of a device, as its maker states them; None if they are not known here.

    Programs have a little less on TPUs (15.75 of 16 GiB on a v5e), and a little more on GPUs, whose sizes are stated in
    decimal units and rounded down.

    Args:
        device_kind: as `jax.Device.device_kind` says it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    return _MEMORY.get(device_kind)


def described_devices(name: str) -> list[Any]:
    """Devices (`jax.Device`) to compile for.

    TPUs need libtpu (no dependency of hetmoe) in the version that JAX's extra "tpu" asks for, but no TPU. With jax
    0.10.2 and libtpu 0.0.52 instead of 0.0.42, the text of programs with collectives for TPU7x cannot be had, and that
    of ragged matmuls on v5e and v6e shows dense ones. libtpu is quiet if this is what loads it; JAX loads it itself
    when it starts, unless JAX_PLATFORMS=cpu is set, and then it complains on standard error that there is no TPU.
    Compiling ends in an error if a program does not fit the TPUs' memory.

    Simulated devices are all in this process and share its CPU; they must be asked for before JAX starts, which is when
    it first makes an array or lists devices. To compile for thousands of them is possible; to run on as many is not
    where the threads of each, which wait for each other, are too many for the machine.

    Args:
        name: "tpu:GENERATION:TOPOLOGY", chips along the axes of their torus: "tpu:v5e:4x4", "tpu:v5p:4x4x4",
            "tpu:v6e:16x16", "tpu:v4:4x4x4" or "tpu:tpu7x:4x4x4" (with two devices a chip); or "cpu:NUMBER".

    Raises:
        InputError: for another name, an impossible topology, TPUs without libtpu, GPUs, and simulated devices once JAX
            has started with fewer.
    """
    platform, _, which = name.partition(":")
    if platform == "tpu" and ":" in which:
        return _tpus(name, which)
    if platform == "cpu":
        return _simulated(name, which)
    if platform == "gpu":
        raise InputError(
            f"{name}: JAX cannot describe GPUs as it does TPUs (without a GPU's plug-in it lowers for them, but does "
            f"not compile); use tpu:..., or cpu:NUMBER for simulated devices"
        )
    raise InputError(f"{name}: devices must be tpu:GENERATION:TOPOLOGY, such as tpu:v5e:4x4, or cpu:NUMBER")


def _tpus(name: str, which: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"{name}: compiling for TPUs needs libtpu, in the version for this JAX: "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        )
    # Otherwise a v4's two cores are two devices; JAX on real ones makes them one, as all do on v5p.
    how = {"chip_config_name": "megacore"} if which.startswith("v4:") else {}
    with _quiet_libtpu():
        try:
            description = topologies.get_topology_desc(which, "tpu", **how)
        except jax.errors.JaxRuntimeError as error:
            raise InputError(f"{name}: libtpu does not know this topology: {error}") from None
    return list(description.devices)


@contextlib.contextmanager
def _quiet_libtpu() -> Generator[None]:
    """Settings for libtpu, which reads them when it is loaded; a machine with TPUs keeps its own."""
    attached = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    added = {} if attached else {key: value for key, value in _WITHOUT_TPU.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _simulated(name: str, which: str) -> list[Any]:
    if not which.isdecimal() or not 1 <= int(which) <= MOST_SIMULATED:
        raise InputError(f"{name}: the number of simulated devices must be from 1 to {MOST_SIMULATED}")
    count = int(which)
    with contextlib.suppress(RuntimeError):  # JAX has started: what there is may do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"{name}: JAX has started with {len(devices)} CPU device(s); ask for simulated devices before anything "
            f"else uses JAX, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]
