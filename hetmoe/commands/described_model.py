"""A model of which a command needs the shapes, and weights only for what depends on them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, model_directory, model_name, open_checkpoint, open_config, parse_dtype
from hetmoe.commands.one_placement import PlacementOptions
from hetmoe.errors import InputError
from hetmoe.hardware.deployment import Deployment, bytes_of_layout, deployment
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.plan import PLACEMENTS, Plan, place, plan_shapes
from hetmoe.placement.plan_file import BESIDE_MODEL, read_plan
from hetmoe.placement.scores import RANDOM, check_down_axis
from hetmoe.placement.streaming import STREAMED, stored_identity, stream_scores
from hetmoe.quantize.layout import QuantizedLayout, layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedModel:
    """What is known of a model.

    Attributes:
        name: that results carry.
        source: what names it on the command line.
        config: its shapes.
        identity: its fingerprint; None where its weights are not at hand.
        layout: which grids quantized experts lie on; None = no expert is quantized.
        weight_bytes: of a stored weight that is not quantized.
        model: itself, if it was loaded.
    """

    name: str
    source: str
    config: ModelConfig
    identity: str | None
    layout: QuantizedLayout | None
    weight_bytes: float
    model: Model | None


def has_weights(source: str) -> bool:
    """Whether a model's weights are on this machine, without a download."""
    path = Path(source)
    return source == "reference" or (
        path.is_dir() and (orbax_directory.is_one(path) or any(path.glob("*.safetensors")))
    )


def describe_model(source: str, dtype: str | None, *, load: bool) -> DescribedModel:
    """Reads a model as far as needed: whole if `load`, else headers and routers, or config.json alone.

    Raises:
        InputError: see `load_model`.
    """
    parse_dtype(dtype)
    if load:
        model = load_model(source, dtype)
        return DescribedModel(
            name=model.name, source=source, config=model.config, identity=model_fingerprint(model),
            layout=layout_of(model.params.layers.moe.experts), weight_bytes=_size(model.params.embed.dtype),
            model=model,
        )  # fmt: skip
    directory = model_directory(source, config_only=True)
    name, identity = model_name(source, directory), None
    if orbax_directory.is_one(directory):
        record = orbax_directory.read_record(directory)
        config, layout, stored = record.config, record.layout, record.dtype
    elif has_weights(source):
        checkpoint = open_checkpoint(source)
        identity, found = stored_identity(checkpoint, dtype)
        config, layout, stored = checkpoint.config, checkpoint.storage.layout, str(found)
    else:
        config, storage = open_config(directory)
        layout, stored = storage.layout, storage.dtype or "bfloat16"
    return DescribedModel(
        name=name, source=source, config=config, identity=identity, layout=layout,
        weight_bytes=_size(dtype or stored), model=None,
    )  # fmt: skip


def deployment_of(described: DescribedModel, plan: Plan) -> Deployment:
    """A plan with the bytes that its digital weights have in the model."""
    layout, size = described.layout, described.weight_bytes
    quantized = None if layout is None else bytes_of_layout(described.config, layout, size)
    return deployment(plan, described.config, expert_bytes=quantized, weight_bytes=size, element_bytes=size)


def _size(dtype: Any) -> float:
    return float(jnp.dtype(dtype).itemsize)


def plan_of(described: DescribedModel, chosen: PlacementOptions, *, uniform: bool) -> tuple[str, Plan]:
    """(name, plan) by a file, a name, or a rule that needs no text.

    Where nothing is chosen it is the plan beside the model, if there is one; else all experts are analog, or none if
    some are quantized.

    Where all experts are chosen equally often (`uniform`), a fraction without a rule needs no weights: any experts do.

    Raises:
        InputError: for a plan of another model, a rule that needs text, or quantized experts on crossbars.
    """
    config, layout, path = described.config, described.layout, chosen.plan
    beside = Path(described.source) / BESIDE_MODEL
    nothing_chosen = (chosen.rule, chosen.fraction, chosen.placement, path) == (None,) * 4
    if nothing_chosen and described.source != "reference" and beside.is_file():  # which is no directory
        path = beside
    if path is not None:
        plan = read_plan(path, config, name=described.name, identity=described.identity, layout=layout)
        name = "the plan beside the model" if path is beside else f"plan {path.stem}"
    elif chosen.rule is None and chosen.fraction is not None and uniform and described.identity is None:
        plan = place(np.zeros(plan_shapes(config)["experts"]), chosen.fraction)
        name = f"{chosen.fraction:.1%} of experts digital, whichever they are"
    elif chosen.rule is not None or chosen.fraction is not None:
        rule = chosen.rule or "max_neuron_norm"
        fraction = 0.125 if chosen.fraction is None else chosen.fraction
        plan, name = place(_scores(described, rule, chosen.down_axis), fraction), f"{rule} {fraction:.1%} digital"
    else:
        placement = chosen.placement or ("experts_analog" if layout is None else "all_digital")
        plan, name = PLACEMENTS[placement](config), placement.replace("_", " ")
    if layout is not None and (wrong := np.argwhere(np.asarray(plan.experts) & (layout.bits() > 0).any(axis=-1))).size:
        layer, expert = wrong[0].tolist()
        raise InputError(
            f"{name} puts expert {expert} of layer {layer} (of those with experts) on crossbars, which is quantized in "
            f"{described.name!r}: give the plan that lies beside the model (--plan)"
        )
    return name, plan


def _scores(described: DescribedModel, rule: str, down_axis: str) -> np.ndarray:
    if rule not in STREAMED or rule == RANDOM:
        usable = ", ".join(name for name in STREAMED if name != RANDOM)
        raise InputError(f"rule {rule!r} needs text or seeds: use {usable}, or give a plan of 'hetmoe place' (--plan)")
    if described.identity is None:
        raise InputError(
            f"{described.name}: rule {rule!r} needs weights, which are not on this machine: give --placement, or a "
            "plan (--plan)"
        )
    return stream_scores(open_checkpoint(described.source), rule, down_axis=check_down_axis(down_axis))[0]
