"""How often a loop of a compiled program runs.

XLA notes the number on loops that it has analysed (`known_trip_count`), but the text of TPU programs does not hold it.
There it is read as XLA does: from a counter that starts at a constant, grows by a constant, and is compared with one.
"""

import dataclasses
import re
from collections.abc import Sequence

from hetmoe.parallel.hlo_text import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")  # as their operand, for a scalar
_FOLLOWED = (*_SAME, "get-tuple-element", "fusion", "add", "subtract")
_SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A whole number: an element of the loop's state, or 0 if None, plus an offset."""

    element: int | None
    offset: int


@dataclasses.dataclass(frozen=True)
class _State:
    """The tuple that a loop carries."""


_Value = _Scalar | _State | None  # None: anything else


def trip_count(module: Module, where: Computation, loop: Instruction) -> int | None:
    """The number of times that the body of a `while` runs; None if it cannot be read.

    Args:
        module: the program.
        where: the computation that the loop is in.
        loop: the instruction.
    """
    noted = loop.attribute(r'backend_config=.*"known_trip_count":\{"n":"(\d+)"')
    if noted is not None:
        return int(noted)
    condition = module.computations[loop.called("condition")[0]]
    body = module.computations[loop.called("body")[0]]
    compared = _comparison(module, condition, condition.root, [_State()])
    if compared is None:
        return None
    direction, counter, limit = compared
    if _constant(module, where, loop, body, counter) is not None:
        direction, counter, limit = _SWAPPED.get(direction, ""), limit, counter
    stop = _constant(module, where, loop, body, limit)
    start = _initial(module, where, loop, counter.element)
    step = _update(module, body, counter.element)
    if stop is None or start is None or step is None or step.element != counter.element:
        return None
    return _steps(direction, start + counter.offset, stop, step.offset)


def _steps(direction: str, start: int, stop: int, step: int) -> int | None:
    """Of a counter, until its comparison with `stop` fails."""
    if direction in ("GT", "GE"):
        direction, start, stop, step = _SWAPPED[direction], -start, -stop, -step
    if direction == "LE":
        direction, stop = "LT", stop + 1
    if direction == "LT" and (step > 0 or start >= stop):
        return max(0, -(-(stop - start) // step)) if step > 0 else 0
    if direction == "NE" and step and (stop - start) % step == 0 and (stop - start) // step >= 0:
        return (stop - start) // step
    return None


def _comparison(
    module: Module, inside: Computation, name: str, arguments: Sequence[_Value]
) -> tuple[str, _Scalar, _Scalar] | None:
    instruction = inside.instructions[name]
    if instruction.opcode == "fusion":
        passed = [_value(module, inside, operand, arguments) for operand in instruction.operands]
        callee = module.computations[instruction.called("calls")[0]]
        return _comparison(module, callee, callee.root, passed)
    if instruction.opcode != "compare":
        return None
    left, right = (_value(module, inside, operand, arguments) for operand in instruction.operands)
    direction = instruction.attribute(r"direction=(\w+)")
    if not isinstance(left, _Scalar) or not isinstance(right, _Scalar) or direction is None:
        return None
    return direction, left, right


def _constant(module: Module, where: Computation, loop: Instruction, body: Computation, value: _Scalar) -> int | None:
    """A scalar that no step of the loop changes."""
    if value.element is None:
        return value.offset
    if _update(module, body, value.element) != _Scalar(value.element, 0):
        return None
    start = _initial(module, where, loop, value.element)
    return None if start is None else start + value.offset


def _initial(module: Module, where: Computation, loop: Instruction, element: int | None) -> int | None:
    """An element of the state before the first step."""
    state = where.operand(loop, 0)
    if element is None or state.opcode != "tuple":
        return None
    value = _value(module, where, state.operands[element], ())
    return value.offset if isinstance(value, _Scalar) else None


def _update(module: Module, body: Computation, element: int | None) -> _Scalar | None:
    """An element of the state after a step."""
    root = body.instructions[body.root]
    if element is None or root.opcode != "tuple":
        return None
    value = _value(module, body, root.operands[element], [_State()])
    return value if isinstance(value, _Scalar) else None


def _value(module: Module, inside: Computation, name: str, arguments: Sequence[_Value]) -> _Value:
    """What an instruction gives; `arguments` are those of its computation, none if they are not known."""
    instruction = inside.instructions[name]
    opcode = instruction.opcode
    if opcode == "parameter" and arguments:
        return arguments[int(instruction.argument)]
    if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return _Scalar(None, int(instruction.argument))
    if opcode not in _FOLLOWED:
        return None
    operands = [_value(module, inside, operand, arguments) for operand in instruction.operands]
    if opcode == "fusion":
        callee = module.computations[instruction.called("calls")[0]]
        return _value(module, callee, callee.root, operands)
    if opcode == "get-tuple-element":
        index = instruction.attribute(r"index=(\d+)")
        return _Scalar(int(index), 0) if index is not None and isinstance(operands[0], _State) else None
    return operands[0] if opcode in _SAME else _sum(operands[0], operands[1], 1 if opcode == "add" else -1)


def _sum(left: _Value, right: _Value, sign: int) -> _Scalar | None:
    if not isinstance(left, _Scalar) or not isinstance(right, _Scalar):
        return None
    if right.element is None:
        return _Scalar(left.element, left.offset + sign * right.offset)
    if left.element is None and sign == 1:
        return _Scalar(right.element, left.offset + right.offset)
    return None
