"""Bits by rule: orders and counts worked out by hand, plans, and budgets."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.params import with_experts
from hetmoe.quantize.allocation import Allocation, BitRule, allocate
from hetmoe.quantize.budget import bits_within
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.tiny_quantized import CONFIG, plain, quantized, windows

RTN = Recipe(method="rtn", group=32)
KEY = jax.random.key(0)


def rule(name: str, average: float | None = 2.5, levels: tuple[int, ...] = (2, 3), **more: Any) -> BitRule:
    return BitRule(rule=name, average=average, levels=levels, **more)


def with_routers(norms: np.ndarray, gate_scale: dict[tuple[int, int], float] | None = None) -> Model:
    """Routers of these norms `[2, 8]`, all in one direction; gates of some experts scaled."""
    params = plain().params
    router = jnp.asarray(norms[:, None, :] * np.full((1, 64, 1), 1 / 8), jnp.float32)
    moe = params.layers.moe.replace(router=router)
    gate = moe.experts.gate
    for index, factor in (gate_scale or {}).items():
        gate = gate.at[index].multiply(factor)
    params = params.replace(layers=params.layers.replace(moe=moe))
    return plain().replace(params=with_experts(params, moe.experts.replace(gate=gate)))


# Smallest norm first, ties to the lower index: layer 0 is 3 7 0 2 5 1 6 4, layer 2 is 0 1 2 3 4 5 6 7.
NORMS = np.array([[3.0, 5, 3, 1, 8, 4, 5, 2], [1.0, 1, 1, 1, 1, 1, 1, 1]])


def experts_at(found: Allocation, level: int) -> list[list[int]]:
    assert np.all(found.bits == found.bits[..., :1])
    return [np.flatnonzero(row == level).tolist() for row in found.bits[..., 0]]


def test_router_norm_by_hand() -> None:
    found = allocate(with_routers(NORMS), rule("router_norm", zeta=None), RTN, key=KEY)
    assert experts_at(found, 3) == [[0, 2, 3, 7], [0, 1, 2, 3]]
    assert experts_at(found, 2) == [[1, 4, 5, 6], [4, 5, 6, 7]]
    assert float(found.average) == 2.5
    assert found.notes == ("2 layers: 2.5 bits: 4 at 3, 4 at 2",)


def test_router_change_by_hand() -> None:
    """Changes of layer 0: 3 - 2, 5 - 1, 3 - 3, ...: the order is by them, not by the norms."""
    before = np.array([[2.0, 1, 3, 1, 2, 4, 9, 1], [1.0, 1, 1, 1, 1, 1, 1, 1]])
    initial = jnp.asarray(before[:, None, :] * np.full((1, 64, 1), 1 / 8), jnp.float32)
    found = allocate(with_routers(NORMS), rule("router_change", zeta=None), RTN, key=KEY, initial=initial)
    # 1 4 0 0 6 0 -4 1: smallest first 6, 2, 3, 5, then 0 and 7.
    assert experts_at(found, 3)[0] == [2, 3, 5, 6]
    with pytest.raises(InputError, match=r"needs the model before training.*use 'router_norm'"):
        allocate(plain(), rule("router_change"), RTN, key=KEY)


def test_zeta_moves_an_expert_ahead() -> None:
    """Expert 4 of layer 0, last in the order, has 4 times the weights of all others, so 16 times their MaxVar."""
    model = with_routers(NORMS, {(0, 4): 4.0})
    kept = allocate(model, rule("router_norm", zeta=None), RTN, key=KEY)
    moved = allocate(model, rule("router_norm", zeta=8.0), RTN, key=KEY)
    stays = allocate(model, rule("router_norm", zeta=40.0), RTN, key=KEY)
    assert experts_at(moved, 3) == [[0, 3, 4, 7], [0, 1, 2, 3]]  # 2 is pushed down
    assert moved.notes[0] == "MaxVar (zeta 8) changed 8 of 16 positions"
    assert np.array_equal(stays.bits, kept.bits) and stays.notes[0] == "MaxVar (zeta 40) changed 0 of 16 positions"


def test_three_levels_and_their_alternative() -> None:
    found = allocate(with_routers(NORMS), rule("router_norm", 2.25, (1, 2, 3), zeta=None), RTN, key=KEY)
    assert experts_at(found, 3)[0] == [0, 2, 3, 7] and experts_at(found, 2)[0] == [1, 5]
    assert experts_at(found, 1)[0] == [4, 6]
    assert (
        "2.25 bits: 4 at 3, 2 at 2, 2 at 1 (the paper's rule; with fewest_lowest: 2 at 3, 6 at 2, 0 at 1)"
        in (found.notes[0])
    )
    other = rule("router_norm", 2.25, (1, 2, 3), zeta=None, alternative="fewest_lowest")
    assert experts_at(allocate(with_routers(NORMS), other, RTN, key=KEY), 2)[0] == [0, 1, 2, 4, 5, 6]


def test_only_digital_experts_get_bits() -> None:
    digital = np.array([[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], bool)
    found = allocate(with_routers(NORMS), rule("router_norm", zeta=None), RTN, key=KEY, digital=digital)
    # Of 2 5 1 4 the first two.
    assert experts_at(found, 3) == [[2, 5], []] and experts_at(found, 2) == [[1, 4], []]
    assert not found.bits[~digital].any() and found.notes == ("1 layers: 2.5 bits: 2 at 3, 2 at 2",)
    uniform = allocate(plain(), rule("uniform", 3, (3,)), RTN, key=KEY, digital=digital)
    np.testing.assert_array_equal(uniform.bits, np.where(digital, 3, 0)[..., None].repeat(3, axis=-1))


def test_averages_that_cannot_be_reached_are_named() -> None:
    found = allocate(with_routers(NORMS), rule("router_norm", 2.3, zeta=None), RTN, key=KEY)
    assert float(found.average) == 2.25
    assert "2.25 bits is the nearest to 2.3 that 8 experts can average at 3,2 bits" in found.notes[0]


def test_frequency_and_random_orders() -> None:
    tokens = jnp.asarray(windows(20, 20))
    rare, frequent = (
        allocate(plain(), rule("activation_frequency", zeta=None, more_bits=of), RTN, key=KEY, windows=tokens)  # pyright: ignore[reportArgumentType]
        for of in ("rare", "frequent")
    )
    # Without ties the halves change places.
    assert np.mean(rare.bits + frequent.bits == 5) > 0.7
    with pytest.raises(InputError, match="needs tokens"):
        allocate(plain(), rule("activation_frequency"), RTN, key=KEY)
    one, same, other = (
        allocate(plain(), rule("random", zeta=None), RTN, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(one.bits, same.bits) and not np.array_equal(one.bits, other.bits)


def test_expected_loss_keeps_to_its_budget() -> None:
    text = windows(4, 12)
    found = allocate(plain(), rule("expected_loss", 2.5, (1, 3, 4)), RTN, key=KEY, windows=text)
    # All matrices are of one size: 48 of them, 120 bits in all.
    assert found.bits.sum() <= 120 and found.bits.sum() >= 118
    assert set(found.bits.flat) <= {1, 3, 4}
    assert re.fullmatch(r"expected increase \S+ nats per token \(curvature; matrices added up\), the least there is",
                        found.notes[0])  # fmt: skip
    # With groups of 32 a matrix of 64 x 96 takes 768 + 384 bytes at 1 bit (no zeros),
    # 2,304 + 768 at 3 and 3,072 + 768 at 4.
    budget = 48 * 1152 + 5 * (3072 - 1152) + 7
    bytes_rule = rule("expected_loss", None, (1, 3, 4), max_bytes=budget)
    found = allocate(plain(), bytes_rule, RTN, key=KEY, windows=text)
    size = {1: 1152, 3: 3072, 4: 3840}
    assert sum(size[b] for b in found.bits.flat) <= budget
    assert sum(b > 1 for b in found.bits.flat) in (4, 5)
    with pytest.raises(InputError, match="needs text"):
        allocate(plain(), rule("expected_loss"), RTN, key=KEY)
    few = rule("expected_loss", None, (1, 3, 4), max_bytes=48 * 1152 - 1)
    with pytest.raises(InputError, match="too small"):
        allocate(plain(), few, RTN, key=KEY, windows=text)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_expected_loss_is_the_curvature_of_the_quantisers_changes(method: Any) -> None:
    """Against the increases themselves, of RTN's changes for `rtn` and HQQ's for the others, digital experts only."""
    text, levels, recipe = windows(3, 12), (1, 3), Recipe(method=method, group=32)
    digital = np.random.default_rng(0).random((2, 8)) < 0.6
    change = round_to_nearest if method == "rtn" else half_quadratic
    experts = plain().params.layers.moe.experts
    codes = {n: [change(getattr(experts, n), recipe.grid(b)) for b in levels] for n in ("gate", "up", "down")}
    curvature = expected_increase(plain(), jnp.asarray(text), codes, key=KEY).curvature
    count = int(digital.sum())
    wanted = bits_within(curvature, np.array([[1, 3]] * 3), levels, 6 * count, digital=digital)
    found = allocate(plain(), rule("expected_loss", 2, levels), recipe, key=KEY, windows=text, digital=digital)
    np.testing.assert_array_equal(found.bits, wanted.bits)
    assert not found.bits[~digital].any() and f"{wanted.increase:.4g} nats" in found.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "best"}, "unknown rule 'best'"),
        ({"name": "router_norm", "levels": (3, 2)}, "levels=3,2 must be ascending"),
        ({"name": "router_norm", "levels": (2, 5)}, "levels=2,5 must be ascending ones of 1, 2, 3, 4, 8"),
        ({"name": "router_norm", "levels": ()}, "levels=none"),
        ({"name": "router_norm", "average": 3.5}, "3.5 bits are not between the levels 2, 3"),
        ({"name": "router_norm", "average": float("nan")}, "nan bits are not between"),
        ({"name": "router_norm", "levels": (1, 2, 4)}, "not equally spaced"),
        ({"name": "router_norm", "levels": (1, 2, 3, 4)}, "must be one to three levels"),
        ({"name": "router_norm", "levels": (3,), "average": 3.0, "alternative": "best"}, None),
        ({"name": "router_norm", "levels": (1, 2, 3), "alternative": "best"}, "alternative='best'"),
        ({"name": "uniform"}, "'uniform' gives all experts the same bits, so 2.5 must be one of the levels 2, 3"),
        ({"name": "router_norm", "average": None}, "give either an average"),
        ({"name": "expected_loss", "max_bytes": 10}, "give either an average"),
        ({"name": "router_norm", "average": None, "max_bytes": 10}, "a budget of bytes is for 'expected_loss'"),
    ],
)
def test_bad_rules_are_refused(arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert rule(**arguments).levels == (3,)
        return
    with pytest.raises(InputError, match=message):
        rule(**arguments)


def test_bad_models_and_masks_are_refused() -> None:
    with pytest.raises(InputError, match="no expert is digital"):
        allocate(plain(), rule("router_norm"), RTN, key=KEY, digital=np.zeros((2, 8), bool))
    with pytest.raises(InputError, match=r"digital has the shape \[1, 8\]; this model needs \[2, 8\]"):
        allocate(plain(), rule("router_norm"), RTN, key=KEY, digital=np.ones((1, 8), bool))
    with pytest.raises(InputError, match="quantized experts"):
        allocate(quantized(), rule("expected_loss"), RTN, key=KEY, windows=windows(4, 12))
    assert CONFIG.num_experts == 8
