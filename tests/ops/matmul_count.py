"""The matmuls of a function, counted in its jaxpr: loops by their length, whatever the backend makes of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core


def dots(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every matmul of a jaxpr, and how often it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, times
        elif _is_platform_choice(jaxpr, equation):
            yield from dots(equation.params["branches"][-1].jaxpr, times)  # the default, which runs on CPU
            continue
        elif equation.primitive.name == "cond":
            branches = [list(dots(branch.jaxpr, times)) for branch in equation.params["branches"]]
            yield from max(branches, key=len)  # the most that can run
            continue
        elif equation.primitive.name in ("while", "ragged_dot", "ragged_dot_general"):
            raise NotImplementedError(f"{equation.primitive}: its work is not known here")
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = {id(sub): sub for value in equation.params.values() for sub in _jaxprs(value)}
        for sub in inner.values():
            yield from dots(sub, times * length)


def _is_platform_choice(jaxpr: Any, equation: Any) -> bool:
    """Whether it is the branch of `lax.platform_dependent`."""
    chosen = {e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "platform_index"}
    return equation.primitive.name == "cond" and equation.invars[0] in chosen


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, jax.extend.core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def multiplications(function: Callable[..., Any], *arguments: jax.Array) -> int:
    """Products of numbers in all matmuls of a function."""
    total = 0
    for equation, times in dots(jax.make_jaxpr(function)(*arguments).jaxpr):
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        total += times * inner * math.prod(equation.outvars[0].aval.shape)
    return total
