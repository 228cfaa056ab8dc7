"""Quantizing layer after layer: the quantisers' own results, Hessians of what arrives, and runs that were stopped."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward, with_experts
from hetmoe.models.transformer import hidden_states
from hetmoe.quantize import driver
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.gptq import gptq
from hetmoe.quantize.hessian import Hessians
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.layer import quantize_layer
from hetmoe.quantize.mixed import dense
from hetmoe.quantize.packed import dequantize_packed
from hetmoe.quantize.partial import Decided, PartialRun
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.grids import values_of
from tests.quantize.tiny_quantized import CONFIG, RECIPE, bits, plain, quantized, same, windows

NAMES = ("gate", "up", "down")
GPTQ = Recipe(method="gptq", group=32)


def at_two_bits() -> np.ndarray:
    """Of a few experts: every grid and shape of GPTQ compiles for seconds."""
    return np.where(bits() == 3, 2, 0)


def values(model: Model, name: str) -> np.ndarray:
    return np.asarray(dense(getattr(model.params.layers.moe.experts, name), jnp.float32))


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_every_matrix_is_quantized_at_its_bits(method: Any) -> None:
    recipe = dataclasses.replace(RECIPE, method=method)
    found = quantized() if method == "rtn" else quantize_experts(plain(), bits(), recipe)[0]
    alone = round_to_nearest if method == "rtn" else half_quadratic
    for column, name in enumerate(NAMES):
        w = np.asarray(getattr(plain().params.layers.moe.experts, name))
        values_now = values(found, name)
        np.testing.assert_array_equal(values_now[bits()[..., column] == 0], w[bits()[..., column] == 0])
        for level in (1, 3, 4):
            at = bits()[..., column] == level
            if at.any():
                wanted = values_of(alone(jnp.asarray(w[at]), recipe.grid(level)))
                # HQQ's zeros are sums, which another batch of matrices may add in another order: where one lies between
                # two float16 numbers its group is moved by their distance, at most 2**-10 of the largest weight.
                moved = ~np.isclose(values_now[at], wanted, rtol=2**-22, atol=0)
                assert moved.mean() <= (0.0 if method == "rtn" else 0.01)
                np.testing.assert_allclose(values_now[at], wanted, rtol=0, atol=2**-10 * np.abs(w).max())


def test_what_is_not_an_expert_stays_as_it_is() -> None:
    for get in (lambda p: p.embed, lambda p: p.layers.moe.router, lambda p: p.dense_layers.ffn.gate):
        np.testing.assert_array_equal(get(quantized().params), get(plain().params))


def test_facts_of_a_layer() -> None:
    _, facts = quantize_experts(plain(), bits(), RECIPE)
    assert [part["expert"] for part in facts[0]["matrices"]["down"]] == [0, 1, 3, 4, 5, 7]
    w = np.asarray(plain().params.layers.moe.experts.down, np.float64)
    for part in facts[0]["matrices"]["down"]:
        expert = part["expert"]
        assert part["bits"] == bits()[0, expert, 2]
        change = values(quantized(), "down")[0, expert] - w[0, expert]
        wanted = np.linalg.norm(change) / np.linalg.norm(w[0, expert])
        np.testing.assert_allclose(part["relative_error"], wanted, rtol=1e-5)  # float32 sums of 6,144 squares


def exact_hessians(model: Model, tokens: np.ndarray, place: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of x x^T over the tokens that each expert of a layer receives, float64, and how many; by another way.

    An observer of the whole forward pass gives every slot's inputs with its expert.
    """

    def observe(x: jax.Array, real: jax.Array, group: jax.Array) -> Any:
        return x, real, group

    _, _, (seen, _) = hidden_states(model.params, jnp.asarray(tokens), CONFIG, observe=observe)
    found = {}
    for site in ("experts_in", "experts_mid"):
        x, real, group = (np.asarray(part[place], np.float64) for part in seen[site])
        sums = np.zeros((CONFIG.num_experts, x.shape[-1], x.shape[-1]))
        counts = np.zeros(CONFIG.num_experts, int)
        for block, is_real, expert in zip(x, real, group, strict=True):
            rows = block[is_real > 0]
            sums[int(expert)] += rows.T @ rows
            counts[int(expert)] += len(rows)
        found[site] = (sums, counts)
    return found


# A minute; it last ran, and passed, on 2026-11-28.
@pytest.mark.slow
def test_gptq_sees_what_the_quantized_layers_before_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessians of layer 2 are those of a model whose layer 0 is quantized and whose layer 2 is not yet."""
    handed: list[dict[str, Hessians]] = []

    def spy(matrices: Any, of: Any, recipe: Any, hessians: Any, *, name: str) -> Any:
        handed.append(jax.tree.map(np.asarray, hessians))
        return quantize_layer(matrices, of, recipe, hessians, name=name)

    monkeypatch.setattr(driver, "quantize_layer", spy)
    found, facts = quantize_experts(plain(), at_two_bits(), GPTQ, windows=windows())
    before = plain().params.layers.moe.experts
    half = FeedForward(**{n: jnp.stack([values(found, n)[0], getattr(before, n)[1]]) for n in NAMES})
    models = [plain(), plain().replace(params=with_experts(plain().params, half))]
    for place, model in enumerate(models):
        for site, (sums, counts) in exact_hessians(model, windows(), place).items():
            np.testing.assert_array_equal(handed[place][site].tokens, counts)
            # float32 sums of up to 700 products; activations that went through a layer differ by some roundings too.
            scale = np.abs(sums).max(axis=(1, 2), keepdims=True)
            np.testing.assert_allclose(handed[place][site].total / scale, sums / scale, atol=1e-5)
        tokens = [part["tokens"] for part in facts[place]["matrices"]["gate"]]
        quantized_experts = [part["expert"] for part in facts[place]["matrices"]["gate"]]
        assert tokens == exact_hessians(model, windows(), place)["experts_in"][1][quantized_experts].tolist()


def test_gptq_of_some_experts_uses_the_mean_of_all() -> None:
    """One expert at a time gives what all experts of a layer together give."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 64, 6)), jnp.float32)
    x = rng.normal(size=(4, 30, 64)) * rng.uniform(0.1, 2, size=(4, 1, 64))
    hessians = Hessians(
        total=jnp.asarray(np.einsum("etk,etl->ekl", x, x), jnp.float32), tokens=jnp.full((4,), 30, jnp.int32)
    )
    recipe = Recipe(method="gptq", group=32)
    together = gptq(w, hessians, recipe.grid(2), recipe.gptq).quantized
    matrices = {"gate": w, "up": w, "down": w}
    level = np.full((4, 3), 2)
    found = quantize_layer(matrices, level, recipe, {"experts_in": hessians, "experts_mid": hessians}, name="layer 0")
    scale = np.repeat(np.asarray(together.scale, np.float32), 32, axis=1)
    zero = np.repeat(np.asarray(together.zero, np.float32), 32, axis=1)
    wanted = (np.asarray(together.codes, np.float32) - zero) * scale
    np.testing.assert_array_equal(dequantize_packed(found.pools["up", 2]), wanted)


class Stop(BaseException):
    """No handler of errors sees it."""


def test_a_stopped_run_goes_on_with_the_same_result(tmp_path: pathlib.Path) -> None:
    whole, whole_facts = quantize_experts(plain(), at_two_bits(), GPTQ, windows=windows())
    partial = PartialRun(tmp_path)
    decided = Decided(bits=bits(), notes=())
    partial.decide({"rule": "x"}, decided)

    def stop(_: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize_experts(plain(), at_two_bits(), GPTQ, windows=windows(), partial=partial, progress=stop)
    (first,) = partial.folder.glob("layer-*")
    kept = first.read_bytes()
    done: list[int] = []
    again = PartialRun(tmp_path)
    assert again.begin({"rule": "x"}) is not None
    found, facts = quantize_experts(
        plain(), at_two_bits(), GPTQ, windows=windows(), partial=again, progress=done.append
    )
    assert same(found, whole) and facts == whole_facts
    assert done == [0, 1] and first.read_bytes() == kept
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_finished_layers_are_not_done_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = PartialRun(tmp_path)
    partial.decide({}, Decided(bits=bits(), notes=()))
    quantize_experts(plain(), bits(), RECIPE, partial=partial)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(driver, "quantize_layer", fail)
    assert same(quantize_experts(plain(), bits(), RECIPE, partial=partial)[0], quantized())


def test_runs_with_other_settings_or_damage_are_refused(tmp_path: pathlib.Path) -> None:
    partial = PartialRun(tmp_path)
    assert partial.begin({"rule": "a", "seed": 0}) is None and not partial.folder.exists()
    partial.decide({"rule": "a", "seed": 0}, Decided(bits=bits(), notes=("of hand",)))
    found = PartialRun(tmp_path).begin({"rule": "a", "seed": 0})
    assert found is not None and found.notes == ("of hand",)
    np.testing.assert_array_equal(found.bits, bits())
    with pytest.raises(InputError, match=r"stopped \(rule 'a' there, 'b' now\).*or remove the folder"):
        PartialRun(tmp_path).begin({"rule": "b", "seed": 0})
    quantize_experts(plain(), bits(), RECIPE, partial=partial)
    first = partial.folder / "layer-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"layer-00000\.safetensors: damaged .*remove it"):
        quantize_experts(plain(), bits(), RECIPE, partial=partial)
    first.unlink()
    other = bits()
    other[1, 5] = 3  # what layer 1 holds does not fit
    with pytest.raises(InputError, match=r"layer-00001\.safetensors: damaged"):
        quantize_experts(plain(), other, RECIPE, partial=partial)
    for content in ("{", "[]", '{"settings": []}', '{"settings": {}, "bits": 5, "notes": []}', '{"settings": {}}'):
        (partial.folder / "settings.json").write_text(content)
        with pytest.raises(InputError, match=r"settings\.json: .*to begin anew"):
            partial.begin({})


def test_bad_input_is_refused() -> None:
    wrong = bits()
    wrong[1, 2, 0] = 5
    for call, message in (
        (lambda: quantize_experts(quantized(), bits(), RECIPE), "cannot quantize again a model with quantized experts"),
        (lambda: quantize_experts(plain(), bits()[:1], RECIPE), r"shape \[1, 8, 3\]; this model needs \[2, 8, 3\]"),
        (lambda: quantize_experts(plain(), wrong, RECIPE), "bits=5 does not exist: use 1, 2, 3, 4, 8, or 0"),
        (lambda: quantize_experts(plain(), 0 * bits(), RECIPE), "no expert gets any bits"),
        (lambda: quantize_experts(plain(), bits(), Recipe(method="rtn", group=64)), "down: group=64 does not divide"),
        (lambda: quantize_experts(plain(), bits(), GPTQ), "GPTQ needs calibration text"),
        (
            lambda: quantize_experts(plain(), bits(), GPTQ, windows=windows(3, 9)),
            "27 tokens is too short for GPTQ: gate has 64 inputs",
        ),
        (
            lambda: quantize_experts(plain(), bits(), GPTQ, windows=windows() + 99),
            "outside",
        ),
        (lambda: Recipe(method="awq"), "quantiser 'awq' is unknown: use one of rtn, hqq, gptq"),  # pyright: ignore[reportArgumentType]
        (lambda: Recipe(method="rtn", group=48), "group=48"),
        (lambda: Recipe(method="rtn", zeros="none"), "zeros='none'"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(InputError, match=message):
            call()
    gate = plain().params.layers.moe.experts.gate.at[1, 5, 0, 0].set(jnp.nan)
    broken = plain().params.layers.moe.experts.replace(gate=gate)
    with pytest.raises(InputError, match="gate of expert 5 of layer 2 has 1 weights that are NaN"):
        quantize_experts(plain().replace(params=with_experts(plain().params, broken)), bits(), RECIPE)
