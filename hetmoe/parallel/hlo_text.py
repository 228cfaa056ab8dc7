"""Reading the text of a compiled HLO module, `jax.stages.Compiled.as_text()`, into instructions.

The text is XLA's own (`HloModule::ToString`): computations of one instruction a line,

    ROOT %name = f32[8,128]{1,0} opcode(%operand, ...), attribute=value, ...

No more of it is understood than its costs need: shapes, operands, and which computations an instruction calls.
"""

import dataclasses
import functools
import math
import re

from hetmoe.errors import InputError

_HEADER = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" ?(?P<opcode>[a-z][\w-]*)\(")
_SHAPE = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an array."""

    dtype: str  # XLA's name, such as "bf16"
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiled layouts; types below 8 bits are packed."""
        bits = {"pred": 8, "token": 0}.get(self.dtype)
        if bits is None:
            width = re.search(r"\d+", self.dtype)  # f32, bf16, f8e4m3fn, s4, and c64 of two f32
            if width is None:
                raise InputError(f"HLO text: type {self.dtype!r} is not known")
            bits = int(width.group())
        return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its type as written, of an array or a tuple of them
    opcode: str
    argument: str  # what stands between the parentheses: operands, a constant's value, a parameter's number
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names."""
        return tuple(re.findall(r"%([^\s,()]+)", self.argument))

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the result; of a tuple, of all its arrays."""
        found = _SHAPE.finditer(self.result)
        return tuple(Shape(m["dtype"], tuple(int(d.lstrip("<=")) for d in m["dims"].split(",") if d)) for m in found)

    def attribute(self, pattern: str) -> str | None:
        """The first group of `, PATTERN` in the attributes; None if it is not there."""
        found = re.search(", " + pattern, self.attributes)
        return None if found is None else found.group(1)

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations under these attributes."""
        found = [self.attribute(rf"{attribute}=(\{{[^}}]*\}}|%[^\s,]+)") for attribute in attributes]
        return [name for text in found if text is not None for name in re.findall(r"%([^\s,{}]+)", text)]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module."""

    name: str
    instructions: dict[str, Instruction]  # by name, in the order of the schedule
    root: str

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """The instruction that gives an operand."""
        return self.instructions[instruction.operands[number]]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Of all operands."""
        return [shape for name in instruction.operands for shape in self.instructions[name].shapes]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, as each device runs it."""

    computations: dict[str, Computation]
    entry: str
    devices: int  # that run it


def parse_hlo(text: str) -> Module:
    """Reads the text of a module.

    Raises:
        InputError: if it is not one.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = None, None, None
    instructions: dict[str, Instruction] = {}
    lines = text.splitlines()
    for line in lines:
        if name is None:
            if (header := _HEADER.match(line)) is not None:
                name, root, instructions = header["name"], None, {}
                entry = name if header["entry"] else entry
        elif line.startswith("}"):
            if root is None:
                raise InputError(f"HLO text: computation {name!r} has no root")
            computations[name] = Computation(name, instructions, root)
            name = None
        elif (found := _INSTRUCTION.match(line)) is not None:
            instructions[found["name"]] = _instruction(found["name"], found["rest"])
            root = found["name"] if found["root"] else root
    if entry is None or not lines[0].startswith("HloModule "):
        raise InputError("HLO text: expected what jax.stages.Compiled.as_text() returns, with an ENTRY computation")
    counts = (re.search(rf"\b{count}=(\d+)", lines[0]) for count in ("num_partitions", "replica_count"))
    return Module(computations, entry, math.prod(int(count.group(1)) for count in counts if count is not None))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise InputError(f"HLO text: instruction {name!r} has no opcode: {rest[:100]}")
    close = _closing(rest, opcode.end() - 1)
    return Instruction(name, rest[:end], opcode["opcode"], rest[opcode.end() : close - 1], rest[close:])


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    raise InputError(f"HLO text: a parenthesis is not closed: {text[:100]}")
