"""Runs a function's version for the platform that it is lowered for."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from hetmoe.ops.grouped_crossbar.block_sizes import Platform

PLATFORMS: tuple[Platform, ...] = ("tpu", "cuda")


ELSEWHERE = (
    "implementation='pallas' runs on TPU and NVIDIA GPU; on other devices use 'xla', or, to check the kernels, "
    "'interpret_tpu' or 'interpret_cuda'"
)


def on_platform(interpret: Platform | None, run: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
    """`run(platform, *arguments)`, whose results are as `outputs` (`jax.ShapeDtypeStruct`).

    `interpret` names a platform whose version is run anywhere; else other platforms refuse to lower, as does one whose
    version raises NotImplementedError. All versions are traced, whatever the device.
    """
    if interpret is not None:
        return run(interpret, *arguments)

    def refuse(reason: str, *arguments: Any) -> Any:
        operand = jax.tree.leaves(arguments)[0]
        return jax.tree.map(
            lambda out: _refused.bind(operand, shape=out.shape, dtype=out.dtype, reason=reason), outputs
        )

    def attempt(platform: Platform, *arguments: Any) -> Any:
        try:
            return run(platform, *arguments)
        except NotImplementedError as error:
            return refuse(str(error), *arguments)

    branches = {name: functools.partial(attempt, name) for name in PLATFORMS}
    return jax.lax.platform_dependent(*arguments, **branches, default=functools.partial(refuse, ELSEWHERE))


def as_if_on(platform: str) -> contextlib.AbstractContextManager[Any]:
    """While kernels are traced and lowered for a platform whose device need not be here.

    From jax 0.11 on, Triton kernels do not lower where neither a GPU is nor one is named.
    """
    if platform != "cuda":
        return contextlib.nullcontext()
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu))


def _raise(*_: Any, reason: str, **__: Any) -> Any:
    raise NotImplementedError(reason)


_refused = Primitive("pallas_kernel_without_a_device")
_refused.def_abstract_eval(lambda _, *, shape, dtype, **_reason: ShapedArray(shape, dtype))
mlir.register_lowering(_refused, _raise)
