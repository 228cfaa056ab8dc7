"""Published noise models of memory devices, by name."""

from types import MappingProxyType

from hetmoe.analog.devices.afm import AFM
from hetmoe.analog.devices.base import (
    Device,
    Draw,
    GroupRange,
    NoiseMoments,
    Programmed,
    ScaleGroup,
    Stream,
    group_range,
)
from hetmoe.analog.devices.compensation import compensation_factor, global_drift_compensation
from hetmoe.analog.devices.gaussian import Additive, Proportional
from hetmoe.analog.devices.hermes import Hermes, Hermes1
from hetmoe.analog.devices.pcm import PCM
from hetmoe.analog.devices.reram_cmo import CMOReRAM
from hetmoe.analog.devices.reram_wan import WanReRAM
from hetmoe.analog.devices.state_independent import StateIndependent
from hetmoe.errors import InputError

__all__ = [
    "AFM",
    "DEVICES",
    "PCM",
    "Additive",
    "CMOReRAM",
    "Device",
    "Draw",
    "GroupRange",
    "Hermes",
    "Hermes1",
    "NoiseMoments",
    "Programmed",
    "Proportional",
    "ScaleGroup",
    "StateIndependent",
    "Stream",
    "WanReRAM",
    "compensation_factor",
    "get_device",
    "global_drift_compensation",
    "group_range",
]

DEVICES: MappingProxyType[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            PCM(),
            Hermes(),
            Hermes1(),
            WanReRAM(),
            CMOReRAM(),
            StateIndependent(),
            AFM(),
            Additive(),
            Proportional(),
        )
    }
)


def get_device(name: str) -> Device:
    """The device of that name with its published parameters; change a field with `dataclasses.replace`.

    Raises:
        InputError: for an unknown name, listing the valid ones.
    """
    try:
        return DEVICES[name]
    except KeyError:
        raise InputError(f"unknown device {name!r}: use one of {', '.join(DEVICES)}") from None
