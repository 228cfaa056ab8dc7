"""How many parameters a plan keeps digital of those that could be on crossbars."""

import math

import numpy as np

from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.params import DenseLayer, Layer
from hetmoe.placement.plan import Plan, plan_shapes


def switch_sizes(config: ModelConfig) -> dict[str, int]:
    """Parameters behind one switch of each field of a plan: one expert, one layer's attention, the LM head, ..."""
    tree = abstract_params(config)
    sizes = dict.fromkeys(plan_shapes(config), 0)
    attention_seen = False
    stacks: list[Layer | DenseLayer] = [s for s in (tree.layers, tree.dense_layers) if s is not None]
    for stack in stacks:
        for name, leaf in crossbar_matrices(stack).items():
            module = MATRICES[name].module
            if module == "attention" and attention_seen:
                continue  # the same in layers with and without experts
            sizes[module] += math.prod(leaf.shape[-2:])
        attention_seen = True
    sizes["lm_head"] = config.vocab_size * config.hidden_size  # tied to the embedding or not, it is a crossbar's
    return sizes


def digital_parameters(plan: Plan, config: ModelConfig) -> tuple[int, int]:
    """(parameters that the plan keeps digital, all of them) of modules that could be on crossbars."""
    sizes, shapes = switch_sizes(config), plan_shapes(config)
    digital = total = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        analog = getattr(plan, name)
        total += sizes[name] * count
        digital += sizes[name] * (count if analog is None else count - int(np.sum(np.asarray(analog))))
    return digital, total
