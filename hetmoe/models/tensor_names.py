"""How each family names its tensors in a checkpoint."""

import dataclasses

from hetmoe.models.config import Family


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Parts of checkpoint keys: the feed-forward block of a layer, the matrices of a SwiGLU, the shared experts."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


_SPECIAL: dict[Family, TensorNames] = {
    "mixtral": TensorNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "qwen2_moe": TensorNames(shared="shared_expert"),
}


def names_of(family: Family) -> TensorNames:
    """The names that the hub's checkpoints of a family use."""
    return _SPECIAL.get(family, TensorNames())
