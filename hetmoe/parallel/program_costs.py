"""What a compiled program computes and sends, per device, read from its text.

XLA's own `compiled.cost_analysis()` counts the body of a loop once however often it runs, and so a model whose layers
are scanned as one layer; it says nothing of communication between devices either. Here loops count as often as they
run.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

from hetmoe.parallel.hlo_text import Computation, Instruction, Module, parse_hlo
from hetmoe.parallel.matmul_flops import matmul_flops
from hetmoe.parallel.trip_count import trip_count

Collective = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"
]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)

# Instructions of these kinds run what they call once; what reductions and sorts call per element holds no matmuls.
_CALLS = ("call", "fusion", "async-start", "call-start", "fusion-start")
# Custom calls that multiply nothing.
_NO_PRODUCTS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "PrepareAsyncCallDone", "PrepareAsyncCallStart", "TopK",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of all collectives of a kind, per device.

    Attributes:
        count: how often one runs.
        operand_bytes: that they are given.
        result_bytes: that they give.
        sent_bytes: that the device sends to others in the usual algorithms, with groups of g devices: on a ring,
            (g - 1) / g of the result of an all-gather, twice (g - 1) / g of the operand of an all-reduce, once that of
            a reduce-scatter; directly, (g - 1) / g of the operand of an all-to-all, and all of that of a permutation.
            (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005.) What a
            ragged all-to-all sends depends on its input: this is as if the whole operand went out evenly.
    """

    count: int
    operand_bytes: int
    result_bytes: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class UnknownLoop:
    """A loop whose number of steps the text does not say; it counts as if it had one.

    Attributes:
        name: of the instruction.
        flops: of one step.
        sent_bytes: of one step.
    """

    name: str
    flops: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCosts:
    """Per device, of one run of the program.

    Attributes:
        flops: of matrix products; a multiply-add is 2.
        collectives: by kind; kinds that do not occur are left out.
        unknown_loops: of which one step is counted.
        opaque_calls: how often each `custom_call_target` runs that is not understood, such as kernels written by hand
            ("tpu_custom_call"): its FLOPs are not counted.
    """

    flops: int = 0
    collectives: Mapping[Collective, Traffic] = dataclasses.field(default_factory=dict)
    unknown_loops: tuple[UnknownLoop, ...] = ()
    opaque_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sent_bytes(self) -> float:
        """Of all collectives."""
        return math.fsum(traffic.sent_bytes for traffic in self.collectives.values())


def program_costs(text: str) -> ProgramCosts:
    """Costs of a program from the text of its compiled module.

    Counted are matrix products and collectives, wherever they are: in fusions, calls, loops as often as these run, and
    of conditionals in the branch with most FLOPs (among equals with most bytes sent). Asynchronous collectives count
    where they start. Not counted are element-wise arithmetic, and sending and receiving between single devices other
    than by permutations. A ragged matmul counts as what it was compiled to: on TPUs usually a kernel for it, on CPUs a
    dense product with every group. CPUs multiply and add bfloat16 in float32, and so may send twice as much.

    Args:
        text: `jax.stages.Compiled.as_text()`, of CPUs, GPUs or TPUs.

    Raises:
        InputError: if the text is not that of a module.
    """
    module = parse_hlo(text)
    return _Costs(module).of(module.entry)


class _Costs:
    """Costs of the computations of a module, each looked at once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._known: dict[str, ProgramCosts] = {}
        # Of collectives that TPUs start in one fusion, continue beside the matmuls of others, and end in another: all
        # of these fusions hold the collective.
        self._continued = {
            _channel(where.operand(instruction, 0))
            for where in module.computations.values()
            for instruction in where.instructions.values()
            if _target(instruction) == "AsyncCollectiveStart"
        }

    def of(self, name: str, *, fused: bool = False) -> ProgramCosts:
        if name not in self._known:
            where = self._module.computations[name]
            parts = [self._instruction(where, instruction, fused) for instruction in where.instructions.values()]
            self._known[name] = _total((1, part) for part in parts)
        return self._known[name]

    def _instruction(self, where: Computation, instruction: Instruction, fused: bool) -> ProgramCosts:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(where, instruction)
        if opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            return max(map(self.of, names), key=lambda branch: (branch.flops, branch.sent_bytes))
        if opcode in _CALLS:
            names = instruction.called("calls", "to_apply")
            return _total((1, self.of(name, fused=opcode == "fusion")) for name in names)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._collective(where, instruction, kind, fused)
        flops = matmul_flops(where, instruction)
        if flops is None:
            target = _target(instruction)
            return ProgramCosts() if target in _NO_PRODUCTS else ProgramCosts(opaque_calls={target: 1})
        return ProgramCosts(flops=flops)

    def _loop(self, where: Computation, loop: Instruction) -> ProgramCosts:
        body = self.of(loop.called("body")[0])
        times = trip_count(self._module, where, loop)
        if times is not None:
            return _total([(times, body)] if times else [])
        return _total(
            [
                (1, body),
                (1, ProgramCosts(unknown_loops=(UnknownLoop(loop.name, body.flops, body.sent_bytes),))),
            ]
        )

    def _collective(self, where: Computation, instruction: Instruction, kind: Collective, fused: bool) -> ProgramCosts:
        if fused and where.name.startswith("all-reduce-scatter"):  # TPUs' reduce-scatter, written as what it equals
            kind = "reduce-scatter"
        elif fused and _channel(instruction) in self._continued and not _starts(where, instruction):
            return ProgramCosts()
        shapes = where.operand_shapes(instruction)
        if kind == "ragged-all-to-all":  # behind the data come the buffer for the result, offsets and sizes
            given, gives = shapes[0].bytes, shapes[1].bytes
        else:
            given = gives = sum(shape.bytes for shape in shapes)
        group = _group_size(self._module, instruction)
        share = (group - 1) / group
        if kind == "all-gather":
            gives = given * group
        elif kind == "reduce-scatter":
            gives = given // group
        sent: dict[Collective, Callable[[], float]] = {
            "all-gather": lambda: share * gives,
            "all-reduce": lambda: 2 * share * given,
            "collective-permute": lambda: float(given),
        }
        traffic = Traffic(1, given, gives, sent.get(kind, lambda: share * given)())
        return ProgramCosts(collectives={kind: traffic})


def _total(parts: Iterable[tuple[int, ProgramCosts]]) -> ProgramCosts:
    """Of parts that run a number of times each."""
    flops = 0
    collectives: dict[Collective, Traffic] = {}
    loops: dict[UnknownLoop, None] = {}
    opaque: dict[str, int] = {}
    for times, part in parts:
        flops += times * part.flops
        for kind, more in part.collectives.items():
            so_far = collectives.get(kind, Traffic(0, 0, 0, 0.0))
            collectives[kind] = Traffic(*(
                old + times * new
                for old, new in zip(dataclasses.astuple(so_far), dataclasses.astuple(more), strict=True)
            ))  # fmt: skip
        loops |= dict.fromkeys(part.unknown_loops)
        for target, count in part.opaque_calls.items():
            opaque[target] = opaque.get(target, 0) + times * count
    return ProgramCosts(flops=flops, collectives=collectives, unknown_loops=tuple(loops), opaque_calls=opaque)


def _target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"') or ""


def _channel(instruction: Instruction) -> str | None:
    return instruction.attribute(r"channel_id=(\d+)")


def _starts(where: Computation, collective: Instruction) -> bool:
    return any(
        collective.name in instruction.operands
        for instruction in where.instructions.values()
        if _target(instruction) == "AsyncCollectiveStart"
    )


def _group_size(module: Module, instruction: Instruction) -> int:
    """Devices that take part in one run of a collective; a permutation has no groups.

    XLA writes groups as lists, {{0,1},{2,3}}; as a reshaped range, [groups,size]<=[...]T(...); or by the axes of a
    mesh, mesh['a'=2,'b'=4] {'a'}, where a part of an axis is 'b':(before)size.
    """
    text = instruction.attribute(r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[\d,]*\]<=|mesh\[[^\]]*\] \{[^}]*\})")
    if text is None or text == "{}":
        return module.devices
    if text.startswith("{"):
        return max(group.count(",") + 1 for group in re.findall(r"\{([\d,]+)\}", text))
    if text.startswith("["):
        return int(text[1 : text.index("]")].split(",")[1])
    mesh, _, axes = text.partition("] ")
    sizes = dict(re.findall(r"('[^']*')=(\d+)", mesh))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", axes))
