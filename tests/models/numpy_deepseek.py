"""DeepSeekMoE (the first DeepSeek with experts) in plain float64 numpy, token by token and expert by expert.

Written after the published `modeling_deepseek.py` of deepseek-moe-16b-base; transformers does not have this model. It
shares no code with the package: tensors are those of the checkpoint, under their keys and `[out, in]`.

The blocks are Llama's. The first `first_k_dense_replace` layers have an ordinary gated MLP; the others, where
`moe_layer_freq` divides the layer's number, have a router that takes the `num_experts_per_tok` largest of the softmax
over all experts, as they are or (`norm_topk_prob`) divided by their sum, and add shared experts with weight 1.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.integer[Any]]
Tensors = dict[str, npt.NDArray[Any]]
Config = dict[str, Any]


def softmax(x: Float) -> Float:
    """Over the last axis."""
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def rms_norm(x: Float, gain: Float, eps: float) -> Float:
    """Over the last axis."""
    return gain * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def rotate(x: Float, theta: float) -> Float:
    """Rotary positions of one head `[T, dim]`: element i turns with element i + dim/2."""
    length, dim = x.shape
    half = dim // 2
    angle = np.outer(np.arange(length), theta ** (-2.0 * np.arange(half) / dim))
    cos, sin, first, second = np.cos(angle), np.sin(angle), x[:, :half], x[:, half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def attention(x: Float, tensors: Tensors, prefix: str, config: Config) -> Float:
    """Causal attention of one sequence `[T, hidden]`, head by head."""
    heads, kv_heads, theta = config["num_attention_heads"], config["num_key_value_heads"], config["rope_theta"]
    q, k, v = (x @ tensors[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    dim = q.shape[1] // heads
    future = np.triu(np.ones((len(x), len(x)), bool), 1)
    outputs = []
    for head in range(heads):
        mine = slice(head * dim, (head + 1) * dim)
        start = head // (heads // kv_heads) * dim
        shared = slice(start, start + dim)
        scores = rotate(q[:, mine], theta) @ rotate(k[:, shared], theta).T / np.sqrt(dim)
        outputs.append(softmax(np.where(future, -np.inf, scores)) @ v[:, shared])
    return np.concatenate(outputs, axis=1) @ tensors[f"{prefix}.o_proj.weight"].T


def gated_mlp(x: Float, tensors: Tensors, prefix: str) -> Float:
    """`down(silu(gate(x)) * up(x))`, of one token or several."""
    gate, up = x @ tensors[f"{prefix}.gate_proj.weight"].T, x @ tensors[f"{prefix}.up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{prefix}.down_proj.weight"].T


def experts_of(logits: Float, config: Config) -> tuple[Int, Float]:
    """The chosen experts of one token, best first, and their weights."""
    probabilities = softmax(logits)
    chosen = np.argsort(-probabilities, kind="stable")[: config["num_experts_per_tok"]]
    weights = probabilities[chosen]
    return chosen, weights / (weights.sum() + 1e-20) if config["norm_topk_prob"] else weights


def sparse_mlp(x: Float, tensors: Tensors, prefix: str, config: Config) -> tuple[Float, Float, Int, Float]:
    """Output, router logits, chosen experts and their weights of one sequence."""
    logits = x @ tensors[f"{prefix}.gate.weight"].T
    output = gated_mlp(x, tensors, f"{prefix}.shared_experts") if config["n_shared_experts"] else np.zeros_like(x)
    indices, weights = [], []
    for position, token in enumerate(x):
        chosen, factors = experts_of(logits[position], config)
        for expert, factor in zip(chosen, factors, strict=True):
            output[position] += factor * gated_mlp(token, tensors, f"{prefix}.experts.{expert}")
        indices.append(chosen)
        weights.append(factors)
    return output, logits, np.stack(indices), np.stack(weights)


def sequence_forward(tensors: Tensors, config: Config, tokens: Int) -> dict[str, list[Any]]:
    """What `forward` returns, of one sequence, as a list over layers."""
    eps = config["rms_norm_eps"]
    found: dict[str, list[Any]] = {"hidden": [], "router_logits": [], "router_indices": [], "router_weights": []}
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, tensors[f"{prefix}.input_layernorm.weight"], eps)
        x = x + attention(normed, tensors, f"{prefix}.self_attn", config)
        normed = rms_norm(x, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
        if layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0:
            output, *routing = sparse_mlp(normed, tensors, f"{prefix}.mlp", config)
            for key, value in zip(("router_logits", "router_indices", "router_weights"), routing, strict=True):
                found[key].append(value)
        else:
            output = gated_mlp(normed, tensors, f"{prefix}.mlp")
        x = x + output
        found["hidden"].append(x)
    normed = rms_norm(x, tensors["model.norm.weight"], eps)
    return found | {"logits": [normed @ tensors["lm_head.weight"].T]}


def forward(tensors: Tensors, config: Config, tokens: Int) -> dict[str, npt.NDArray[Any]]:
    """The model in float64.

    Args:
        tensors: every tensor of the checkpoint.
        config: config.json.
        tokens: `[B, T]`.

    Returns:
        logits `[B, T, vocab]`; hidden `[layers, B, T, hidden]` after each layer; and of the layers with experts
        router_logits `[M, B, T, experts]`, router_indices and router_weights `[M, B, T, top_k]`, best first.
    """
    assert config["scoring_func"] == "softmax" and config["rope_scaling"] is None and config["hidden_act"] == "silu"
    wide = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
    rows = [sequence_forward(wide, config, row) for row in tokens]
    stacked = {key: np.stack([np.stack(row[key]) for row in rows], axis=1) for key in rows[0]}
    return stacked | {"logits": stacked["logits"][0]}
