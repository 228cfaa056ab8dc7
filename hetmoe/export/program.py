"""The forward pass of a model as programs of `jax.export`, one per platform."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.interpreters import partial_eval

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.export.arguments import flatten, key_names, unflatten
from hetmoe.models.analog_arguments import check_analog, check_quantized
from hetmoe.models.attention import LONG
from hetmoe.models.model import Model
from hetmoe.models.transformer import forward
from hetmoe.ops.grouped_crossbar.api import check_implementation
from hetmoe.ops.grouped_crossbar.platforms import as_if_on
from hetmoe.placement.plan import Plan

PLATFORMS = ("cpu", "cuda", "tpu")
# What implementation="pallas" becomes on NVIDIA GPU. JAX promises nothing about it between versions: `load_exported`
# wants the one that made it.
_UNSTABLE_CALLS = (export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)


class ExportedPrograms(NamedTuple):
    """Programs `(arguments, tokens) -> logits` and the arguments of all of them."""

    arguments: dict[str, jax.Array]  # in the order in which the programs take them
    programs: dict[str, export.Exported]  # by platform
    tokens: tuple[int | None, int | None]  # batch and length; None = any
    most_length: int


def check_size(implementation: str | None, platforms: Sequence[str], batch: int | None, length: int | None) -> None:
    """Raises InputError for platforms and sizes of `export_forward` that cannot be, whatever the model."""
    if not platforms or len(set(platforms)) != len(platforms):
        raise InputError(f"platforms {', '.join(platforms) or '(none)'}: name at least one, each once")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(f"platform {platform!r} is unknown: use {', '.join(PLATFORMS)}")
    for name, value in (("batch", batch), ("length", length)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if check_implementation(implementation) == "xla":
        return
    if batch is None or length is None:
        raise InputError(f"implementation {implementation}: its kernels need fixed sizes: give batch and length")
    if implementation == "pallas" and "cpu" in platforms:
        raise InputError("implementation pallas runs on TPU and NVIDIA GPU: leave out platform cpu, or use xla")


def export_forward(
    model: Model,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | SeededWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
    implementation: str | None = None,
    platforms: Sequence[str] = PLATFORMS,
    batch: int | None = None,
    length: int | None = None,
) -> ExportedPrograms:
    """Lowers `forward` for platforms that need not be here.

    Everything that the forward pass reads is an argument: weights (packed planes, scales, zeros, places), the plan,
    programmed weights or the seed's key, DAC ranges, the ADC bound, the key of the read noise. So a plan, a chip or a
    magnitude may be changed in the arguments, and programs are small whatever the model. What does not enter the
    result (the noise scale of weights that are stored as programmed) is left out. The names are those of
    `hetmoe.export.arguments`; tokens are int32 `[batch, seq]`, logits float32 `[batch, seq, vocab]`.

    Args:
        model: its weights, on one device.
        plan: this and the other analog arguments are as in `forward`.
        spec: see there.
        programmed: see there.
        calibration: see there.
        read_key: see there. The noise is that of this key in every call: change the argument `read_key`.
        implementation: as in `forward`. `"pallas"` has no version for CPU.
        platforms: of `PLATFORMS`. One program each: kernels for TPU and NVIDIA GPU do not lower together.
        batch: tokens' first axis; None = any (symbolic). With any number of tokens, blocks of experts have 16 rows.
        length: their second axis; None = any up to 512, from where on attention is split by the length.

    Raises:
        InputError: for unknown platforms, sizes that cannot be, a plan with quantized experts on crossbars, analog
            arguments that are incomplete or made for another model.
        NotImplementedError: if the implementation cannot run this, or not on such a platform.
    """
    check_size(implementation, platforms, batch, length)
    config, most = model.config, model.config.max_position_embeddings
    if length is not None and length > most:
        raise InputError(f"length {length} exceeds the model's context of {most}")
    check_analog(config, plan, spec, programmed, calibration, read_key)
    check_quantized(model.params, plan)
    tree = {
        "params": model.params, "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration,
        "read_key": read_key,
    }  # fmt: skip
    arguments, structure = flatten(tree)
    keys, everything = key_names(tree), {name: _shape(value) for name, value in arguments.items()}
    most = min(most, LONG) if length is None else length
    tokens = _tokens(batch, length, most)

    def run(used: dict[str, Any], tokens: jax.Array) -> jax.Array:
        filled = {name: used.get(name, _absent(shape)) for name, shape in everything.items()}
        parts = unflatten(filled, structure, keys)
        return forward(parts.pop("params"), tokens, config, implementation=implementation, **parts)

    # A dict's order in JAX is that of its names, and tokens come last.
    closed = jax.make_jaxpr(run)(everything, tokens)
    _, read = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    shapes = {name: everything[name] for name, is_read in zip(sorted(everything), read[:-1], strict=True) if is_read}
    lower = functools.partial(export.export, jax.jit(run), disabled_checks=_UNSTABLE_CALLS)
    programs: dict[str, export.Exported] = {}
    for name in platforms:
        with as_if_on(name):
            programs[name] = lower(platforms=[name])(shapes, tokens)
    return ExportedPrograms({name: arguments[name] for name in shapes}, programs, (batch, length), most)


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _absent(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Stands for an argument that nothing depends on; takes no memory."""
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)


def _tokens(batch: int | None, length: int | None, most: int) -> jax.ShapeDtypeStruct:
    axes = [str(size or name) for size, name in ((batch, "batch"), (length, "length"))]
    constraints = [f"length <= {most}"] if length is None else []
    return jax.ShapeDtypeStruct(export.symbolic_shape(", ".join(axes), constraints=constraints), jnp.int32)
