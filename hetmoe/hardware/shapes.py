"""The matrices of each kind of module, in the order in which a token passes them."""

import dataclasses
import functools

from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices

# Matrices of one stage share their input or do not wait for each other; stages wait for the one before.
_STAGES = (
    ("gate", "up"), ("down",),
    ("q", "k", "v", "q_a", "kv_a"), ("q_b", "kv_b"), ("o",),
    ("shared_gate", "shared_up"), ("shared_down",),
    ("ffn_gate", "ffn_up"), ("ffn_down",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """One module (an expert, the attention of a layer, ...).

    Attributes:
        stages: inputs and outputs of the matrices of each stage.
        exchanged: elements per token that a digital unit and chips with these matrices exchange, both ways together.
        crossings: in how many round trips.
    """

    stages: tuple[tuple[tuple[int, int], ...], ...]
    exchanged: int
    crossings: int

    @property
    def weights(self) -> int:
        """In all matrices."""
        return sum(rows * columns for stage in self.stages for rows, columns in stage)

    @property
    def ends(self) -> int:
        """Inputs and outputs of all matrices: what they read and write beside the weights, per token."""
        return sum(rows + columns for stage in self.stages for rows, columns in stage)


@functools.cache
def module_shapes(config: ModelConfig) -> dict[str, ModuleShape]:
    """By the names of a plan's fields, of those that the model has."""
    tree = abstract_params(config)
    by_name: dict[str, tuple[int, int]] = {}
    for stack in (tree.layers, tree.dense_layers):
        if stack is not None:
            by_name |= {name: leaf.shape[-2:] for name, leaf in crossbar_matrices(stack).items()}
    stages: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    for names in _STAGES:
        if held := [name for name in names if name in by_name]:
            stages.setdefault(MATRICES[held[0]].module, []).append(tuple(by_name[name] for name in held))
    stages["lm_head"] = [((config.hidden_size, config.vocab_size),)]
    return {module: _module(module, tuple(found), config.hidden_size) for module, found in stages.items()}


def _module(module: str, stages: tuple[tuple[tuple[int, int], ...], ...], hidden: int) -> ModuleShape:
    if module != "attention":
        # Chips have what is between the matrices of a feed-forward network, as those of 3D-CiM do.
        last = sum(columns for _, columns in stages[-1])
        return ModuleShape(stages=stages, exchanged=hidden + last, crossings=1)
    # What is between projections (norms, attention over the key-value cache) is digital.
    inputs = [hidden if number == 0 else sum(rows for rows, _ in stage) for number, stage in enumerate(stages)]
    outputs = sum(columns for stage in stages for _, columns in stage)
    return ModuleShape(stages=stages, exchanged=sum(inputs) + outputs, crossings=len(stages))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """The key-value cache of a layer, and attention over it.

    Attributes:
        elements: held per position.
        flops: per query token and position.
    """

    elements: float
    flops: float


def cache_shapes(config: ModelConfig) -> tuple[CacheShape, CacheShape]:
    """With digital and with analog projections; they differ for latent attention.

    Digital latent attention keeps latents, and multiplies the projection from latents to keys and values into queries
    and outputs instead (arXiv 2405.04434, 2.1.2). On chips, which cannot do that, keys and values are expanded once and
    kept.
    """
    heads, latent = config.num_heads, config.latent
    if latent is None:
        shape = CacheShape(elements=2.0 * config.num_kv_heads * config.head_dim, flops=4.0 * heads * config.head_dim)
        return shape, shape
    held, expanded = latent.kv_rank + latent.rope_dim, config.head_dim + latent.value_dim
    return (
        CacheShape(elements=float(held), flops=2.0 * heads * (held + latent.kv_rank)),
        CacheShape(elements=float(heads * expanded), flops=2.0 * heads * expanded),
    )
