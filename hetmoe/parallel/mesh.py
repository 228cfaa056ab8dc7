"""Which mesh a run uses: from the command line to devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.parallel.shard import AXES, Shard


def parse_mesh(text: str) -> Shard:
    """`"data=2,expert=4"` as numbers of parts; axes that are not named are not cut.

    Raises:
        InputError: for an unknown axis, one named twice, or a size that is no whole number from 1 to 10^9.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise InputError(f"mesh {text!r}: unknown axis {name!r}; use {', '.join(AXES)}, as in data=2,expert=4")
        if name in sizes:
            raise InputError(f"mesh {text!r}: axis {name!r} is named twice")
        if not value.isdecimal() or len(value) > 9 or int(value) < 1:
            raise InputError(f"mesh {text!r}: {name}={value!r} must be a whole number of at least 1, below 10^9")
        sizes[name] = int(value)
    return Shard(**sizes)


def describe_mesh(shard: Shard) -> str:
    """As `parse_mesh` reads it; axes of one part are left out."""
    return ",".join(f"{axis}={getattr(shard, axis)}" for axis in AXES if getattr(shard, axis) > 1) or "data=1"


def check_divides(shard: Shard, config: ModelConfig, *, batch: int | None = None, seeds: int | None = None) -> None:
    """Refuses a mesh that cannot cut a model, a batch of windows, or noise seeds into equal parts.

    Raises:
        InputError: naming axis, its parts, and what they do not divide.
    """
    windows = shard.data * shard.expert
    rules = [
        ("expert", shard.expert, "experts of a layer", config.num_experts),
        ("tensor", shard.tensor, "attention heads", config.num_heads),
        ("tensor", shard.tensor, "hidden_size", config.hidden_size),
        ("tensor", shard.tensor, "expert_intermediate_size", config.expert_intermediate_size),
        ("tensor", shard.tensor, "shared_intermediate_size", config.shared_intermediate_size),
        ("tensor", shard.tensor, "dense_intermediate_size", config.dense_intermediate_size),
        ("tensor", shard.tensor, "vocab_size", config.vocab_size),
        ("data x expert", windows, "windows of a batch (--batch)", batch),
        ("seed", shard.seed, "noise seeds (--seeds)", seeds),
    ]
    if config.latent is not None:
        rules.append(("tensor", shard.tensor, "columns of kv_a", config.latent.kv_rank + config.latent.rope_dim))
        rules.append(("tensor", shard.tensor, "query_rank", config.latent.query_rank))
    for axis, parts, what, size in rules:
        if size is not None and size % parts:
            raise InputError(
                f"mesh {describe_mesh(shard)}: {axis} of {parts} parts does not divide the {size} {what}; "
                f"use a divisor of {size}"
            )
    keys, tensor = config.num_kv_heads, shard.tensor
    if config.latent is None and keys % tensor and (tensor % keys or (keys * config.head_dim) % tensor):
        raise InputError(
            f"mesh {describe_mesh(shard)}: tensor of {tensor} parts neither divides the {keys} key heads nor is a "
            "multiple of them"
        )


def parts_of(shard: Shard) -> int:
    """How many devices the mesh has."""
    return math.prod(getattr(shard, axis) for axis in AXES)


def make_mesh(shard: Shard, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over the first devices there are, or over the given ones.

    In a run of several processes every device has to be used: each process holds a part.

    Raises:
        InputError: for more parts than devices, or, with several processes, fewer.
    """
    found, processes = list(jax.devices() if devices is None else devices), jax.process_count()
    size = parts_of(shard)
    if size > len(found):
        many = "is 1 device" if len(found) == 1 else f"are {len(found)} devices"
        raise InputError(
            f"mesh {describe_mesh(shard)} has {size} parts, but there {many}: use a mesh of as many parts, or simulate "
            f"devices (--cpu-devices {size})"
        )
    if devices is None and processes > 1 and size != len(found):
        more = "more processes than parts: " if size < processes else ""
        raise InputError(
            f"mesh {describe_mesh(shard)}: {more}{size} parts for {processes} processes with {len(found)} devices in "
            "all; every device must hold a part: use a mesh of as many parts, or start fewer processes"
        )
    sizes = tuple(getattr(shard, axis) for axis in AXES)
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices is not None:  # described ones, which jax.make_mesh may not know how to order
        return jax.sharding.Mesh(np.array(found[:size]).reshape(sizes), AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=found[:size])


def window_parts(mesh: jax.sharding.Mesh | None) -> int:
    """Into how many parts a mesh cuts a batch of windows."""
    if mesh is None:
        return 1
    shard = shard_of(mesh)
    return shard.data * shard.expert


def shard_of(mesh: jax.sharding.Mesh) -> Shard:
    """The numbers of parts of a mesh; axes that it lacks are not cut.

    Raises:
        InputError: for an axis of another name.
    """
    if unknown := [str(name) for name in mesh.axis_names if name not in AXES]:
        raise InputError(f"mesh axis {unknown[0]!r} is unknown; use {', '.join(AXES)}")
    return Shard(**{str(name): size for name, size in mesh.shape.items()})
