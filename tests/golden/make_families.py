"""Makes tiny random models of every family but OLMoE in the hub's layout, with transformers' float32 outputs.

Command, from the repository root, in an environment with numpy 2, torch 2.13 (CPU), safetensors and transformers 5
(checked with transformers 5.23.0, torch 2.13.0, safetensors 0.8.0, numpy 2.4.6), after `tests.golden.make_olmoe`:

    python -m tests.golden.make_families [folder ...]

Cost: about 10 seconds on one thread. Running it again gives the same weights and tokens; the outputs may differ in
their last bits on a machine whose float32 matmul sums in another order.

Every tensor has its own key, experts included, as on the hub; norms are not 1 and biases not 0. `family_configs` has
the configs:

    mixtral_tiny           as on the hub; grouped queries, no head_dim
    mixtral_window         as transformers 5 writes it; head_dim is not hidden / heads, window 8, tied head
    qwen2_moe_tiny         as on the hub; biases, gated shared expert, a dense layer by mlp_only_layers, unused window
    qwen2_moe_sparse_step  as on the hub; every second layer dense, renormalised weights, linear rope scaling
    qwen3_moe_tiny         as on the hub; norms of each head, head_dim is not hidden / heads, renormalised weights
    qwen3_moe_bias         as transformers 5 writes it; biases everywhere in attention, first layer dense, yarn
    deepseek_v2_lite_tiny  as on the hub; latent attention with full queries, greedy, yarn with mscale
    deepseek_v2_tiny       as on the hub; latent queries, biases, the best 2 of 4 groups, routed experts times 16
    deepseek_v3_tiny       as on the hub; sigmoid scores and biases that choose, groups, renormalised, yarn
    deepseek_v3_fp8        the same as the hub stores it: blocks of float8, bfloat16, a layer for the token after next
    olmoe_fused            olmoe_tiny as `save_pretrained(save_original_format=False)` writes it; no golden.npz
    mixtral_fused          mixtral_tiny likewise
    deepseek_v1_tiny       DeepSeekMoE as on the hub. transformers does not have it: its outputs are those of
                           `tests.models.numpy_deepseek` (float64), which agree with a Qwen2-MoE of the same function

`golden.npz` as `make_olmoe` describes it, with these differences:

    router_*        cover only the layers with experts; router_weights are what multiplies the experts' outputs, any
                    routed_scaling_factor included
    router_indices  by falling choice score (the logit, or sigmoid plus e_score_correction_bias), router_weights to
                    match; transformers asks for DeepSeek's without order
    expert_*        of the last layer with experts
    shared_output   [5, hidden], output of that layer's shared experts for expert_input, after their gate if they have
                    one; only in families that have shared experts
    dequantised     deepseek_v3_fp8 only: [out, in] uint16, the bfloat16 bits of the matrix metadata["dequantised_key"]
    metadata        also moe_layers, and the share of decisions that would be others without the bias or the groups

deepseek_v1_tiny's has only tokens, logits, router_*, hidden and metadata, whose float32_error is the difference of the
numpy model from transformers' float32 Qwen2-MoE. Tokens are drawn one after another so that every decision is farther
than `MIN_GAP` from a tie (`routing.Routing.gaps`). deepseek_v3_fp8's outputs are of the float32 model whose weights are
float8 times scale, rounded to bfloat16.
"""

import copy
import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # pyright: ignore[reportMissingImports]

from tests.golden import block_fp8
from tests.golden.common import (
    BATCH,
    FOLDER,
    LENGTH,
    MIN_GAP,
    Arrays,
    be_quiet,
    check_loaded,
    check_sizes,
    float32_errors,
    load,
    moe_layers,
    run,
    run_expert,
    versions,
    write_golden,
    write_model,
)
from tests.golden.family_configs import DEEPSEEK_V1, QUANTISED_BLOCK, VARIANTS, VOCAB, Config, Variant
from tests.golden.family_weights import Weights, is_sparse, make_next_token_layer, make_weights
from tests.golden.routing import Routing, choose_tokens
from tests.models import numpy_deepseek

EXPERT_INDEX = 5
DEQUANTISED_KEY = f"model.layers.1.mlp.experts.{EXPERT_INDEX}.down_proj.weight"
FUSED = {"olmoe_fused": "olmoe_tiny", "mixtral_fused": "mixtral_tiny"}


def routing_of(config: Config) -> Routing:
    """The rule that the config asks for."""
    top_k = config["num_experts_per_tok"]
    if config.get("topk_method") in ("group_limited_greedy", "noaux_tc"):
        kind = "sigmoid" if config["scoring_func"] == "sigmoid" else "softmax"
        return Routing(kind=kind, top_k=top_k, groups=config["n_group"], top_groups=config["topk_group"])
    return Routing(top_k=top_k)


def choice_biases(model: Any) -> npt.NDArray[np.float64] | None:
    """`e_score_correction_bias` of every MoE layer, `[M, 1, 1, experts]`."""
    gates = [model.model.layers[number].mlp.gate for number in moe_layers(model)]
    if not hasattr(gates[0], "e_score_correction_bias"):
        return None
    return np.stack([gate.e_score_correction_bias.double().numpy() for gate in gates])[:, None, None]


def run_sorted(model: Any, tokens: npt.NDArray[np.int32], routing: Routing) -> Arrays:
    """`common.run` with the chosen experts best first; they must be those of the routing rule."""
    arrays = run(model, tokens)
    expected = routing.choose(arrays["router_logits"], choice_biases(model))
    places = arrays["router_indices"][..., None, :] == expected[..., :, None]
    assert np.all(places.sum(axis=-1) == 1)
    for key in ("router_indices", "router_weights"):
        arrays[key] = np.take_along_axis(arrays[key], places.argmax(axis=-1), axis=-1)
    assert np.array_equal(arrays["router_indices"], expected)
    return arrays


def run_parts(model: Any, layer: int, inputs: npt.NDArray[np.float32]) -> Arrays:
    """One expert, and the shared experts with their gate, for every row of `inputs`."""
    arrays: Arrays = {"expert_output": run_expert(model, layer, EXPERT_INDEX, inputs)}
    mlp = model.model.layers[layer].mlp
    rows = torch.from_numpy(inputs).to(mlp.experts.down_proj.dtype)
    with torch.no_grad():
        if hasattr(mlp, "shared_expert"):
            arrays["shared_output"] = (torch.sigmoid(mlp.shared_expert_gate(rows)) * mlp.shared_expert(rows)).numpy()
        elif hasattr(mlp, "shared_experts"):
            arrays["shared_output"] = mlp.shared_experts(rows).numpy()
    return arrays


def other_choices(model: Any, golden: Arrays, routing: Routing) -> dict[str, float]:
    """Share of the decisions that would take other experts without the bias, or from all groups."""
    biases, logits = choice_biases(model), golden["router_logits"]
    found = {}
    if biases is not None:
        found["without_bias"] = routing.choose(logits, None)
    if routing.groups > 1:
        found["without_groups"] = dataclasses.replace(routing, groups=1, top_groups=1).choose(logits, biases)
    wanted = np.sort(golden["router_indices"], axis=-1)
    return {key: float(np.mean((np.sort(value, axis=-1) != wanted).any(axis=-1))) for key, value in found.items()}


def write_variant(variant: Variant, folder: pathlib.Path) -> tuple[Weights, Any, Arrays]:
    """Writes the model; returns its float32 weights, transformers' model of them and what else belongs to the file."""
    weights = make_weights(variant)
    if "quantization_config" not in variant.config:
        write_model(folder, variant.config, weights)
        return weights, load(folder), {}
    extra = make_next_token_layer(variant, weights)
    rng = np.random.default_rng(variant.seed + 2000)
    stored, meant = block_fp8.quantise(weights | extra, QUANTISED_BLOCK, rng)
    write_model(folder, variant.config, stored)
    plain = {key: meant[key] for key in weights}
    left_out = ("quantization_config", "num_nextn_predict_layers")
    config = {key: value for key, value in variant.config.items() if key not in left_out}
    with tempfile.TemporaryDirectory() as name:
        write_model(pathlib.Path(name), config, plain)
        model = load(pathlib.Path(name))
    return plain, model, {"dequantised": block_fp8.to_bfloat16(meant[DEQUANTISED_KEY])}


def make(variant: Variant) -> None:
    """Writes one directory, checks it and prints a line."""
    folder = FOLDER / variant.name
    weights, model, more = write_variant(variant, folder)
    check_loaded(model, weights)
    sparse = [number for number in range(variant.config["num_hidden_layers"]) if is_sparse(variant.config, number)]
    assert moe_layers(model) == sparse

    routing, biases = routing_of(variant.config), choice_biases(model)

    def gaps(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.floating[Any]]:
        return routing.gaps(run(model, tokens)["router_logits"], biases).min(axis=(0, 2))

    tokens = choose_tokens(gaps, (BATCH, LENGTH), VOCAB, variant.seed, 1.2 * MIN_GAP)
    rows = np.random.default_rng(variant.seed + 100).standard_normal((5, variant.config["hidden_size"]))
    expert_input = rows.astype(np.float32)
    golden = run_sorted(model, tokens, routing) | run_parts(model, sparse[-1], expert_input)
    min_gap = float(routing.gaps(golden["router_logits"], biases).min())
    assert min_gap > MIN_GAP, min_gap

    in_float64 = copy.deepcopy(model).double()
    exact = run_sorted(in_float64, tokens, routing) | run_parts(in_float64, sparse[-1], expert_input)
    errors = float32_errors(golden, exact)
    metadata = {
        "versions": versions(),
        "weight_seed": variant.seed,
        "token_seed": variant.seed,
        "moe_layers": sparse,
        "expert_layer": sparse[-1],
        "expert_index": EXPERT_INDEX,
        "min_gap": min_gap,
        "float32_error": errors,
    }
    others = other_choices(model, golden, routing)
    assert all(share > 0.1 for share in others.values()), others
    if others:
        metadata["other_choices"] = others
    if more:
        metadata["dequantised_key"] = DEQUANTISED_KEY
    write_golden(folder, metadata, {"tokens": tokens, "expert_input": expert_input} | golden | more)
    largest = {key: round(float(np.abs(golden[key]).max()), 2) for key in errors}
    used = [len(np.unique(indices)) for indices in golden["router_indices"]]
    print(f"{variant.name}: {check_sizes(folder)}, gap {min_gap:.2e}, experts used {used}, other choices {others}")
    print(f"  rope {model.config.rope_parameters}, cos/sin factor {model.model.rotary_emb.attention_scaling}")
    print(f"  largest {largest}\n  float32 errors { {key: f'{value:.1e}' for key, value in errors.items()} }")


def make_fused(name: str, source: str) -> None:
    """The layout in which transformers holds the source's experts: all of a layer in two tensors."""
    folder = FOLDER / name
    model = load(FOLDER / source)
    model.save_pretrained(folder, save_original_format=False)
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").chmod(0o644)
    state, again = model.state_dict(), load(folder).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    print(f"{name}: {check_sizes(folder)}")


def as_qwen2_moe(config: Config, weights: Weights) -> Any:
    """DeepSeekMoE as a Qwen2-MoE: the shared experts' gate is sigmoid(0) = 1/2, so their last matrix is doubled."""
    config = {key: value for key, value in config.items() if key != "auto_map"} | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "mlp_only_layers": list(range(config["first_k_dense_replace"])),
        "model_type": "qwen2_moe",
        "num_experts": config["n_routed_experts"],
        "qkv_bias": False,
        "shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
    }
    renamed: Weights = {}
    for key, value in weights.items():
        factor = np.float32(2 if "shared_experts.down_proj" in key else 1)
        renamed[key.replace("shared_experts", "shared_expert")] = factor * value
        if key.endswith("mlp.gate.weight"):
            renamed[key.replace("mlp.gate", "mlp.shared_expert_gate")] = np.zeros_like(value[:1])
    with tempfile.TemporaryDirectory() as name:
        write_model(pathlib.Path(name), config, renamed)
        return load(pathlib.Path(name))


def make_deepseek_v1() -> None:
    """Writes DeepSeekMoE's directory, with the outputs of the numpy model."""
    variant, folder = DEEPSEEK_V1, FOLDER / DEEPSEEK_V1.name
    weights, routing = make_weights(variant), routing_of(variant.config)
    write_model(folder, variant.config, weights)

    def gaps(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.floating[Any]]:
        logits = numpy_deepseek.forward(weights, variant.config, tokens)["router_logits"]
        return routing.gaps(logits, None).min(axis=(0, 2))

    tokens = choose_tokens(gaps, (BATCH, LENGTH), VOCAB, variant.seed, 1.2 * MIN_GAP)
    exact = numpy_deepseek.forward(weights, variant.config, tokens)
    min_gap = float(routing.gaps(exact["router_logits"], None).min())
    assert min_gap > MIN_GAP, min_gap
    other = run_sorted(as_qwen2_moe(variant.config, weights), tokens, routing)
    golden = {key: v.astype(np.int32 if key == "router_indices" else np.float32) for key, v in exact.items()}
    errors = float32_errors({key: other[key] for key in golden}, exact)
    assert max(errors.values()) < 2e-5, errors
    metadata = {
        "versions": versions(),
        "weight_seed": variant.seed,
        "token_seed": variant.seed,
        "moe_layers": list(range(variant.config["first_k_dense_replace"], variant.config["num_hidden_layers"])),
        "min_gap": min_gap,
        "float32_error": errors,
    }
    write_golden(folder, metadata, {"tokens": tokens} | golden)
    print(f"{variant.name}: {check_sizes(folder)}, gap {min_gap:.2e}, against transformers {errors}")


def main() -> None:
    """Makes the directories named on the command line, or all."""
    be_quiet()
    wanted = sys.argv[1:]
    for variant in VARIANTS:
        if not wanted or variant.name in wanted:
            make(variant)
    if not wanted or DEEPSEEK_V1.name in wanted:
        make_deepseek_v1()
    for name, source in FUSED.items():
        if not wanted or name in wanted:
            make_fused(name, source)


if __name__ == "__main__":
    main()
