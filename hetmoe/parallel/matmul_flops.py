"""FLOPs of one instruction of a compiled program, if it is a matrix product in any of the forms that XLA gives them."""

import functools
import math
import re

import numpy as np

from hetmoe.parallel.hlo_text import Computation, Instruction

_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
_ONEDNN = "__onednn$matmul"
_TPU_KERNEL = "tpu_custom_call"


def matmul_flops(inside: Computation, instruction: Instruction) -> int | None:
    """2 FLOP per multiply-add of a product, 0 of anything else that is known; None of an unknown `custom-call`.

    Products are `dot`; `convolution`, as which TPUs write them (and a batch of them as one dilated along the batch, of
    which only positions that meet an element count, as in XLA's `HloCostAnalysis`); products with a vector that TPUs
    multiply and sum element by element; library calls of GPUs and CPUs; and kernels of TPUs, for which what their
    author has estimated is taken (for `jax.lax.ragged_dot` XLA's: every row times the matrix of one group).

    Args:
        inside: the computation of the instruction.
        instruction: one that calls no other computation (what it calls is not counted).
    """
    if instruction.opcode == "dot":
        return _flops(inside, instruction, _axes(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")))
    if instruction.opcode == "convolution":
        return _convolution(inside, instruction)
    if instruction.opcode == "reduce":
        return _summed_product(inside, instruction)
    if instruction.opcode == "custom-call":
        return _library_call(inside, instruction)
    return 0


def _axes(text: str | None) -> tuple[int, ...]:
    return tuple(int(axis) for axis in re.findall(r"\d+", text or ""))


def _flops(inside: Computation, instruction: Instruction, contracted: tuple[int, ...]) -> int:
    left = inside.operand(instruction, 0).shapes[0]
    return 2 * instruction.shapes[0].size * math.prod(left.dims[axis] for axis in contracted)


def _library_call(inside: Computation, instruction: Instruction) -> int | None:
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    if target in _GEMMS:
        contracted = instruction.attribute(r'backend_config=.*"lhs_contracting_dimensions":\[([^\]]*)\]')
        return None if contracted is None else _flops(inside, instruction, _axes(contracted))
    if target == _ONEDNN:
        rank = len(inside.operand(instruction, 0).shapes[0].dims)
        transposed = instruction.attribute(r'backend_config=.*"transpose_a":(true)') is not None
        return _flops(inside, instruction, (rank - 2 if transposed else rank - 1,))
    if target == _TPU_KERNEL:
        if instruction.name.startswith("ragged-dot-metadata"):  # finds out which rows are of which group
            return 0
        estimate = instruction.attribute(r'backend_config=.*"cost_estimate":\{"flops":"(\d+)"')
        return None if estimate is None else int(estimate)
    return None


def _summed_product(inside: Computation, instruction: Instruction) -> int:
    product = inside.operand(instruction, 0)
    name = instruction.attribute(r'metadata=\{op_name="([^"]*)"') or ""
    return 2 * product.shapes[0].size if product.opcode == "multiply" and name.endswith("dot_general") else 0


def _convolution(inside: Computation, instruction: Instruction) -> int:
    labels = re.split("_|->", instruction.attribute(r"dim_labels=([\w>-]+)") or "")
    shapes = (inside.operand(instruction, 0), inside.operand(instruction, 1), instruction)
    sizes, kernel_sizes, output = (
        dict(zip(label, of.shapes[0].dims, strict=True)) for label, of in zip(labels, shapes, strict=True)
    )
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    taps = 1
    for label in filter(str.isdecimal, output):
        number = int(label)
        taps *= _valid_taps(
            sizes[label], kernel_sizes[label], output[label],
            stride=_of_window(window, "stride", number, "1"),
            pad=_of_window(window, "pad", number, "0_0"),
            dilation=_of_window(window, "lhs_dilate", number, "1"),
            kernel_dilation=_of_window(window, "rhs_dilate", number, "1"),
        )  # fmt: skip
    return 2 * output["b"] * output["f"] * kernel_sizes["i"] * taps


def _of_window(window: str, name: str, number: int, default: str) -> int:
    """A setting along one spatial axis; of padding the one in front."""
    found = re.search(rf"\b{name}=(\S+)", window)
    text = default if found is None else found.group(1).split("x")[number]
    return int(text.split("_")[0])


@functools.cache
def _valid_taps(
    size: int, kernel: int, output: int, *, stride: int, pad: int, dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a tap of the kernel that meet an element, and neither padding nor a hole of dilation."""
    starts = np.arange(output) * stride - pad
    taps = 0
    for tap in range(kernel):
        positions = starts + tap * kernel_dilation
        met = (positions >= 0) & (positions <= (size - 1) * dilation) & (positions % dilation == 0)
        taps += int(np.count_nonzero(met))
    return taps
