"""What a worker makes once, before its first point: model, text, calibration, scores; and what identifies them."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.calibration_file import load_calibration
from hetmoe.evaluate.prepare import EvalText, noise_keys, placement_keys, prepare_text
from hetmoe.evaluate.rules import Scorer
from hetmoe.evaluate.text import heldout_files, read_text
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.parallel.mesh import window_parts
from hetmoe.placement.scores import RANDOM, score_experts
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.sweep.code_digest import code_record
from hetmoe.sweep.config import SweepConfig
from hetmoe.sweep.points import score_name

GATHERED_BYTES = 2**26  # of a parameter that processes share, at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that the evaluation of a point needs besides the point."""

    config: SweepConfig
    model: Model
    text: EvalText
    calibration: Calibration | None
    scorer: Scorer
    scores: dict[str, np.ndarray]  # by `score_name`, of the rules that are not drawn anew for every seed
    noise_keys: jax.Array
    placement_keys: jax.Array


def early_identity(config: SweepConfig) -> dict[str, Any]:
    """The part of a store's identity that needs no model: config, text, calibration and code.

    Raises:
        InputError: for unusable text.
    """
    text = {}
    for name, file in zip(config.text.files or (f.name for f in heldout_files()), text_files(config), strict=True):
        read_text(file)
        text[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    file = config.calibration_file()
    digest = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    return {"config": config.record(), "text": text, "calibration": digest, "code": code_record()}


def text_files(config: SweepConfig) -> list[Path]:
    """The files of CONFIG, or the embedded held-out text."""
    return config.text_files() or heldout_files()


def model_identity(model: Model) -> dict[str, Any]:
    """Name, config and digests of everything of a model that an evaluation depends on."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        for part in _parts(leaf, model.mesh):
            digest.update(memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8)))  # pyright: ignore[reportArgumentType]
    words = None if model.tokenizer is None else hashlib.sha256(model.tokenizer.to_str().encode()).hexdigest()
    return {
        "name": model.name,
        "fingerprint": model_fingerprint(model),
        "weights_sha256": digest.hexdigest(),
        "tokenizer_sha256": words,
        "start_token_id": model.start_token_id,
        "config": dataclasses.asdict(model.config),
    }


def _parts(leaf: jax.Array, mesh: jax.sharding.Mesh | None) -> Iterator[np.ndarray]:
    """The values of a parameter in order; of one that other processes hold in part, some rows at a time."""
    if mesh is None or leaf.is_fully_addressable:
        yield np.asarray(leaf)
        return
    together = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = max(1, GATHERED_BYTES * leaf.shape[0] // leaf.nbytes)
    take = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=together)
    for first in range(0, leaf.shape[0], rows):
        yield np.asarray(take(leaf, first, min(rows, leaf.shape[0] - first)))


def load_for_sweep(config: SweepConfig, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model of CONFIG, on a mesh if there is one.

    Raises:
        InputError: as `load_model`, or if a window of text exceeds the model's context.
    """
    model = load_model(config.model, config.dtype, mesh=mesh)
    if config.grid.rules or set(config.grid.placements) != {"all_digital"}:
        refuse_quantized(model.params, f"{config.source}: rules and analog placements are not of")
    if config.text.seq > model.config.max_position_embeddings:
        raise InputError(
            f"{config.source}: [text] seq {config.text.seq} exceeds the model's context of "
            f"{model.config.max_position_embeddings}"
        )
    return model


def make_setup(config: SweepConfig, model: Model) -> Setup:
    """Reads the text, calibrates and scores.

    Raises:
        InputError: for unusable or too little text, or a model whose activations are not finite.
    """
    method, grid = config.hardware.range_method(), config.grid
    text = prepare_text(
        model, text_files(config), tokens=config.text.tokens, seq=config.text.seq, batch=config.text.batch,
        seed=grid.seed, calibrate=method is not None, parts=window_parts(model.mesh),
    )  # fmt: skip
    file, calibration = config.calibration_file(), None
    if file is not None:
        calibration = load_calibration(file, model, config.hardware.bound_axis).calibration
    elif method is not None and text.aside is not None:
        tokens = jnp.asarray(text.aside.tokens[:, :-1])
        calibration = calibrate(
            model.params, tokens, model.config, method, tile_rows=config.hardware.tile_rows, mesh=model.mesh
        )
    scorer = Scorer(
        model=model, sample=text.sample, down_axis=config.hardware.down_axis, seed=grid.seed, calibration=calibration
    )
    return Setup(
        config=config,
        model=model,
        text=text,
        calibration=calibration,
        scorer=scorer,
        scores=_scores(config, scorer),
        noise_keys=noise_keys(grid.seed, grid.seeds),
        placement_keys=placement_keys(grid.seed, grid.seeds),
    )


def _scores(config: SweepConfig, scorer: Scorer) -> dict[str, np.ndarray]:
    """Scores by `score_name`; device-dependent rules are scored per device, just programmed, at one noise scale."""
    grid, found = config.grid, dict[str, np.ndarray]()
    for rule in grid.rules:
        for device in grid.devices:
            if rule != RANDOM and (name := score_name(rule, device)) not in found:
                spec = config.spec(device, grid.scoring_scale, None, grid.bits[0])
                found[name] = scorer.scores(rule, spec)
    return found


def activation_frequencies(setup: Setup) -> np.ndarray | None:
    """How often each expert is chosen on the calibration windows; None where nothing is calibrated."""
    if setup.text.aside is None:
        return None
    tokens = jnp.asarray(setup.text.aside.tokens[:, :-1])
    return np.asarray(score_experts(setup.model, "activation_frequency", tokens=tokens))
