"""Model configuration: one explicit field for every architectural difference."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from hetmoe.errors import InputError


def _positive(value: object) -> bool:
    return type(value) in {int, float} and 0 < cast("float", value) < float("inf")


def _checked_rope(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Refuses by name what would change the arithmetic; returns the rope parameters of transformers 5, if any."""
    if not isinstance(config, Mapping):
        raise InputError(f"{source}: expected a JSON object, found {type(config).__name__}")
    if config.get("model_type") != "olmoe":
        raise InputError(f"{source}: model_type {config.get('model_type')!r} is not supported (supported: 'olmoe')")
    supported = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None, "attention_dropout": 0.0}
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise InputError(f"{source}: {name}={config[name]!r} is not supported (supported: {value!r})")
    rope = config.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise InputError(f"{source}: rope_parameters={rope!r} must be an object")
    for name in ("rope_type", "type"):
        if rope.get(name, "default") != "default":
            raise InputError(f"{source}: {name}={rope[name]!r} is not supported (supported: 'default')")
    return rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and options of a decoder-only mixture-of-experts language model.

    Static under `jax.jit` (hashable). Sizes are counts; `rope_theta` is the base of the rotary
    frequencies in radians per position; `clip_qkv` bounds the projections symmetrically (None = off).

    Raises:
        InputError: on construction, naming the field and the value that is out of range.
    """

    vocab_size: int
    hidden_size: int
    expert_intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    clip_qkv: float | None
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_embeddings: bool

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "expert_intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "num_experts", "experts_per_token", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"model config: {name}={value!r} must be a whole number of at least 1")
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"model config: experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"model config: head_dim={self.head_dim} must be even for rotary embeddings")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _positive(value):
                raise InputError(f"model config: {name}={value!r} must be positive and finite")
        if self.clip_qkv is not None and not _positive(self.clip_qkv):
            raise InputError(f"model config: clip_qkv={self.clip_qkv!r} must be positive and finite, or None for off")
        for name in ("norm_topk_prob", "tie_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"model config: {name}={getattr(self, name)!r} must be True or False")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "config.json") -> "ModelConfig":
        """Reads the `config.json` of a Hugging Face OLMoE checkpoint (transformers 4 or 5 spelling).

        Fields that change the arithmetic and are not supported are refused by name, never ignored.

        Raises:
            InputError: naming `source`, the field, what was found and what is expected.
        """
        rope = _checked_rope(config, source)

        def field(name: str, kind: type) -> Any:
            if name not in config:
                raise InputError(f"{source}: field {name!r} is missing")
            value = config[name]
            if kind is float and type(value) is int and abs(value) < 2**53:  # exact as a float
                value = float(value)
            if type(value) is not kind:
                raise InputError(f"{source}: {name}={value!r} must be {kind.__name__}")
            return value

        theta = rope.get("rope_theta", config.get("rope_theta"))
        if type(theta) not in {int, float} or not 0 < theta < 1e300:  # type() because a bool is an int
            raise InputError(f"{source}: neither rope_theta nor rope_parameters.rope_theta is a positive number")
        heads, hidden = field("num_attention_heads", int), field("hidden_size", int)
        head_dim = config.get("head_dim")
        if head_dim is None:
            if heads < 1 or hidden % heads:
                raise InputError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
            head_dim = hidden // heads
        clip = config.get("clip_qkv")
        return cls(
            vocab_size=field("vocab_size", int),
            hidden_size=hidden,
            expert_intermediate_size=field("intermediate_size", int),
            num_layers=field("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=field("num_key_value_heads", int),
            head_dim=head_dim,
            num_experts=field("num_experts", int),
            experts_per_token=field("num_experts_per_tok", int),
            norm_topk_prob=field("norm_topk_prob", bool),
            clip_qkv=None if clip is None else field("clip_qkv", float),
            rms_norm_eps=field("rms_norm_eps", float),
            rope_theta=float(theta),
            max_position_embeddings=field("max_position_embeddings", int),
            tie_embeddings=field("tie_word_embeddings", bool),
        )

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Reads a `config.json`. Raises InputError for a file that is absent or is not JSON."""
        try:
            return cls.from_hf(json.loads(path.read_text(encoding="utf-8")), source=str(path))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; a model directory holds config.json and *.safetensors") from None
        except InputError:
            raise
        except (ValueError, RecursionError, OSError) as error:  # not JSON, not UTF-8, nested too deep, not readable
            raise InputError(f"{path}: not readable as JSON ({error})") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` content that `from_hf` reads back to an equal config."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "norm_topk_prob": self.norm_topk_prob,
            "clip_qkv": self.clip_qkv,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": None,
        }


def check_tokens(tokens: Any, config: ModelConfig) -> None:
    """Raises InputError for token ids outside the vocabulary, which XLA would silently clamp. Not for traced values."""
    values = np.asarray(tokens)
    if values.size and not (values.min() >= 0 and values.max() < config.vocab_size):
        raise InputError(
            f"tokens reach from {values.min()} to {values.max()}, outside the vocabulary of {config.vocab_size}"
        )
