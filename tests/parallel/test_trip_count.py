"""How often loops run, from text alone; programs that JAX compiles are in `test_program_costs.py`."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hetmoe.parallel.program_costs import ProgramCosts, UnknownLoop, program_costs
from tests.parallel.hlo_module import PARAMETER, module


def loop_text(
    *, step="add(%i, %one)", condition="compare(%i, %limit), direction=LT", start="constant(0)", other="", noted=""
):
    """A loop around a kernel, with a counter and two other numbers that it carries."""
    state = "(s32[], s32[], f32[64]{0})"
    get = [f"%{name} = s32[] get-tuple-element(%s), index={index}" for index, name in enumerate(("i", "n"))]
    constants = ["%one = s32[] constant(1)", "%limit = s32[] constant(7)"]
    sums = ["%i1 = s32[] add(%i, %one)", "%n1 = s32[] add(%one, %n)"]
    lines = "\n  ".join([f"%s = {state} parameter(0)", *get, *constants, *sums])
    others = f"""%condition (s: {state}) -> pred[] {{
  {lines}
  ROOT %c = pred[] {condition}
}}

%body (s: {state}) -> {state} {{
  {lines}
  %a = f32[64]{{0}} get-tuple-element(%s), index=2
  %k = f32[64]{{0}} custom-call(%a), custom_call_target="kernel"
  %next = s32[] {step}
  %m = s32[] {other or "copy(%n)"}
  ROOT %t = {state} tuple(%next, %m, %k)
}}
"""
    return module([
        PARAMETER, "%five = s32[] constant(5)", f"%start = s32[] {start}", f"%t = {state} tuple(%start, %five, %p)",
        f"ROOT %loop = {state} while(%t), condition=%condition, body=%body{noted}",
    ], others=others)  # fmt: skip


@pytest.mark.parametrize(
    ("loop", "times"),
    [
        ({}, 7),
        ({"start": "constant(3)"}, 4),
        ({"start": "constant(9)"}, 0),
        ({"condition": "compare(%i, %limit), direction=LE"}, 8),
        ({"condition": "compare(%limit, %i), direction=GT"}, 7),
        ({"condition": "compare(%limit, %i), direction=GE"}, 8),
        ({"condition": "compare(%i, %limit), direction=NE"}, 7),
        ({"condition": "compare(%i, %n), direction=LT"}, 5),
        ({"condition": "compare(%n, %i), direction=GT"}, 5),
        ({"condition": "compare(%i1, %limit), direction=LT"}, 6),
        ({"condition": "compare(%i, %n1), direction=LT"}, 6),
        ({"start": "parameter(1)", "noted": ', backend_config={"x":[],"known_trip_count":{"n":"9"}}'}, 9),
        ({"start": "constant(12)", "step": "subtract(%i, %one)", "condition": "compare(%i, %n), direction=GT"}, 7),
        ({"start": "constant(12)", "step": "subtract(%i, %one)", "condition": "compare(%i, %n), direction=GE"}, 8),
        ({"start": "constant(-3)", "step": "add(%limit, %i)"}, 2),
        ({"condition": "compare(%i, %limit), direction=NE", "step": "add(%i, %limit)", "start": "constant(-7)"}, 2),
    ],
)
def test_steps_of_loops(loop, times):
    assert program_costs(loop_text(**loop)) == ProgramCosts(opaque_calls={"kernel": times} if times else {})


@pytest.mark.parametrize(
    "loop",
    [
        {"start": "parameter(1)"},
        {"step": "multiply(%i, %one)"},
        {"step": "subtract(%one, %i)"},
        {"step": "add(%i, %n)"},
        {"step": "add(%n, %one)"},
        {"step": "subtract(%i, %one)"},
        {"condition": "compare(%i, %n), direction=LT", "other": "add(%n, %one)"},
        {"condition": "compare(%i, %limit), direction=NE", "start": "constant(8)"},
        {"condition": "compare(%i, %limit), direction=EQ"},
        {"condition": "and(%i, %n)"},
        {"condition": "compare(%one, %limit), direction=LT"},
    ],
)
def test_loops_that_cannot_be_read(loop):
    costs = program_costs(loop_text(**loop))
    assert costs == ProgramCosts(opaque_calls={"kernel": 1}, unknown_loops=(UnknownLoop("loop", 0, 0.0),))


def test_loop_with_unknown_end():
    """Counts once, also in a loop that is known."""

    def inner(n, x, w):
        return lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    def outer(n, x, w):
        return lax.scan(lambda x, _: (inner(n, x, w) @ w, None), x, None, length=5)[0]

    arguments = jnp.int32(3), jnp.ones((32, 64)), jnp.ones((64, 64))
    flops = 2 * 32 * 64 * 64
    costs = program_costs(jax.jit(inner).lower(*arguments).compile().as_text())
    (loop,) = costs.unknown_loops
    assert (costs.flops, loop.flops, loop.sent_bytes) == (flops, flops, 0)
    assert loop.name.startswith("while")
    costs = program_costs(jax.jit(outer).lower(*arguments).compile().as_text())
    assert costs.flops == 5 * 2 * flops
    assert [loop.flops for loop in costs.unknown_loops] == [flops]
