"""Exported programs beside the jitted forward pass, in this process."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import seeded_weights
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.export.directory import stablehlo_text
from hetmoe.export.program import ExportedPrograms, export_forward
from hetmoe.placement.plan import experts_analog
from tests.export.models import KEY, SPEC, Case, case, make_model
from tests.models.tiny import random_params, random_tokens, tiny_config


@functools.cache
def exported(name: str) -> ExportedPrograms:
    chosen = case(name)
    return export_forward(chosen.model, platforms=["cpu"], **chosen.analog)


@functools.cache
def caller(name: str):
    return jax.jit(exported(name).programs["cpu"].call)


def assert_same(found, wanted) -> None:
    # Blocks of experts may have another size: the same products, but for the order of sums of at most 64 terms.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "shape"), [("plain", (1, 1)), ("plain", (3, 17)), ("analog", (2, 9)), ("mixed", (2, 9))]
)
def test_one_program_serves_all_sizes(name, shape):
    tokens = random_tokens(case(name).model.config, 1, shape)
    assert_same(caller(name)(exported(name).arguments, tokens), case(name).logits(tokens))


def _other(name, value):
    """Other values that an argument may have."""
    if value.dtype == jnp.bool_:
        return ~value
    if name.endswith("places/pool"):
        return jnp.zeros_like(value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        return jnp.roll(value.reshape(-1), 1).reshape(value.shape)
    return (value * 1.7 + 0.01).astype(value.dtype)


@pytest.mark.parametrize("name", ["plain", "analog", "mixed"])
def test_logits_follow_every_argument(name):
    """With the plan as it is, or with everything digital: a plan says whether clean or programmed weights count."""
    arguments, call = exported(name).arguments, caller(name)
    tokens = random_tokens(case(name).model.config, 1, (2, 9))
    none_analog = {key: jnp.zeros_like(value) for key, value in arguments.items() if key.startswith("plan/")}
    plans = [arguments, arguments | none_analog]
    before = [np.asarray(call(plan, tokens)) for plan in plans]
    for changed, value in arguments.items():
        after = [np.asarray(call(plan | {changed: _other(changed, value)}, tokens)) for plan in plans]
        assert any(not np.array_equal(*pair) for pair in zip(before, after, strict=True)), changed


def test_arguments_have_readable_names():
    names = set(exported("mixed").arguments)
    assert {
        "params/embed", "params/layers/moe/experts/gate/pools/0/planes/1",
        "params/layers/moe/experts/gate/pools/0/zero", "params/layers/moe/experts/gate/places/slot", "plan/experts",
        "programmed/layers/down/w/pools/0", "spec/adc_bound",
    } <= names  # fmt: skip
    assert {"plan/lm_head", "programmed/lm_head/weight_max"} <= set(exported("analog").arguments)
    assert "spec/noise_scale" not in names  # stored weights have their noise
    assert list(exported("mixed").arguments) == sorted(names)


def test_programs_do_not_grow_with_the_weights():
    sizes, weights = [], []
    for config in (tiny_config(), tiny_config(vocab_size=4000, expert_intermediate_size=400, num_experts=32)):
        model = make_model(random_params(config, 0), config)
        sizes.append(len(export_forward(model, platforms=["cpu"]).programs["cpu"].serialize()))
        weights.append(sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
    assert weights[1] > 30 * weights[0] and abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


@pytest.mark.parametrize("name", ["full", pytest.param("full analog", marks=pytest.mark.slow), "mixed"])
def test_all_platforms_lower_on_this_one(name):
    chosen = case(name)
    found = export_forward(chosen.model, **chosen.analog)
    for platform, program in found.programs.items():
        assert program.platforms == (platform,)
        assert [str(d) for d in program.in_avals[-1].shape] == ["batch", "length"]
    ragged = {platform for platform, program in found.programs.items() if "ragged_dot" in program.mlir_module()}
    assert ragged == {"tpu"}


def _kernels(**options):
    config = tiny_config(hidden_size=64, expert_intermediate_size=64, head_dim=16)
    params = random_params(config, 0)
    analog = {
        "plan": experts_analog(config), "spec": SPEC, "programmed": seeded_weights(KEY, dense=False, when="kernel"),
    }  # fmt: skip
    return export_forward(make_model(params, config), implementation="pallas", **analog, **options)


def test_kernels_are_exported_for_fixed_sizes():
    programs = _kernels(platforms=["cuda", "tpu"], batch=1, length=4).programs
    calls = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
    for platform, target in calls.items():
        assert target in programs[platform].mlir_module()
    with pytest.raises(InputError, match="give batch and length"):
        _kernels(platforms=["tpu"], batch=1)
    with pytest.raises(InputError, match="leave out platform cpu"):
        _kernels(platforms=["cpu"], batch=1, length=4)


def test_fixed_sizes_leave_nothing_but_stablehlo():
    chosen = case("plain")
    found = export_forward(chosen.model, platforms=["cpu"], batch=2, length=5, **chosen.analog).programs["cpu"]
    assert "custom_call" not in stablehlo_text(found) and "custom_call" in stablehlo_text(
        exported("plain").programs["cpu"]
    )
    tokens = random_tokens(chosen.model.config, 3, (2, 5))
    assert_same(jax.jit(found.call)(exported("plain").arguments, tokens), chosen.logits(tokens))
    with pytest.raises(ValueError, match="Shape mismatch"):
        jax.jit(found.call)(exported("plain").arguments, tokens[:1])


def test_lengths_are_limited_where_attention_changes():
    plain = exported("plain")
    tokens = jnp.zeros((1, 65), jnp.int32)
    assert plain.most_length == 64  # the model's context
    with pytest.raises(ValueError, match="length"):
        jax.jit(plain.programs["cpu"].call)(plain.arguments, tokens)
    with pytest.raises(InputError, match="length 65 exceeds the model's context of 64"):
        export_forward(case("plain").model, platforms=["cpu"], length=65)


def _with_keys(chip, read):
    """A chip that is programmed in every pass, with read noise."""
    spec = analog_spec("additive", tile_rows=32, read_noise=make_read_noise("additive", 0.05))
    return {
        "plan": experts_analog(tiny_config()), "spec": spec,
        "programmed": seeded_weights(jax.random.key(chip), dense=False, when="layer"),
        "read_key": jax.random.key(read),
    }  # fmt: skip


def test_keys_are_arguments():
    arguments = export_forward(case("plain").model, platforms=["cpu"], **_with_keys(1, 2)).arguments
    for name, seed in (("programmed/key", 1), ("read_key", 2)):
        np.testing.assert_array_equal(arguments[name], jax.random.key_data(jax.random.key(seed)))
    assert {"spec/noise_scale", "spec/read_noise/std"} <= arguments.keys()


@pytest.mark.slow
def test_chips_and_read_noise_are_drawn_anew_without_exporting_again():
    chosen = case("plain")
    tokens = random_tokens(chosen.model.config, 1, (2, 9))
    found = export_forward(chosen.model, platforms=["cpu"], **_with_keys(1, 2))
    call, words = jax.jit(found.programs["cpu"].call), jax.random.key_data
    for chip, read in ((1, 2), (3, 2), (1, 4)):
        arguments = found.arguments | {
            "programmed/key": words(jax.random.key(chip)), "read_key": words(jax.random.key(read)),
        }  # fmt: skip
        wanted = Case(chosen.model, _with_keys(chip, read)).logits(tokens)
        # At 8 bits a sum that rounds otherwise may change a code: not so most of them.
        assert np.median(np.abs(call(arguments, tokens) - wanted)) <= 4e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"platforms": ["gpu"]}, "platform 'gpu' is unknown: use cpu, cuda, tpu"),
        ({"platforms": []}, "name at least one"),
        ({"platforms": ["cpu", "cpu"]}, "each once"),
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"length": -1}, "length -1 must be at least 1"),
        ({"plan": experts_analog(tiny_config())}, "missing: spec, programmed"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        export_forward(case("plain").model, **options)


def test_quantized_experts_on_crossbars_are_refused():
    chosen = case("mixed")
    analog = chosen.analog | {"plan": dataclasses.replace(chosen.analog["plan"], experts=jnp.ones((2, 6), bool))}
    with pytest.raises(InputError, match="puts 7 quantized experts on crossbars"):
        export_forward(chosen.model, **analog)
