"""A model in memory, and what identifies it."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tokenizers import Tokenizer

from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config_write import config_to_hf
from hetmoe.models.params import Params


@struct.dataclass
class Model:
    """A loaded model: `params` is the only traced field."""

    params: Params
    config: ModelConfig = struct.field(pytree_node=False)
    tokenizer: Tokenizer | None = struct.field(pytree_node=False)
    eos_token_id: int | None = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    bos_token_id: int | None = struct.field(pytree_node=False, default=None)
    mesh: jax.sharding.Mesh | None = struct.field(pytree_node=False, default=None)  # where `params` lie; None: together

    @property
    def start_token_id(self) -> int | None:
        """What every document begins with: the beginning-of-text token or, without one, the end-of-text token."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id


def fingerprint(config: ModelConfig, routers: Any) -> str:
    """Identifies a model by its config and router weights `[moe_layers, hidden, experts]`: what a plan was made for.

    Routers are small, and differ between any two trainings; hashing them costs nothing beside reading all weights.
    They are rounded to bfloat16 first, so that a model keeps its identity whether loaded as float32 or bfloat16.
    """
    digest = hashlib.sha256(json.dumps(config_to_hf(config), sort_keys=True).encode())
    for router in routers:
        digest.update(np.asarray(router).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: Model) -> str:
    """`fingerprint` of a model in memory."""
    return fingerprint(model.config, np.asarray(model.params.layers.moe.router))
