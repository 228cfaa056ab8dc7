"""Reading the `config.json` of the supported families, in the spellings of transformers 4 and 5."""

from collections.abc import Callable, Mapping
from typing import Any

from hetmoe.errors import InputError
from hetmoe.models.config import MAX_LAYERS, LatentAttention, ModelConfig
from hetmoe.models.hf_fields import Fields
from hetmoe.models.hf_rope import rope_from_hf

# Bookkeeping, training options and sampling defaults: none of them changes the logits of a text. (max_window_layers
# counts only with alternating windows, which are refused.)
_HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout",
    "auto_map", "aux_loss_alpha", "bos_token_id", "do_sample", "dtype", "eos_token_id", "ep_size",
    "generation_config", "initializer_range", "max_length", "max_window_layers", "model_type", "num_mtp_layers",
    "num_nextn_predict_layers", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "quantization_config", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "seq_aux", "temperature", "top_p", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
)  # fmt: skip


def _common(f: Fields) -> dict[str, Any]:
    f.ignore(*_HARMLESS)
    f.only("hidden_act", "silu")
    f.only("mlp_bias", False)
    f.only("partial_rotary_factor", 1.0, 1)
    heads, layers = f.get(int, "num_attention_heads"), f.get(int, "num_hidden_layers")
    if layers > MAX_LAYERS:  # before anyone counts them
        raise InputError(f"{f.source}: num_hidden_layers={layers} must be at most {MAX_LAYERS}")
    return {
        "vocab_size": f.get(int, "vocab_size"),
        "hidden_size": f.get(int, "hidden_size"),
        "num_layers": layers,
        "max_position_embeddings": f.get(int, "max_position_embeddings"),
        "tie_embeddings": f.get(bool, "tie_word_embeddings", default=False),
        "rms_norm_eps": f.get(float, "rms_norm_eps"),
        "num_heads": heads,
        "num_kv_heads": f.get(int, "num_key_value_heads", default=heads),
        "experts_per_token": f.get(int, "num_experts_per_tok"),
    }


def _head_dim(f: Fields, common: dict[str, Any]) -> int:
    given = f.get(int, "head_dim", default=None)
    if given is not None:
        return given
    heads, hidden = common["num_heads"], common["hidden_size"]
    if heads < 1 or hidden % heads:
        raise InputError(f"{f.source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return hidden // heads


def _olmoe(f: Fields) -> dict[str, Any]:
    common = _common(f)
    f.only("attention_bias", False)
    return common | {
        "head_dim": _head_dim(f, common),
        "rope": rope_from_hf(f, yarn=True),
        "qk_norm": "width",
        "clip_qkv": f.get(float, "clip_qkv", default=None),
        "num_experts": f.get(int, "num_experts", "num_local_experts"),
        "expert_intermediate_size": f.get(int, "intermediate_size"),
        "norm_topk_prob": f.get(bool, "norm_topk_prob"),
    }


def _mixtral(f: Fields) -> dict[str, Any]:
    common = _common(f)
    return common | {
        "head_dim": _head_dim(f, common),
        "rope": rope_from_hf(f, yarn=True),
        "sliding_window": f.get(int, "sliding_window", default=None),
        "num_experts": f.get(int, "num_local_experts", "num_experts"),
        "expert_intermediate_size": f.get(int, "intermediate_size"),
        "norm_topk_prob": True,
    }


def _qwen(f: Fields) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE share."""
    common = _common(f)
    layers, step = common["num_layers"], f.get(int, "decoder_sparse_step", default=1)
    listed = f.get(list, "mlp_only_layers", default=[])
    if step < 1:
        raise InputError(f"{f.source}: decoder_sparse_step={step} must be at least 1")
    if any(type(i) is not int or not 0 <= i < layers for i in listed):
        raise InputError(f"{f.source}: mlp_only_layers={listed} must be layer numbers below num_hidden_layers={layers}")
    dense = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
    width = f.get(int, "intermediate_size", default=None)
    if dense and width is None:
        raise InputError(f"{f.source}: field 'intermediate_size' is missing, the width of the dense layers {dense}")
    return common | {
        "head_dim": _head_dim(f, common),
        "rope": rope_from_hf(f, yarn=True),
        "num_experts": f.get(int, "num_experts", "num_local_experts"),
        "expert_intermediate_size": f.get(int, "moe_intermediate_size"),
        "norm_topk_prob": f.get(bool, "norm_topk_prob"),
        "dense_layers": dense,
        "dense_intermediate_size": width if dense else None,
    }


def _qwen2_moe(f: Fields) -> dict[str, Any]:
    # Its window alternates between layers; without use_sliding_window the width is not used.
    f.only("use_sliding_window", False)
    f.ignore("sliding_window")
    _only_full_attention(f)
    return _qwen(f) | {
        "qkv_bias": f.get(bool, "qkv_bias", default=True),
        "shared_intermediate_size": f.get(int, "shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def _only_full_attention(f: Fields) -> None:
    types = f.get(list, "layer_types", default=[])
    if any(t != "full_attention" for t in types):
        raise InputError(f"{f.source}: layer_types={types} is not supported (supported: 'full_attention' everywhere)")


def _qwen3_moe(f: Fields) -> dict[str, Any]:
    window = f.get(int, "sliding_window", default=None)
    used = f.get(bool, "use_sliding_window", default=False)
    if used and window is None:
        raise InputError(f"{f.source}: use_sliding_window=True needs sliding_window")
    bias = f.get(bool, "attention_bias", default=False)
    for name, only in (("qkv_bias", False), ("use_qk_norm", True), ("shared_expert_intermediate_size", 0)):
        f.only(name, only)  # some files spell out what the family is
    _only_full_attention(f)
    return _qwen(f) | {
        "qk_norm": "head",
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_window": window if used else None,
    }


def _deepseek_moe(f: Fields) -> dict[str, Any]:
    """What the three DeepSeek generations share."""
    common = _common(f)
    layers, first = common["num_layers"], f.get(int, "first_k_dense_replace", default=0)
    frequency = f.get(int, "moe_layer_freq", default=1)
    if first < 0 or frequency < 1:
        raise InputError(
            f"{f.source}: first_k_dense_replace={first} must be at least 0 and moe_layer_freq={frequency} at least 1"
        )
    dense = tuple(i for i in range(layers) if i < first or i % frequency)
    inner, shared = f.get(int, "moe_intermediate_size"), f.get(int, "n_shared_experts", default=None)
    if shared is not None and shared < 1:
        raise InputError(f"{f.source}: n_shared_experts={shared} must be at least 1, or null for none")
    width = f.get(int, "intermediate_size", default=None)
    if dense and width is None:
        raise InputError(f"{f.source}: field 'intermediate_size' is missing, the width of the dense layers {dense}")
    bias, normed = f.get(bool, "attention_bias", default=False), f.get(bool, "norm_topk_prob")
    if normed and common["experts_per_token"] == 1:  # published codes disagree on whether one weight becomes 1
        raise InputError(f"{f.source}: norm_topk_prob=True is not supported with num_experts_per_tok=1")
    return common | {
        "output_bias": bias,
        "qkv_bias": bias,
        "num_experts": f.get(int, "n_routed_experts", "num_experts", "num_local_experts"),
        "expert_intermediate_size": inner,
        "norm_topk_prob": normed,
        "shared_intermediate_size": None if shared is None else shared * inner,
        "dense_layers": dense,
        "dense_intermediate_size": width if dense else None,
    }


def _deepseek(f: Fields) -> dict[str, Any]:
    f.only("scoring_func", "softmax")
    f.only("routed_scaling_factor", 1.0, 1)
    config = _deepseek_moe(f)
    return config | {"head_dim": _head_dim(f, config), "rope": rope_from_hf(f, yarn=False)}


def _latent(f: Fields) -> dict[str, Any]:
    latent = LatentAttention(
        query_rank=f.get(int, "q_lora_rank", default=None),
        kv_rank=f.get(int, "kv_lora_rank"),
        content_dim=f.get(int, "qk_nope_head_dim"),
        rope_dim=f.get(int, "qk_rope_head_dim"),
        value_dim=f.get(int, "v_head_dim"),
    )
    width = latent.content_dim + latent.rope_dim
    f.only("head_dim", latent.rope_dim)  # as transformers 5 writes it
    f.only("qk_head_dim", width)
    return {"latent": latent, "head_dim": width}


def _groups(f: Fields, score: str) -> dict[str, Any]:
    groups, taken = f.get(int, "n_group"), f.get(int, "topk_group")
    if groups == 1 and taken == 1:
        return {}
    return {"expert_groups": groups, "groups_per_token": taken, "group_score": score}


def _deepseek_v2(f: Fields) -> dict[str, Any]:
    f.only("scoring_func", "softmax")
    config = _deepseek_moe(f) | _latent(f)
    method = f.get(str, "topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise InputError(
            f"{f.source}: topk_method={method!r} is not supported (supported: 'greedy' or 'group_limited_greedy')"
        )
    groups: dict[str, Any] = {}
    if method == "greedy":
        f.ignore("n_group", "topk_group")
    else:
        groups = _groups(f, "best")
    if config["norm_topk_prob"]:
        # DeepSeek's code then leaves the scaling factor out, transformers' leaves the norm out.
        raise InputError(
            f"{f.source}: norm_topk_prob=True is not supported for deepseek_v2 (published ones have False)"
        )
    return config | groups | {
        "rope": rope_from_hf(f, yarn=True, interleaved=True),
        "routed_scaling_factor": f.get(float, "routed_scaling_factor", default=1.0),
    }  # fmt: skip


def _deepseek_v3(f: Fields) -> dict[str, Any]:
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    interleaved = f.get(bool, "rope_interleave", default=True)
    return _deepseek_moe(f) | _latent(f) | _groups(f, "best_two") | {
        "rope": rope_from_hf(f, yarn=True, interleaved=interleaved),
        "router_score": "sigmoid",
        "selection_bias": True,
        "routed_scaling_factor": f.get(float, "routed_scaling_factor"),
    }  # fmt: skip


ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


_READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


def config_from_hf(config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Reads the content of a `config.json`, in the spelling of transformers 4 or 5.

    Fields that change the arithmetic and are not supported, and fields that are not known, are refused by name.

    Raises:
        InputError: naming `source`, the field, what was found and what is expected.
    """
    fields = Fields(config, source)
    family = config.get("model_type")
    reader = _READERS.get(family) if isinstance(family, str) else None
    if not isinstance(family, str) or reader is None:
        raise InputError(f"{source}: model_type {family!r} is not supported (supported: {', '.join(_READERS)})")
    named = fields.get(list, "architectures", default=[ARCHITECTURES[family]])
    if ARCHITECTURES[family] not in named:
        raise InputError(f"{source}: architectures={named} contradicts model_type {family!r} ({ARCHITECTURES[family]})")
    try:
        values = reader(fields)
        fields.refuse_unread()
        return ModelConfig(family=family, **values)  # pyright: ignore[reportArgumentType]
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from None  # of a config class, which knows no file
