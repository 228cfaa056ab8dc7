"""Whether the analog arguments of a forward pass are complete and belong together."""

import jax
import numpy as np
from jax.core import Tracer

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedMatrix, ProgrammedWeights, SeededWeights
from hetmoe.analog.random import require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.params import Params
from hetmoe.placement.plan import Plan, check_plan
from hetmoe.quantize.mixed import MixedMatrix, unquantized


def check_analog(
    config: ModelConfig,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | SeededWeights | None,
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
    if not isinstance(programmed, ProgrammedWeights | SeededWeights):
        raise InputError(
            f"programmed is a {type(programmed).__name__}: make it with program(key, ...) or seeded_weights(key, ...)"
        )
    check_plan(plan, config)
    has_dense = programmed.dense if isinstance(programmed, SeededWeights) else programmed.lm_head is not None
    if plan.switches_dense and not has_dense:
        raise InputError(
            "the plan puts dense modules on crossbars, but they are not programmed: make `programmed` with dense=True"
        )
    if isinstance(programmed, ProgrammedWeights):
        _check_shapes(config, spec, programmed)
    if calibration is not None:
        _check_ranges(abstract_params(config), calibration, spec.options.tile_rows)
    if (spec.read_noise is None) != (read_key is None):
        raise InputError("spec.read_noise and read_key go together: give both or neither")
    if read_key is not None:
        require_key(read_key)


def check_quantized(
    params: Params, plan: Plan | None, programmed: ProgrammedWeights | SeededWeights | None = None
) -> None:
    """Checks what a model with quantized experts is given.

    Raises:
        InputError: if a plan whose values are known puts a quantized expert on crossbars. (If they are not known, in
            `jax.jit`, the results of such experts are NaN.)
        NotImplementedError: for programmed weights that are not stored.
    """
    gate = params.layers.moe.experts.gate
    if plan is None or not isinstance(gate, MixedMatrix):
        return
    if isinstance(programmed, SeededWeights):
        raise NotImplementedError("beside quantized experts, programmed weights must be stored: use program()")
    if isinstance(programmed, ProgrammedWeights) and not isinstance(programmed.layers["gate"].w, MixedMatrix):
        raise InputError("programmed weights are of a model without quantized experts: program this model's own params")
    if isinstance(plan.experts, Tracer) or isinstance(gate.places.pool, Tracer):
        return
    wrong = np.argwhere(np.asarray(plan.experts) & ~np.asarray(unquantized(gate)[1]))
    if len(wrong):
        layer, expert = wrong[0].tolist()
        raise InputError(
            f"the plan puts {len(wrong)} quantized experts on crossbars, the first is expert {expert} of layer {layer} "
            "(of those with experts): keep them digital, or load weights that are not quantized"
        )


def _check_shapes(config: ModelConfig, spec: AnalogSpec, programmed: ProgrammedWeights) -> None:
    leaves, options = abstract_params(config), spec.options

    def tiles(rows: int) -> int:
        return len(row_blocks(rows, options.tile_rows))

    def check(name: str, matrix: ProgrammedMatrix, shape: tuple[int, ...]) -> None:
        *stack, rows, columns = shape
        maxima = (*stack, tiles(rows), columns if options.bound_axis == "column" else 1)
        if matrix.w.shape != shape or matrix.weight_max.shape != maxima:
            raise InputError(
                f"programmed {name} has weights {list(matrix.w.shape)} and maxima {list(matrix.weight_max.shape)}; "
                f"this model and spec need {list(shape)} and {list(maxima)}: program it again with this spec"
            )

    dense = programmed.lm_head is not None
    stacks = (
        (leaves.layers, programmed.layers, "layers"),
        (leaves.dense_layers, programmed.dense_layers, "dense_layers"),
    )
    for layer, found, kind in stacks:
        wanted = {} if layer is None else crossbar_matrices(layer, dense=dense)
        if wanted.keys() != found.keys():
            raise InputError(
                f"programmed {kind} hold {', '.join(found) or 'nothing'}, this model needs {', '.join(wanted)}: "
                "program it again"
            )
        for name, leaf in wanted.items():
            check(name, found[name], leaf.shape)
    if programmed.lm_head is not None:
        check("lm_head", programmed.lm_head, (config.hidden_size, config.vocab_size))


def _check_ranges(leaves: Params, calibration: Calibration, tile_rows: int) -> None:
    if calibration.tile_rows != tile_rows:
        raise InputError(
            f"calibration was made for tile_rows={calibration.tile_rows}, the spec has {tile_rows}: calibrate again"
        )
    for layer, ranges in ((leaves.layers, calibration.layers), (leaves.dense_layers, calibration.dense_layers)):
        wanted: dict[str, tuple[int, ...]] = {}
        for name, leaf in ({} if layer is None else crossbar_matrices(layer)).items():
            *stack, rows, _ = leaf.shape
            wanted[MATRICES[name].site] = (*stack, len(row_blocks(rows, tile_rows)))
        found = {site: values.shape for site, values in ranges.items()}
        if wanted != found:
            wrong = next(site for site in wanted | found if wanted.get(site) != found.get(site))
            shapes = (list(s) if s is not None else "nothing" for s in (found.get(wrong), wanted.get(wrong)))
            raise InputError("calibration {} has shape {}, this model needs {}: calibrate again".format(wrong, *shapes))
