"""Makes `olmoe_tiny/` and `olmoe_tiny_clip/`: two random OLMoE models in the hub's layout, with transformers' outputs.

Command, from the repository root, in an environment with numpy 2, torch 2.13 (CPU), safetensors and transformers 5
(checked with transformers 5.23.0, torch 2.13.0, safetensors 0.8.0, numpy 2.4.6):

    python -m tests.golden.make_olmoe

Cost: about 20 seconds on one thread. Running it again gives the same weights and tokens; the outputs may differ in
their last bits on a machine whose float32 matmul sums in another order.

Weights are drawn with numpy and written with the key of every expert's every matrix on its own, as OLMoE checkpoints
on the hub have them; transformers (which stacks experts in memory) then loads the directory, and its float32 forward
with its plainest code gives the expected values. The two models differ in everything that a config can say:

                       olmoe_tiny              olmoe_tiny_clip
    norm_topk_prob     false                   true
    clip_qkv           null                    0.8 (about 40 % of the values are clipped)
    rope theta         10000                   500
    rms_norm_eps       1e-5                    1e-3
    config.json        as on the hub           as transformers 5 writes it
                       (`rope_theta`,          (`rope_parameters`,
                       `torch_dtype`)          `dtype`)

Both: 2 layers, hidden 64, 4 heads, 2 key/value heads, 8 experts of 24 hidden units (with 32 the file would be too
large), top-2, vocabulary 128, untied head. Norm weights are not 1, and the padding token's embedding is not 0.
Tokens are chosen so that in every layer each pair of consecutive router scores, down to the first one not taken,
differs by more than `MIN_GAP`, in logit and in probability.

`golden.npz`, with L layers, B = 2, T = 24; all float32 unless said:

    tokens          [B, T] int32
    logits          [B, T, vocab]
    router_logits   [L, B, T, 8]
    router_indices  [L, B, T, 2] int32, best first
    router_weights  [L, B, T, 2], what multiplies the experts' outputs
    hidden          [L, B, T, 64], the residual stream after each layer, before the last norm
    attention_0     [B, T, 64], the first layer's attention after the output projection, before the residual is added
    expert_input    [5, 64]
    expert_output   [5, 64], one expert's MLP alone, without routing weight
    metadata        JSON string: versions, seeds, expert_layer, expert_index, min_gap, and float32_error: the largest
                    difference of each output from a run of the same model in float64 (in which transformers still
                    takes norms and softmax in float32)
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers  # pyright: ignore[reportMissingImports]

from tests.golden.common import (
    BATCH,
    FOLDER,
    LENGTH,
    MIN_GAP,
    be_quiet,
    check_loaded,
    check_sizes,
    float32_errors,
    load,
    run,
    run_expert,
    versions,
    write_golden,
    write_model,
)

LAYERS, HIDDEN, HEADS, KV_HEADS, EXPERTS, TOP_K, EXPERT_HIDDEN, VOCAB = 2, 64, 4, 2, 8, 2, 24, 128
EXPERT_LAYER, EXPERT_INDEX = 1, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What distinguishes the two models."""

    name: str
    seed: int
    norm_topk_prob: bool
    clip_qkv: float | None
    rope_theta: float
    rms_norm_eps: float
    hub_config: bool


VARIANTS = (
    Variant(
        name="olmoe_tiny",
        seed=1,
        norm_topk_prob=False,
        clip_qkv=None,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        hub_config=True,
    ),
    Variant(
        name="olmoe_tiny_clip",
        seed=2,
        norm_topk_prob=True,
        clip_qkv=0.8,
        rope_theta=500.0,
        rms_norm_eps=1e-3,
        hub_config=False,
    ),
)


def make_config(variant: Variant) -> dict[str, Any]:
    """config.json, with the keys of the hub's OLMoE or with those of transformers 5."""
    config: dict[str, Any] = {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": variant.clip_qkv,
        "eos_token_id": VOCAB - 1,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": EXPERT_HIDDEN,
        "max_position_embeddings": 64,
        "model_type": "olmoe",
        "norm_topk_prob": variant.norm_topk_prob,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": variant.rms_norm_eps,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    if variant.hub_config:
        return config | {"rope_scaling": None, "rope_theta": variant.rope_theta, "torch_dtype": "float32"}
    rope = {"rope_theta": variant.rope_theta, "rope_type": "default"}
    return config | {"bos_token_id": None, "dtype": "float32", "rope_parameters": rope}


def make_weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor under its key on the hub, matrices `[out, in]`; scales keep activations near 1."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return (scale * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    def norm(size: int) -> npt.NDArray[np.float32]:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    kv_size = HIDDEN // HEADS * KV_HEADS
    weights = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": norm(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_size, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_size, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.q_norm.weight": norm(HIDDEN),
            f"{prefix}.self_attn.k_norm.weight": norm(kv_size),
            f"{prefix}.post_attention_layernorm.weight": norm(HIDDEN),
            f"{prefix}.mlp.gate.weight": matrix(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            name = f"{prefix}.mlp.experts.{expert}"
            weights |= {
                f"{name}.gate_proj.weight": matrix(EXPERT_HIDDEN, HIDDEN),
                f"{name}.up_proj.weight": matrix(EXPERT_HIDDEN, HIDDEN),
                f"{name}.down_proj.weight": matrix(HIDDEN, EXPERT_HIDDEN, scale=3.0),
            }
    return weights | {"model.norm.weight": norm(HIDDEN), "lm_head.weight": matrix(VOCAB, HIDDEN)}


def smallest_gap(router_logits: npt.NDArray[Any]) -> float:
    """Least difference of consecutive scores among the best `TOP_K + 1`, in logit or probability."""
    scores = np.sort(router_logits.astype(np.float64), axis=-1)[..., ::-1]
    probabilities = np.exp(scores - scores[..., :1])
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    return min(float(np.min(-np.diff(values[..., : TOP_K + 1]))) for values in (scores, probabilities))


def choose_tokens(model: Any) -> tuple[int, npt.NDArray[np.int32]]:
    """The first seed whose tokens keep every routing decision away from ties, and its tokens."""
    for seed in range(1000):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
        tokens[0, 3], tokens[1, -1] = 1, 1  # the padding token is a token like any other
        if smallest_gap(run(model, tokens)["router_logits"]) > MIN_GAP:
            return seed, tokens
    raise RuntimeError(f"no seed below 1000 keeps every routing gap above {MIN_GAP}")


def clipped_share(model: Any, tokens: npt.NDArray[np.int32], limit: float) -> float:
    """Share of the first layer's queries, keys and values that lie beyond the clipping limit."""
    attention = model.model.layers[0].self_attn
    caught: list[Any] = []
    modules = (attention.q_norm, attention.k_norm, attention.v_proj)
    hooks = [m.register_forward_hook(lambda _m, _i, out: caught.append(out.detach().abs().clone())) for m in modules]
    run(model, tokens)
    for hook in hooks:
        hook.remove()
    return float(np.mean(np.concatenate([values.numpy().ravel() for values in caught]) > limit))


def make(variant: Variant) -> None:
    """Writes one directory, checks it and prints a line."""
    folder = FOLDER / variant.name
    weights = make_weights(variant.seed)
    write_model(folder, make_config(variant), weights)

    model = load(folder)
    check_loaded(model, weights)
    config = model.config
    read = (config.norm_topk_prob, config.clip_qkv, config.rms_norm_eps, config.rope_parameters["rope_theta"])
    assert read == (variant.norm_topk_prob, variant.clip_qkv, variant.rms_norm_eps, variant.rope_theta), read

    token_seed, tokens = choose_tokens(model)
    golden = run(model, tokens)
    expert_input = np.random.default_rng(variant.seed + 100).standard_normal((5, HIDDEN)).astype(np.float32)
    golden |= {"expert_output": run_expert(model, EXPERT_LAYER, EXPERT_INDEX, expert_input)}

    in_float64 = copy.deepcopy(model).double()
    exact = run(in_float64, tokens) | {
        "expert_output": run_expert(in_float64, EXPERT_LAYER, EXPERT_INDEX, expert_input)
    }
    errors = float32_errors(golden, exact)
    report = ""
    if variant.clip_qkv is not None:
        report = f", clipped {clipped_share(model, tokens, variant.clip_qkv):.0%}"

    metadata = {
        "versions": versions(),
        "weight_seed": variant.seed,
        "token_seed": token_seed,
        "expert_layer": EXPERT_LAYER,
        "expert_index": EXPERT_INDEX,
        "min_gap": smallest_gap(golden["router_logits"]),
        "float32_error": errors,
    }
    write_golden(folder, metadata, {"tokens": tokens, "expert_input": expert_input} | golden)
    sizes = check_sizes(folder)
    largest = {key: float(np.abs(golden[key]).max()) for key in errors}
    used = [len(np.unique(indices)) for indices in golden["router_indices"]]
    print(
        f"{variant.name}: {sizes}, token seed {token_seed}, gap {metadata['min_gap']:.2e}, experts used {used}{report}"
    )
    print(f"  largest values {largest}\n  float32 errors {errors}")


def main() -> None:
    """Makes both directories."""
    be_quiet()
    for variant in VARIANTS:
        make(variant)


if __name__ == "__main__":
    main()
