"""Model configuration: one explicit field for every architectural difference."""

import dataclasses
from typing import Any, Literal

import numpy as np

from hetmoe.errors import InputError

# Which names a checkpoint uses for its tensors and config fields; the forward pass never looks at it.
Family = Literal["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3"]


# Limits that no model comes near, so that absurd sizes end at once.
MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 10_000, 100_000, 2**40


def _whole(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= MAX_SIZE  # type() because a bool is an int


def _positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")  # pyright: ignore[reportOperatorIssue]


def _check(fields: dict[str, object], accept: Any, must: str) -> None:
    for name, value in fields.items():
        if not accept(value):
            raise InputError(f"model config: {name}={value!r} must be {must}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretching of rotary frequencies by YaRN (Peng et al. 2023, arXiv 2309.00071).

    `factor` is the stretch, `original_positions` the context it was trained on; frequencies that turn more than
    `beta_fast` times within it stay, those that turn less than `beta_slow` times are divided by `factor`, with a linear
    ramp between; `truncate` rounds the ramp's ends outwards to whole elements. `attention_factor` multiplies cosine and
    sine (None = from `mscale` and `mscale_all_dim` or, without both, `0.1 ln(factor) + 1`).
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        positive = {f"yarn.{n}": getattr(self, n) for n in ("factor", "beta_fast", "beta_slow")}
        positive |= {
            f"yarn.{n}": v
            for n in ("mscale", "mscale_all_dim", "attention_factor")
            if (v := getattr(self, n)) is not None
        }
        _check(positive, _positive, "positive and finite")
        _check({"yarn.original_positions": self.original_positions}, _whole, "a whole number of at least 1")
        _check({"yarn.truncate": self.truncate}, lambda v: type(v) is bool, "True or False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    `theta` is the base of the frequencies, `linear` a division of all positions (None = off), `interleaved` pairs
    element 2i with 2i + 1 (DeepSeek-V2/V3) where the others pair i with i + dim / 2.
    """

    theta: float
    linear: float | None = None
    yarn: Yarn | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        _check({"rope.theta": self.theta}, _positive, "positive and finite")
        _check(
            {"rope.linear": self.linear}, lambda v: v is None or _positive(v), "positive and finite, or None for off"
        )
        if self.yarn is not None:  # its ramp is found by logarithms to this base
            _check({"rope.theta": self.theta}, lambda v: v > 1, "above 1 with YaRN")
        _check({"rope.interleaved": self.interleaved}, lambda v: type(v) is bool, "True or False")
        if self.linear is not None and self.yarn is not None:
            raise InputError("model config: rope.linear and rope.yarn exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    `query_rank` None = queries are projected directly. A head's query and key are `content_dim` elements without and
    `rope_dim` elements with rotary embedding (the key's rotary part is shared by all heads); its value has `value_dim`.
    `norm_eps` is the epsilon of the latents' RMS norms, 1e-6 in every published implementation whatever the model's.
    """

    query_rank: int | None
    kv_rank: int
    content_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = {f"latent.{n}": getattr(self, n) for n in ("kv_rank", "content_dim", "rope_dim", "value_dim")}
        if self.query_rank is not None:
            sizes["latent.query_rank"] = self.query_rank
        _check(sizes, _whole, "a whole number of at least 1")
        _check({"latent.norm_eps": self.norm_eps}, _positive, "positive and finite")
        if self.rope_dim % 2:
            raise InputError(f"model config: latent.rope_dim={self.rope_dim} must be even for rotary embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and options of a decoder-only mixture-of-experts language model.

    Static under `jax.jit` (hashable). Sizes are counts; `None` or False = off.

    Attention: `qk_norm` is an RMS norm of queries and keys over the whole width (OLMoE) or over each head (Qwen3);
    `clip_qkv` bounds the projections symmetrically; a query sees the last `sliding_window` positions; with `latent`
    the projections are those of latent attention and `head_dim` is the width of its queries and keys.

    Router: `router_score` turns logits into scores. `selection_bias` is added to the scores for the choice only
    (DeepSeek-V3). With `expert_groups` the experts come from the best `groups_per_token` groups, a group being scored
    by its best expert or by the sum of its best two (`group_score`). The chosen scores are divided by their sum if
    `norm_topk_prob`, then multiplied by `routed_scaling_factor`.

    Layers: those listed in `dense_layers` have one feed-forward network of `dense_intermediate_size`, the others
    experts. `shared_intermediate_size` is the width of all shared experts of a layer together (they are one SwiGLU);
    `shared_gate` multiplies their output by a sigmoid of the token.

    Raises:
        InputError: on construction, naming the field and the value that is out of range.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    tie_embeddings: bool
    rms_norm_eps: float
    rope: Rope
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["width", "head"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    latent: LatentAttention | None = None
    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool
    selection_bias: bool = False
    expert_groups: int | None = None
    groups_per_token: int | None = None
    group_score: Literal["best", "best_two"] | None = None
    routed_scaling_factor: float = 1.0
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "expert_intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "num_experts", "experts_per_token", "max_position_embeddings",
        )  # fmt: skip
        _check({n: getattr(self, n) for n in sizes}, _whole, "a whole number of at least 1 and at most 2^40")
        limits = (("num_layers", MAX_LAYERS), ("num_experts", MAX_EXPERTS))
        for name, most in limits:
            if getattr(self, name) > most:
                raise InputError(f"model config: {name}={getattr(self, name)} must be at most {most}")
        if self.num_layers * self.num_experts > 2 * MAX_EXPERTS:
            raise InputError(
                f"model config: num_layers={self.num_layers} times num_experts={self.num_experts} must be at most "
                f"{2 * MAX_EXPERTS}"
            )
        optional = ("sliding_window", "shared_intermediate_size", "dense_intermediate_size")
        given = {n: v for n in optional if (v := getattr(self, n)) is not None}
        _check(given, _whole, "a whole number of at least 1, or None for off")
        positive = ("rms_norm_eps", "routed_scaling_factor")
        _check({n: getattr(self, n) for n in positive}, _positive, "positive and finite")
        _check({"clip_qkv": self.clip_qkv}, lambda v: v is None or _positive(v), "positive and finite, or None for off")
        flags = ("norm_topk_prob", "tie_embeddings", "qkv_bias", "output_bias", "selection_bias", "shared_gate")
        _check({n: getattr(self, n) for n in flags}, lambda v: type(v) is bool, "True or False")
        self._check_attention()
        self._check_router()
        self._check_layers()

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.qk_norm not in (None, "width", "head"):
            raise InputError(f"model config: qk_norm={self.qk_norm!r} must be 'width', 'head' or None")
        if self.latent is None:
            if self.head_dim % 2:
                raise InputError(f"model config: head_dim={self.head_dim} must be even for rotary embeddings")
            return
        if self.head_dim != self.latent.content_dim + self.latent.rope_dim:
            raise InputError(
                f"model config: head_dim={self.head_dim} must be latent.content_dim + latent.rope_dim = "
                f"{self.latent.content_dim + self.latent.rope_dim}"
            )
        if self.num_kv_heads != self.num_heads:
            raise InputError(
                f"model config: latent attention needs num_kv_heads={self.num_kv_heads} equal to num_heads"
            )
        for name in ("qk_norm", "clip_qkv", "sliding_window"):
            if getattr(self, name) is not None:
                raise InputError(f"model config: {name}={getattr(self, name)!r} does not go with latent attention")

    def _check_router(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"model config: experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}"
            )
        if self.router_score not in ("softmax", "sigmoid"):
            raise InputError(f"model config: router_score={self.router_score!r} must be 'softmax' or 'sigmoid'")
        grouped = (self.expert_groups, self.groups_per_token, self.group_score)
        if grouped == (None, None, None):
            return
        _check(
            {"expert_groups": self.expert_groups, "groups_per_token": self.groups_per_token},
            _whole,
            "a whole number of at least 1 (all of expert_groups, groups_per_token and group_score, or none)",
        )
        if self.group_score not in ("best", "best_two"):
            raise InputError(f"model config: group_score={self.group_score!r} must be 'best' or 'best_two'")
        groups, taken = self.expert_groups or 1, self.groups_per_token or 1
        size = self.num_experts // groups
        if self.num_experts % groups or size < (2 if self.group_score == "best_two" else 1):
            raise InputError(
                f"model config: num_experts={self.num_experts} cannot be cut into expert_groups={groups} equal groups"
                + (" of at least 2" if self.group_score == "best_two" else "")
            )
        if taken > groups or taken * size < self.experts_per_token:
            raise InputError(
                f"model config: groups_per_token={taken} of {groups} groups of {size} experts cannot give "
                f"experts_per_token={self.experts_per_token}"
            )

    def _check_layers(self) -> None:
        layers = self.dense_layers
        if not isinstance(layers, tuple) or any(not _whole(i, 0) or i >= self.num_layers for i in layers):
            raise InputError(f"model config: dense_layers={layers!r} must be layer numbers below {self.num_layers}")
        if list(layers) != sorted(set(layers)):
            raise InputError(f"model config: dense_layers={layers!r} must be ascending and without repetition")
        if len(layers) == self.num_layers:
            raise InputError("model config: every layer is dense; a mixture-of-experts model has layers with experts")
        if bool(layers) != (self.dense_intermediate_size is not None):
            raise InputError(
                f"model config: dense_layers={layers!r} and dense_intermediate_size={self.dense_intermediate_size!r} "
                "go together: give both or neither"
            )
        if self.shared_gate and self.shared_intermediate_size is None:
            raise InputError("model config: shared_gate=True needs shared_intermediate_size")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the decoder layers that hold experts, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @property
    def runs(self) -> tuple[tuple[bool, int, int], ...]:
        """Runs of equal layers in order: (has experts, first, end), counted among the layers of that kind."""
        result: list[tuple[bool, int, int]] = []
        counts = {True: 0, False: 0}
        for layer in range(self.num_layers):
            kind = layer not in self.dense_layers
            if result and result[-1][0] == kind:
                result[-1] = (kind, result[-1][1], counts[kind] + 1)
            else:
                result.append((kind, counts[kind], counts[kind] + 1))
            counts[kind] += 1
        return tuple(result)


def check_tokens(tokens: Any, config: ModelConfig) -> None:
    """Raises InputError for token ids outside the vocabulary, which XLA would silently clamp. Not for traced values."""
    values = np.asarray(tokens)
    if values.size and not (values.min() >= 0 and values.max() < config.vocab_size):
        raise InputError(
            f"tokens reach from {values.min()} to {values.max()}, outside the vocabulary of {config.vocab_size}"
        )
