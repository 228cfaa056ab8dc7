"""The decoder in plain float64 numpy, token by token and head by head: what the tests of the model compare against.

It shares no code with the package. Every product with a matrix that may be on a crossbar goes through `product`, so
that the same code serves as a digital and as an analog reference.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hetmoe.models.config import ModelConfig, Rope, Yarn
from hetmoe.models.params import Params

Float = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.integer[Any]]
# (matrix name, layer in model order, expert or 0, inputs [..., K], clean weights [K, N]) -> [..., N]
Product = Callable[[str, int, int, Float, Float], Float]


def digital(name: str, layer: int, expert: int, x: Float, w: Float) -> Float:
    """The product of a digital module."""
    del name, layer, expert
    return x @ w


def softmax(x: Float) -> Float:
    """Over the last axis."""
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def sigmoid(x: Float) -> Float:
    """Of each element."""
    return 1 / (1 + np.exp(-x))


def rms_norm(x: Float, gain: Float, eps: float) -> Float:
    """`gain * x / sqrt(mean(x^2) + eps)`."""
    return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def yarn_temperature(factor: float, mscale: float) -> float:
    """`0.1 mscale ln(factor) + 1`."""
    return 1 + 0.1 * mscale * math.log(factor)


def yarn_frequency(yarn: Yarn, theta: float, dim: int, pair: int) -> float:
    """Of one pair: kept where it turns often within the original context, divided by the factor where seldom."""

    def pair_turning(times: float) -> float:
        # Pair i turns `positions / (2 pi theta^(2 i / dim))` times within the context: solved for i.
        return dim / 2 * math.log(yarn.original_positions / (2 * math.pi * times)) / math.log(theta)

    first, last = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    slow = min(max((pair - first) / ((last - first) or 1e-3), 0.0), 1.0)
    plain = theta ** (-2.0 * pair / dim)
    return slow * plain / yarn.factor + (1 - slow) * plain


def rotary(x: Float, rope: Rope) -> Float:
    """`x[seq, dim]` of a head: pairs of elements as complex numbers, turned by `position * theta^(-2i/dim)`.

    Elements i and i + dim/2 are a pair, or 2i and 2i + 1; the result has all first elements, then all second ones.
    """
    seq, dim = x.shape
    half = dim // 2
    frequencies = rope.theta ** (-2.0 * np.arange(half) / dim) / (rope.linear or 1.0)
    factor = 1.0
    if rope.yarn is not None:
        yarn = rope.yarn
        frequencies = np.array([yarn_frequency(yarn, rope.theta, dim, pair) for pair in range(half)])
        factor = yarn_temperature(yarn.factor, 1.0)
        if yarn.mscale is not None and yarn.mscale_all_dim is not None:
            factor = yarn_temperature(yarn.factor, yarn.mscale) / yarn_temperature(yarn.factor, yarn.mscale_all_dim)
        if yarn.attention_factor is not None:
            factor = yarn.attention_factor
    angle = np.arange(seq)[:, None] * frequencies
    first, second = (x[:, 0::2], x[:, 1::2]) if rope.interleaved else (x[:, :half], x[:, half:])
    turned = factor * (first + 1j * second) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def attend(q: Float, k: Float, v: Float, scale: float, window: int | None = None) -> Float:
    """Causal attention over turned `[batch, seq, heads, dim]`, one query head, one query at a time."""
    batch, seq, heads, _ = q.shape
    out = np.zeros((batch, seq, heads, v.shape[-1]))
    for sequence, head, t in np.ndindex(batch, heads, seq):
        shared = head * k.shape[2] // heads
        first = 0 if window is None else max(0, t + 1 - window)
        weights = softmax(k[sequence, first : t + 1, shared] @ q[sequence, t, head] * scale)
        out[sequence, t, head] = weights @ v[sequence, first : t + 1, shared]
    return out.reshape(batch, seq, -1)


def turn(x: Float, rope: Rope) -> Float:
    """`rotary` of every head of `[batch, seq, heads, dim]`."""
    return np.stack([[rotary(part, rope) for part in heads.swapaxes(0, 1)] for heads in x]).swapaxes(1, 2)


def attention(q: Float, k: Float, v: Float, config: ModelConfig) -> Float:
    """Causal attention over `[batch, seq, width]`, queries and keys not yet turned."""
    q, k, v = (part.reshape(*part.shape[:2], -1, config.head_dim) for part in (q, k, v))
    return attend(turn(q, config.rope), turn(k, config.rope), v, 1 / np.sqrt(config.head_dim), config.sliding_window)


def attention_module(x: Float, weights: Any, config: ModelConfig, product: Product, index: int) -> Float:
    """Projections, plain or through latents, and attention over them."""
    eps = config.rms_norm_eps

    def project(name: str, values: Float) -> Float:
        out = product(name, index, 0, values, getattr(weights, name))
        bias = getattr(weights, f"{name}_bias", None)
        return out if bias is None else out + bias

    if config.latent is not None:
        return project("o", latent_attention(x, weights, config, project))
    q, k, v = project("q", x), project("k", x), project("v", x)
    if config.qk_norm == "width":
        q, k = rms_norm(q, weights.q_norm, eps), rms_norm(k, weights.k_norm, eps)
    if config.clip_qkv is not None:
        q, k, v = (np.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
    if config.qk_norm == "head":
        q, k = (
            rms_norm(part.reshape(*part.shape[:2], -1, config.head_dim), gain, eps).reshape(part.shape)
            for part, gain in ((q, weights.q_norm), (k, weights.k_norm))
        )
    return project("o", attention(q, k, v, config))


def latent_attention(x: Float, weights: Any, config: ModelConfig, project: Callable[[str, Float], Float]) -> Float:
    """A head's query and key: content from a latent, then a rotary part, which all keys share."""
    latent, heads, (batch, seq, _) = config.latent, config.num_heads, x.shape
    if latent.query_rank is None:
        q = project("q", x)
    else:
        q = project("q_b", rms_norm(project("q_a", x), weights.q_a_norm, latent.norm_eps))
    compressed = project("kv_a", x)
    kv = project("kv_b", rms_norm(compressed[..., : latent.kv_rank], weights.kv_a_norm, latent.norm_eps))
    q, kv = q.reshape(batch, seq, heads, -1), kv.reshape(batch, seq, heads, -1)
    shared = turn(compressed[..., None, latent.kv_rank :], config.rope)
    content, turned = q[..., : latent.content_dim], turn(q[..., latent.content_dim :], config.rope)
    keys = np.zeros((batch, seq, heads, config.head_dim))
    keys[..., : latent.content_dim] = kv[..., : latent.content_dim]
    for head in range(heads):
        keys[:, :, head, latent.content_dim :] = shared[:, :, 0]
    scale = 1 / np.sqrt(latent.content_dim + latent.rope_dim)
    yarn = config.rope.yarn
    if yarn is not None and yarn.mscale_all_dim is not None:
        scale *= yarn_temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    return attend(np.concatenate([content, turned], axis=-1), keys, kv[..., latent.content_dim :], scale)


def route_token(logits: Float, bias: Float | None, config: ModelConfig) -> tuple[list[int], Float]:
    """(experts, weights) of one token, best first, the lower index first among equals."""
    scores = sigmoid(logits) if config.router_score == "sigmoid" else softmax(logits)
    choice = [float(score) for score in (scores if bias is None else scores + bias)]
    allowed = list(range(len(choice)))
    if config.expert_groups is not None:
        size, best = len(choice) // config.expert_groups, 2 if config.group_score == "best_two" else 1
        groups = [allowed[start : start + size] for start in range(0, len(choice), size)]
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in groups]
        taken = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: config.groups_per_token]
        allowed = [expert for group in taken for expert in groups[group]]
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[: config.experts_per_token]
    weights = scores[chosen]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return chosen, weights * config.routed_scaling_factor


def route(x: Float, moe: Any, config: ModelConfig) -> tuple[Int, Float]:
    """(experts, weights) `[tokens, copies]`; `moe` has `router` and `selection_bias` of one layer."""
    routed = [route_token(token @ moe.router, moe.selection_bias, config) for token in x]
    return np.array([chosen for chosen, _ in routed]), np.array([weights for _, weights in routed])


def experts(x: Float, chosen: Int, weights: Float, swiglu: Any, product: Product, index: int) -> Float:
    """SwiGLU experts, one token copy at a time; `swiglu` has `gate`, `up` and `down` of one layer."""
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate = product("gate", index, expert, x[token], swiglu.gate[expert])
            up = product("up", index, expert, x[token], swiglu.up[expert])
            out[token] += weight * product("down", index, expert, gate / (1 + np.exp(-gate)) * up, swiglu.down[expert])
    return out


def feed_forward(x: Float, swiglu: Any, name: str, product: Product, index: int) -> Float:
    """SwiGLU of every token, of the shared experts or a dense layer."""
    gate = product(f"{name}_gate", index, 0, x, swiglu.gate)
    inner = gate * sigmoid(gate) * product(f"{name}_up", index, 0, x, swiglu.up)
    return product(f"{name}_down", index, 0, inner, swiglu.down)


def moe_module(x: Float, moe: Any, config: ModelConfig, product: Product, index: int) -> tuple[Float, Int]:
    """(output of `[tokens, hidden]`, experts chosen)."""
    chosen, weights = route(x, moe, config)
    out = experts(x, chosen, weights, moe.experts, product, index)
    if moe.shared is not None:
        shared = feed_forward(x, moe.shared, "shared", product, index)
        out = out + (shared if moe.shared_gate is None else sigmoid(x @ moe.shared_gate) * shared)
    return out, chosen


def forward(params: Params, tokens: Int, config: ModelConfig, product: Product) -> tuple[Float, list[Int]]:
    """(logits `[batch, seq, vocab]`, experts of every layer that has some `[tokens, copies]`)."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
    eps, routes = config.rms_norm_eps, []
    x = wide.embed[tokens]
    for index in range(config.num_layers):
        dense = index in config.dense_layers
        place = sum((before in config.dense_layers) == dense for before in range(index))
        layer = jax.tree.map(lambda leaf, i=place: leaf[i], wide.dense_layers if dense else wide.layers)
        x = x + attention_module(rms_norm(x, layer.input_norm, eps), layer.attention, config, product, index)
        normed = rms_norm(x, layer.ffn_norm, eps).reshape(-1, config.hidden_size)
        if dense:
            out = feed_forward(normed, layer.ffn, "ffn", product, index)
        else:
            out, chosen = moe_module(normed, layer.moe, config, product, index)
            routes.append(chosen)
        x = x + out.reshape(x.shape)
    head = wide.embed.T if wide.lm_head is None else wide.lm_head
    return product("lm_head", config.num_layers, 0, rms_norm(x, wide.final_norm, eps), head), routes
