"""The decoder in plain float64 numpy, token by token and head by head: what the tests of the model compare against.

It shares no code with the package. Every product with a matrix that may be on a crossbar goes through `product`, so
that the same code serves as a digital and as an analog reference.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params

Float = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.integer[Any]]
# (matrix name, layer, expert or 0, inputs [..., K], clean weights [K, N]) -> [..., N]
Product = Callable[[str, int, int, Float, Float], Float]


def digital(name: str, layer: int, expert: int, x: Float, w: Float) -> Float:
    """The product of a digital module."""
    del name, layer, expert
    return x @ w


def softmax(x: Float) -> Float:
    """Over the last axis."""
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def rms_norm(x: Float, gain: Float, eps: float) -> Float:
    """`gain * x / sqrt(mean(x^2) + eps)`."""
    return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def rotary(x: Float, theta: float) -> Float:
    """`x[seq, dim]` of a head: elements i and i + dim/2 as a complex number, turned by `position * theta^(-2i/dim)`."""
    seq, dim = x.shape
    angle = np.arange(seq)[:, None] * theta ** (-2.0 * np.arange(dim // 2) / dim)
    turned = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def attention(q: Float, k: Float, v: Float, config: ModelConfig) -> Float:
    """Causal attention over `[batch, seq, width]`, one query head, one query at a time."""
    dim, out = config.head_dim, np.zeros_like(q)
    for sequence in range(q.shape[0]):
        for head in range(config.num_heads):
            shared = head * config.num_kv_heads // config.num_heads
            mine, theirs = slice(head * dim, (head + 1) * dim), slice(shared * dim, (shared + 1) * dim)
            queries = rotary(q[sequence, :, mine], config.rope_theta)
            keys = rotary(k[sequence, :, theirs], config.rope_theta)
            for t in range(q.shape[1]):
                weights = softmax(keys[: t + 1] @ queries[t] / np.sqrt(dim))
                out[sequence, t, mine] = weights @ v[sequence, : t + 1, theirs]
    return out


def route(x: Float, router: Float, copies: int, normed: bool) -> tuple[Int, Float]:
    """(experts, weights) `[tokens, copies]`, best first, the lower index first among equals."""
    scores = softmax(x @ router)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :copies]
    weights = np.take_along_axis(scores, chosen, axis=1)
    return chosen, weights / weights.sum(axis=1, keepdims=True) if normed else weights


def experts(x: Float, chosen: Int, weights: Float, layer: Any, product: Product, index: int) -> Float:
    """SwiGLU experts, one token copy at a time; `layer` has `gate`, `up` and `down` of one layer."""
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate = product("gate", index, expert, x[token], layer.gate[expert])
            up = product("up", index, expert, x[token], layer.up[expert])
            out[token] += weight * product("down", index, expert, gate / (1 + np.exp(-gate)) * up, layer.down[expert])
    return out


def forward(params: Params, tokens: Int, config: ModelConfig, product: Product) -> tuple[Float, list[Int]]:
    """(logits `[batch, seq, vocab]`, experts of every layer `[tokens, copies]`)."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
    eps, routes = config.rms_norm_eps, []
    x = wide.embed[tokens]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], wide.layers)
        normed = rms_norm(x, layer.input_norm, eps)
        q = rms_norm(product("q", index, 0, normed, layer.q), layer.q_norm, eps)
        k = rms_norm(product("k", index, 0, normed, layer.k), layer.k_norm, eps)
        v = product("v", index, 0, normed, layer.v)
        if config.clip_qkv is not None:
            q, k, v = (np.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        x = x + product("o", index, 0, attention(q, k, v, config), layer.o)
        normed = rms_norm(x, layer.moe_norm, eps).reshape(-1, config.hidden_size)
        chosen, weights = route(normed, layer.router, config.experts_per_token, config.norm_topk_prob)
        routes.append(chosen)
        x = x + experts(normed, chosen, weights, layer, product, index).reshape(x.shape)
    head = wide.embed.T if wide.lm_head is None else wide.lm_head
    return product("lm_head", config.num_layers, 0, rms_norm(x, wide.final_norm, eps), head), routes
