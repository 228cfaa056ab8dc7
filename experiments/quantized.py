"""What the experiments on quantized experts share.

A quantized model is evaluated as the values that its codes stand for, in a plain float32 model: the weights are the
same, and all allocations of bits run in one compiled program instead of one for each shape of the pools.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load_file

from hetmoe.checkpoint.load import model_directory
from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import WINDOWS_TO_CALIBRATE
from hetmoe.evaluate.run import Batches, evaluate_digital
from hetmoe.evaluate.statistics import Interval, paired_difference
from hetmoe.evaluate.text import apart, load_windows
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward, Params, with_experts
from hetmoe.quantize.budget import EXPERT_MATRICES, average_budget, bits_within, code_bits
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.expected_loss import ExpectedIncrease, expected_increase
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.levels import Alternative, assign, level_counts
from hetmoe.quantize.mixed import dense
from hetmoe.quantize.order import Order
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest

PART = 4  # windows of one part of the text; differences are paired by part

Bits = np.ndarray  # [layers, experts, matrices]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A model on a text, by part."""

    nll: np.ndarray  # nats per token
    correct: np.ndarray  # next-word questions answered, per part
    questions: int  # in all parts

    @property
    def perplexity(self) -> float:
        """Of the whole text."""
        return float(np.exp(self.nll.mean()))

    @property
    def accuracy(self) -> float:
        """Share of all next-word questions."""
        return float(self.correct.sum() / self.questions)

    def more_loss(self, other: "Score") -> Interval:
        """Mean loss minus that of the other, nats per token, paired by part."""
        return paired_difference(self.nll, other.nll)

    def more_correct(self, other: "Score") -> Interval:
        """Accuracy minus that of the other, paired by part."""
        scale = len(self.correct) / self.questions
        return paired_difference(scale * self.correct, scale * other.correct)

    def record(self) -> dict[str, float]:
        """Six digits."""
        return {name: float(f"{getattr(self, name):.6g}") for name in ("perplexity", "accuracy")}


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean loss and credit of several models, part by part; its perplexity is their geometric mean."""
    nll, correct = (np.mean([getattr(s, name) for s in scores], axis=0) for name in ("nll", "correct"))
    return Score(nll=nll, correct=correct, questions=scores[0].questions)


def score(params: Params, batches: Batches, model: Model) -> Score:
    """Evaluates a plain model part by part.

    Raises:
        InputError: if the text is not cut into whole parts, at least two.
    """
    batch = batches.weight.shape[1]
    real = int(np.sum(np.asarray(batches.weight)))
    if batch % PART or real % PART or real < 2 * PART:
        raise InputError(
            f"{real} windows in batches of {batch}: --tokens and --batch must make parts of {PART} windows"
        )
    seq = batches.tokens.shape[2] - 1
    parts: Batches = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, PART, *leaf.shape[2:]), batches)
    totals = [
        evaluate_digital(params, jax.tree.map(lambda leaf, at=at: leaf[at], parts), model.config)
        for at in range(real // PART)
    ]
    return Score(
        nll=np.array([float(t.nll) for t in totals]) / (PART * seq),
        correct=np.array([float(t.correct) for t in totals]),
        questions=int(np.sum(np.asarray(batches.asked) * np.asarray(batches.weight)[..., None])),
    )


def calibration_windows(model: Model, files: Sequence[Path], seq: int, evaluated: int, tokens: int) -> np.ndarray:
    """Windows of text for rules and GPTQ `[windows, seq + 1]`, apart from the `evaluated` tokens.

    Raises:
        InputError: if there is not so much.
    """
    count = tokens // seq
    found = apart(load_windows(model, files, seq), evaluated // seq, WINDOWS_TO_CALIBRATE, count)
    if found is None or len(found) < count:
        raise InputError(
            f"--calibration-tokens {tokens}: the text that is not evaluated has fewer; evaluate less of it"
        )
    return found.tokens


def initial_router(name: str) -> Array | None:
    """The routers before training `[layers, hidden, experts]` that ship with the reference model; None for others.

    They are what `init_params(jax.random.key(0), CONFIG)` of `train_reference.py` makes, in bfloat16.
    """
    file = model_directory(name) / "routers_step0.safetensors"
    if not file.exists():
        return None
    tensors = load_file(file)
    return jnp.stack([
        jnp.asarray(tensors[f"model.layers.{layer}.mlp.gate.weight"].T, jnp.float32) for layer in range(len(tensors))
    ])  # fmt: skip


def plain(model: Model) -> FeedForward:
    """The values that the codes of a quantized model's experts stand for, float32."""
    experts: Any = model.params.layers.moe.experts
    return FeedForward(**{name: dense(getattr(experts, name), jnp.float32) for name in EXPERT_MATRICES})


class Quantizer:
    """Quantizes the experts of a model to any bits; gives the parameters of a plain model.

    Codes of `rtn` and `hqq` do not depend on other experts' bits: every level is quantized once.
    """

    def __init__(self, model: Model, recipe: Recipe, levels: Sequence[int], windows: Any) -> None:
        self.model, self.recipe, self.windows = model, recipe, windows
        shape = (len(model.config.moe_layers), model.config.num_experts, len(EXPERT_MATRICES))
        self.by_level: dict[int, FeedForward] = {}
        if recipe.method != "gptq":
            for level in levels:
                self.by_level[level] = plain(quantize_experts(model, np.full(shape, level), recipe)[0])

    def params(self, bits: Bits) -> Params:
        """The model's parameters with every expert matrix at its bits."""
        if self.recipe.method == "gptq":
            experts = plain(quantize_experts(self.model, bits, self.recipe, windows=self.windows[:, :-1])[0])
            return with_experts(self.model.params, experts)
        found: dict[str, Any] = {}
        for column, name in enumerate(EXPERT_MATRICES):
            chosen = jnp.asarray(bits[..., column, None, None])
            pairs = [(chosen == level, getattr(experts, name)) for level, experts in self.by_level.items()]
            found[name] = jnp.select([mask for mask, _ in pairs], [w for _, w in pairs], jnp.nan)
        return with_experts(self.model.params, FeedForward(**found))


def increases(model: Model, recipe: Recipe, windows: Any, levels: Sequence[int], key: jax.Array) -> ExpectedIncrease:
    """Expected increase of the loss of every expert matrix at every level, as `allocate` estimates it."""
    quantize = round_to_nearest if recipe.method == "rtn" else half_quadratic
    experts = model.params.layers.moe.experts
    quantized = {
        name: [quantize(getattr(experts, name), recipe.grid(level), name=name) for level in levels]
        for name in EXPERT_MATRICES
    }
    return expected_increase(model, jnp.asarray(windows), quantized, key=key)


def least_loss(
    model: Model, part: np.ndarray, all_levels: Sequence[int], levels: Sequence[int], average: float
) -> Bits:
    """Bits of the least increase at an average, from increases `[layers, experts, matrices, all_levels]`."""
    columns = [all_levels.index(level) for level in levels]
    budget = average_budget(model.config, part.shape[0] * part.shape[1], average)
    return bits_within(part[..., columns], code_bits(model.config, levels), levels, budget).bits


def in_order(order: Order, average: float, levels: Sequence[int], alternative: Alternative) -> Bits:
    """Bits of every expert matrix when the experts of each layer get them in an order."""
    counts = level_counts(order.shape[-1], average, levels, alternative)
    return np.repeat(assign(order, counts)[..., None], len(EXPERT_MATRICES), axis=-1)
