"""Whether the analog arguments of a forward pass are complete and belong together."""

import jax

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.random import require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import abstract_params
from hetmoe.placement.plan import Plan, check_plan


def check_analog(
    config: ModelConfig,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | None,
    calibration: Calibration | None,
    read_key: jax.Array | None,
) -> None:
    """Raises InputError unless the analog arguments of `forward` are complete and fit together."""
    given = {"plan": plan, "spec": spec, "programmed": programmed}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if calibration is not None or read_key is not None:
            raise InputError("calibration and read_key are used on the analog path only: give plan, spec, programmed")
        return
    if plan is None or spec is None or programmed is None:
        raise InputError(f"the analog path needs plan, spec and programmed together; missing: {', '.join(missing)}")
    check_plan(plan, config)
    if (plan.attention is not None or plan.lm_head is not None) and programmed.lm_head is None:
        raise InputError("the plan puts dense modules on crossbars, but they are not programmed: program(dense=True)")
    _check_shapes(config, spec, programmed, calibration)
    if (spec.read_noise is None) != (read_key is None):
        raise InputError("spec.read_noise and read_key go together: give both or neither")
    if read_key is not None:
        require_key(read_key)


def _check_shapes(
    config: ModelConfig, spec: AnalogSpec, programmed: ProgrammedWeights, calibration: Calibration | None
) -> None:
    leaves, options = abstract_params(config), spec.options

    def tiles(rows: int) -> int:
        return len(row_blocks(rows, options.tile_rows))

    wanted = {name: getattr(leaves.layers, name).shape for name in ("gate", "up", "down", "q", "k", "v", "o")}
    found = {name: getattr(programmed.layers, name) for name in wanted} | {"lm_head": programmed.lm_head}
    wanted["lm_head"] = (config.hidden_size, config.vocab_size)
    for name, matrix in found.items():
        if matrix is None:
            continue
        *stack, rows, columns = wanted[name]
        maxima = (*stack, tiles(rows), columns if options.bound_axis == "column" else 1)
        if matrix.w.shape != wanted[name] or matrix.weight_max.shape != maxima:
            raise InputError(
                f"programmed {name} has weights {list(matrix.w.shape)} and maxima {list(matrix.weight_max.shape)}; "
                f"this model and spec need {list(wanted[name])} and {list(maxima)}: program it again with this spec"
            )
    if calibration is None:
        return
    if calibration.tile_rows != options.tile_rows:
        raise InputError(
            f"calibration was made for tile_rows={calibration.tile_rows}, the spec has {options.tile_rows}: "
            "calibrate again"
        )
    layers, experts = config.num_layers, config.num_experts
    shapes = {
        "experts_in": (layers, experts, tiles(config.hidden_size)),
        "experts_mid": (layers, experts, tiles(config.expert_intermediate_size)),
        "attention_in": (layers, tiles(config.hidden_size)),
        "attention_out": (layers, tiles(config.num_heads * config.head_dim)),
    }
    for name, shape in shapes.items():
        ranges = getattr(calibration.layers, name)
        if ranges.shape != shape:
            raise InputError(f"calibration {name} has shape {list(ranges.shape)}, this model needs {list(shape)}")
