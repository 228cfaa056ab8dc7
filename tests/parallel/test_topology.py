"""Devices that are not there. What JAX decides when it starts is tested in processes of their own."""

import json

import jax
import pytest

from hetmoe.errors import InputError
from hetmoe.parallel.topology import described_devices, memory_of
from tests.checkpoint.test_loading import run

TPUS = {
    "tpu:v4:2x2x1": ("TPU v4", 4),
    "tpu:v5e:4x4": ("TPU v5 lite", 16),
    "tpu:v5p:2x2x2": ("TPU v5", 8),
    "tpu:v6e:2x4": ("TPU v6 lite", 8),
    "tpu:tpu7x:2x2x1": ("TPU7x", 8),
}

# Every device's kind, and how much of its memory the compiler has, which it says once a program needs more. In the end
# an ordinary computation: JAX has not been told that there are TPUs.
DESCRIBE = """
import json, os, re, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from hetmoe.parallel.topology import described_devices

before = dict(os.environ)
found = {}
for name in sys.argv[1:]:
    devices = described_devices(name)
    sharding = SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((2**18, 2**20), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        available = re.search(r"exceeds available HBM \\(([0-9.]+)G\\)", str(error)).group(1)
    found[name] = [devices[0].device_kind, len(devices), len(set(devices)), float(available) * 2**30]
assert dict(os.environ) == before | {"TPU_LIBRARY_PATH": os.environ["TPU_LIBRARY_PATH"]}
assert jax.jit(lambda x: x + 1)(jnp.ones(())).devices() == set(jax.devices("cpu"))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_described_tpus():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    found = json.loads(run(DESCRIBE, *TPUS))
    for name, (kind, count) in TPUS.items():
        assert found[name][:3] == [kind, count, count]
        memory = memory_of(kind)
        assert 0.96 < found[name][3] / memory < 1.01  # 95 GiB of a v5p are 95.73


def test_libtpu_is_quiet_and_shared():
    """Nothing on standard error, also of a second process while the first one goes on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    script = """
import os, subprocess, sys, tempfile
from hetmoe.parallel.topology import described_devices

with tempfile.TemporaryFile() as caught:
    os.dup2(caught.fileno(), 2)
    print(len(described_devices("tpu:v5e:2x2")))
    if len(sys.argv) > 1:
        subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
    caught.seek(0)
    print(caught.read().decode())
"""
    assert run(script, script).split() == ["4", "4"]


@pytest.mark.parametrize("topology", ["v5e:3x3", "v9:2x2", "v5e:", "v5e:4,4"])
def test_impossible_topologies(topology):
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    with pytest.raises(InputError, match=f"^tpu:{topology}: libtpu does not know this topology: "):
        described_devices(f"tpu:{topology}")


def test_tpus_need_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^tpu:v5e:4x4: .* pip install 'jax\[tpu\]==[0-9.]+'$"):
        described_devices("tpu:v5e:4x4")


@pytest.mark.parametrize("name", ["", "v5e:4x4", "rocm:8", "TPU:v5e:4x4", "tpu", "tpu:", "tpu:v5e"])
def test_other_names(name):
    with pytest.raises(InputError, match=rf"^{name}: devices must be tpu:GENERATION:TOPOLOGY"):
        described_devices(name)


def test_gpus_cannot_be_described():
    with pytest.raises(InputError, match=r"^gpu:h100:8: .* use tpu:\.\.\., or cpu:NUMBER"):
        described_devices("gpu:h100:8")


@pytest.mark.parametrize("number", ["0", "-1", "2049", "many", "1.5", ""])
def test_numbers_of_simulated_devices(number):
    with pytest.raises(InputError, match=f"^cpu:{number}: .* from 1 to 2048$"):
        described_devices(f"cpu:{number}")


def test_simulated_devices():
    """Before JAX starts any number; afterwards no more than that."""
    script = """
from hetmoe.errors import InputError
from hetmoe.parallel.topology import described_devices
devices = described_devices("cpu:64")
assert len(set(devices)) == 64 and {device.platform for device in devices} == {"cpu"}
assert described_devices("cpu:4") == devices[:4]
try:
    described_devices("cpu:65")
except InputError as error:
    print(error)
"""
    assert run(script).startswith("cpu:65: JAX has started with 64 CPU device(s); ")


def test_simulated_devices_that_are_there():
    there = jax.devices("cpu")
    assert described_devices("cpu:1") == there[:1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("TPU v5 lite", 17_179_869_184), ("NVIDIA H100 80GB HBM3", 80_000_000_000), ("cpu", None), ("TPU v1", None)],
)
def test_memory(kind, expected):
    assert memory_of(kind) == expected
