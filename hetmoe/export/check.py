"""Whether an export computes, in a new process, what the model computes in this one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from hetmoe.errors import InputError
from hetmoe.export.fresh_process import fresh_logits
from hetmoe.export.program import ExportedPrograms
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.models.transformer import forward
from hetmoe.ops.dispatch import ANY_LOAD

# Of the largest logit. Both compute the same products in blocks of the same size, so on one machine they are expected
# to agree in every bit; this leaves room for a compiler that orders sums otherwise.
ROUNDING = {4: 1e-5, 2: 2.0**-6}  # by bytes of a weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Logits of the exported program beside those of the jitted forward pass."""

    platform: str
    tokens: list[int]  # batch and length
    largest_difference: float
    largest_logit: float


def compare_here(
    staged: Path, exported: ExportedPrograms, model: Model, analog: dict[str, Any], implementation: str | None
) -> Comparison | None:
    """Runs random tokens through the files of an export in a new process, and through `forward` in this one.

    None if no platform of the export is here, or it is a TPU, which a second process cannot open.

    Raises:
        InputError: if the new process fails or the logits differ by more than `ROUNDING`.
    """
    platform = export.default_export_platform()
    if platform not in exported.programs or platform == "tpu":
        return None
    shape = size_to_compare(exported, model.config)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, shape).astype(np.int32)
    run = jax.jit(forward, static_argnames=("config", "implementation"))
    wanted = np.asarray(run(model.params, tokens, model.config, implementation=implementation, **analog))
    found = fresh_logits(staged, platform, tokens)
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        raise InputError("the exported program gives NaN or infinity where the model does not, or the reverse")
    finite = np.isfinite(wanted)
    difference = float(np.max(np.abs(found - wanted), where=finite, initial=0.0))
    largest = float(np.max(np.abs(wanted), where=finite, initial=0.0))
    limit = ROUNDING[model.params.embed.dtype.itemsize] * largest
    if difference > limit:
        raise InputError(
            f"the exported program's logits differ from the model's by up to {difference:.3g}, more than rounding "
            f"({limit:.3g}): nothing was written; please report this"
        )
    return Comparison(platform=platform, tokens=list(shape), largest_difference=difference, largest_logit=largest)


def size_to_compare(exported: ExportedPrograms, config: ModelConfig) -> tuple[int, int]:
    """Batch and length for which `forward` takes the blocks of experts that the program has (`choose_block_size`)."""
    batch, length = exported.tokens
    fewest = ANY_LOAD // 2 * 4 * config.num_experts // config.experts_per_token + 1
    if length is None:
        length = min(exported.most_length, fewest if batch is None else -(-fewest // batch))
    return (-(-fewest // length) if batch is None else batch), length
