"""Runs a function's version for the platform that it is lowered for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from hetmoe.ops.grouped_crossbar.block_sizes import Platform

PLATFORMS: tuple[Platform, ...] = ("tpu", "cuda")


def on_platform(interpret: Platform | None, run: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
    """`run(platform, *arguments)`, whose results are as `outputs` (`jax.ShapeDtypeStruct`).

    `interpret` names a platform whose version is run anywhere; else other platforms refuse to lower.
    """
    if interpret is not None:
        return run(interpret, *arguments)

    def refuse(*arguments: Any) -> Any:
        operand = jax.tree.leaves(arguments)[0]
        return jax.tree.map(lambda out: _refused.bind(operand, shape=out.shape, dtype=out.dtype), outputs)

    branches = {name: functools.partial(run, name) for name in PLATFORMS}
    return jax.lax.platform_dependent(*arguments, **branches, default=refuse)


def _raise(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "implementation='pallas' runs on TPU and NVIDIA GPU; on other devices use 'xla', or, to check the kernels, "
        "'interpret_tpu' or 'interpret_cuda'"
    )


_refused = Primitive("pallas_kernel_without_a_device")
_refused.def_abstract_eval(lambda _, *, shape, dtype: ShapedArray(shape, dtype))
mlir.register_lowering(_refused, _raise)
