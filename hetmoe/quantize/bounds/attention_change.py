"""How far attention's output moves when the tokens' normed inputs do.

Inputs are bounded as `|dn_u| <= radius_u`, where n_u is token u's RMS-normed state without the norm's gain (gains are
part of the matrices behind). Scores, `s = scale q k`, change by

    ds = scale (dq k + q dk + dq dk),

and the attention weights p to `p' = p e^ds / sum p e^ds`. With y_u, what value u adds to the output through the head's
output projection, and o = sum p y,

    o' - o = sum_u p'_u (y'_u - y_u) + sum_u p'_u (y_u - o).

As the p-weighted mean of y_u - o is 0, the second sum is `sum_u p_u (e^ds_u - 1) (y_u - o) / sum_u p_u e^ds_u`. With
bounds `|ds| <= tau` and `scale |q dk + dq dk| <= rest`, and `|e^x - 1 - x| <= e^|x| - 1 - |x|`, its numerator is at
most

    |scale C dq| + sum_u p_u (rest_u + e^tau_u - 1 - tau_u) |y_u - o|,

where C is the p-weighted covariance of y and k: one change of the query moves all scores together. The denominator is
at least `sum_u p_u e^-tau_u`. A mean of y_u - o, the second sum is also at most the largest |y_u - o|.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Attention
from hetmoe.quantize.bounds.attention import Heads, head_outputs, score_scale, sees, turn_back, turn_rows
from hetmoe.quantize.bounds.attention_norms import AttentionNorms
from hetmoe.quantize.bounds.head_moves import Moves, head_moves
from hetmoe.quantize.bounds.matrix_norms import stacked_spectral_norms
from hetmoe.quantize.bounds.rounding import rounding, widened

Array = np.ndarray

POSITIONS = 32  # of a head, whose turned matrices are held at once
LARGEST_TAU = 300.0  # its powers stay far from float64's ends; beyond it only the largest |y - o| is used


def attention_change(
    heads: Heads,
    norms: AttentionNorms,
    weights: Attention,
    radii: list[Float64[Array, "batch seq"]],
    config: ModelConfig,
) -> list[Float64[Array, "batch seq"]]:
    """Bounds the change of what attention adds to the residual stream, for each token, at several radii.

    Args:
        heads: of the clean run.
        norms: of this layer.
        weights: of this layer in float64.
        radii: of the normed inputs, without the norm's gain.
        config: of the model.
    """
    moves = [head_moves(heads, norms, weights, radius, config) for radius in radii]
    totals = [np.zeros_like(radius) for radius in radii]
    for part in _head_geometries(heads, norms, weights, config):
        batch, head, shared = part.batch, part.head, part.shared
        for (q, k, value), total in zip(moves, totals, strict=True):
            tau, rest, first = _score_changes(part, _of_head(q, batch, head), _of_head(k, batch, shared))
            total[batch] += _moved_weights(part, tau, rest, first)
            total[batch] += _moved_values(part, tau, value[batch] * norms.value_out[head])
            total[batch] += part.lost
    return [widened(total) for total in totals]


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """One head on one sequence of the clean run; `[queries, keys]` are over positions, keys that are not seen are 0."""

    batch: int
    head: int
    shared: int  # its key head
    scale: float
    seen: Array
    share: Array  # attention weights
    q_size: Array  # [queries]
    k_size: Array  # [keys]
    apart: Array  # |y_u - o|
    q_factor: Array  # largest change of a score, before its scale, for a change of the input of the query projection
    k_factor: Array  # likewise of the key projection
    products: Array  # |q k|
    spread: Array  # [queries], spectral norm of C
    spread_input: Array  # [queries], of C times the transposed query projection
    spread_own: Array  # [queries], |C q|
    lost: float  # rounding of the output
    score_lost: float  # rounding of scores, in units of |q| |k|


def _of_head(moves: Moves, batch: int, head: int) -> Moves:
    return Moves(*(getattr(moves, field.name)[batch, :, head] for field in dataclasses.fields(Moves)))


def _head_geometries(
    heads: Heads, norms: AttentionNorms, weights: Attention, config: ModelConfig
) -> Iterator[_Geometry]:
    o, seq = head_outputs(weights, config), heads.q.shape[1]
    seen, scale = sees(seq, config.sliding_window), score_scale(config)
    width = config.num_heads * config.head_dim + seq
    for head, shared, shares in heads.weights(config):
        out = norms.out_triangles[head]
        for batch, share in enumerate(shares):
            q, k, v = heads.q[batch, :, head], heads.k[batch, :, shared], heads.v[batch, :, shared]
            q_size, k_size = np.linalg.norm(q, axis=1), np.linalg.norm(k, axis=1)
            pairs = (v[:, :, None] * k[:, None, :]).reshape(seq, -1)
            covariance = (share @ pairs).reshape(seq, v.shape[1], -1) - (share @ v)[:, :, None] * (share @ k)[
                :, None, :
            ]
            covariance = out @ covariance
            off = rounding(width, float(np.linalg.norm(out) * np.linalg.norm(v, axis=1).max() * k_size.max()))
            if config.latent is None:
                q_map, k_map = norms.linear["q"].triangles[head], norms.linear["k"].triangles[shared]
                q_factor = _turned_sizes(k, q_map, config)
                k_factor = _turned_sizes(q, k_map, config).T
                back = turn_back(covariance, np.arange(seq), config)
                into = stacked_spectral_norms(back @ q_map.T) + off * np.linalg.norm(q_map)
            else:  # its queries and keys come from latents: bounded by their lengths
                q_factor = k_factor = np.full((seq, seq), np.inf)
                into = np.full(seq, np.inf)
            yield _Geometry(
                batch=batch, head=head, shared=shared, scale=scale, seen=seen, share=share, q_size=q_size,
                k_size=k_size, apart=_distances(share, v @ o[head]), q_factor=q_factor, k_factor=k_factor,
                products=np.abs(q @ k.T), spread=stacked_spectral_norms(covariance) + off, spread_input=into,
                spread_own=np.linalg.norm(np.squeeze(covariance @ q[:, :, None], 2), axis=1) + off * q_size,
                lost=rounding(width + config.hidden_size, float(norms.value_size[head])),
                score_lost=rounding(config.head_dim, 1.0),
            )  # fmt: skip


def _turned_sizes(turned: Array, matrix: Array, config: ModelConfig) -> Array:
    """`|B R_t^-1 x_u|` of turned vectors x_u, `[t, u]`, for the rotation R_t of position t and B given by its triangle.

    It is the matrix that is turned: `B R_t^-1` has the rows of B, turned forwards.
    """
    seq, sizes = len(turned), list[Array]()
    for first in range(0, seq, POSITIONS):
        positions = np.arange(first, min(first + POSITIONS, seq))
        rows = turn_rows(np.broadcast_to(matrix, (len(positions), *matrix.shape)), positions, config)
        sizes.append(np.linalg.norm(turned @ np.swapaxes(rows, 1, 2), axis=2))
    lost = rounding(matrix.size + len(matrix), float(np.linalg.norm(matrix)))
    return np.concatenate(sizes) + lost * np.linalg.norm(turned, axis=1)


def _distances(share: Array, y: Array) -> Array:
    """Of each y_u from each o, from above."""
    o = share @ y
    squared = np.sum(np.square(y), axis=1)[None, :] + np.sum(np.square(o), axis=1)[:, None]
    # The difference cancels.
    return np.sqrt(np.maximum(squared - 2 * (o @ y.T), 0) + rounding(y.shape[1] + len(y), squared))


def _times(left: Array, right: Array) -> Array:
    """Products in which infinity times 0 is 0: nothing moves."""
    with np.errstate(invalid="ignore"):
        product = left * right
    return np.where((left == 0) | (right == 0), 0.0, product)


def _score_changes(part: _Geometry, q: Moves, k: Moves) -> tuple[Array, Array, Array]:
    """Bounds tau and `rest` of changes of scores, and of `|scale C dq|`."""
    dq, dk = q.size[:, None], k.size[None, :]
    by_query = np.minimum(
        dq * part.k_size,
        _times(part.q_factor, q.through[:, None])
        + _times(part.products, q.own[:, None])
        + q.lost[:, None] * part.k_size,
    )
    by_key = np.minimum(
        part.q_size[:, None] * dk,
        _times(part.k_factor, k.through[None, :])
        + _times(part.products, k.own[None, :])
        + part.q_size[:, None] * k.lost,
    )
    rounded = part.score_lost * part.q_size[:, None] * part.k_size
    rest = part.scale * widened(by_key + dq * dk + rounded)
    first = np.minimum(
        part.spread * q.size,
        _times(part.spread_input, q.through) + _times(part.spread_own, q.own) + part.spread * q.lost,
    )
    rest = np.where(part.seen, rest, 0.0)
    return np.where(part.seen, widened(rest + part.scale * by_query), 0.0), rest, widened(part.scale * first)


def _moved_weights(part: _Geometry, tau: Array, rest: Array, first: Array) -> Array:
    """Bounds `sum_u p'_u (y_u - o)`."""
    farthest = np.max(np.where(part.seen, part.apart, 0.0), axis=1)
    small = np.minimum(tau, LARGEST_TAU)
    each = part.share * part.apart
    together = np.sum(each * np.expm1(small), axis=1)
    # By Taylor's formula the power's remainder is at most x^2 / 2 e^x; close to 0 the difference of powers cancels.
    remainder = np.minimum(np.expm1(small), np.square(small) / 2 * np.exp(small))
    split = first + np.sum(each * (rest + remainder), axis=1)
    sums = np.minimum(together, split) / np.sum(part.share * np.exp(-small), axis=1)
    return np.where(np.max(tau, axis=1) <= LARGEST_TAU, np.minimum(sums, farthest), farthest)


def _moved_values(part: _Geometry, tau: Array, change: Array) -> Array:
    """Bounds `sum_u p'_u (y'_u - y_u)`, by the largest p'_u that the changes of scores admit, or by the largest change.

    p'_u is largest if its own score rises and all others fall.
    """
    largest = np.max(np.where(part.seen, change[None, :], 0.0), axis=1)
    small = np.minimum(tau, LARGEST_TAU)
    up, down = part.share * np.exp(small), part.share * np.exp(-small)
    others = np.maximum(np.sum(down, axis=1, keepdims=True) - down, 0)
    most = np.where(up > 0, up / np.maximum(up + others, np.finfo(np.float64).tiny), 0.0)
    sums = np.sum(most * change[None, :], axis=1)
    return np.where(np.max(tau, axis=1) <= LARGEST_TAU, np.minimum(sums, largest), largest)
