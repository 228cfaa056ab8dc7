"""Random weights of the tiny models of `make_families`, under the hub's keys."""

import numpy as np
import numpy.typing as npt

from tests.golden.family_configs import VOCAB, Config, Variant

Weights = dict[str, npt.NDArray[np.float32]]


def is_sparse(config: Config, layer: int) -> bool:
    """Whether the layer has routed experts."""
    if config["model_type"] == "mixtral":
        return True
    if "first_k_dense_replace" in config:
        return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0
    return layer not in config.get("mlp_only_layers", []) and (layer + 1) % config["decoder_sparse_step"] == 0


class Draw:
    """Random tensors of one model, always in the same order; scales keep activations near 1."""

    def __init__(self, config: Config, seed: int, down_scale: float) -> None:
        self.config, self.down_scale = config, down_scale
        self.hidden: int = config["hidden_size"]
        self.rng = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        """`[out, in]`, outputs of variance `scale^2` for inputs of variance 1."""
        return (scale * columns**-0.5 * self.rng.standard_normal((rows, columns))).astype(np.float32)

    def norm(self, size: int) -> npt.NDArray[np.float32]:
        """Gains around 1."""
        return (1 + 0.2 * self.rng.standard_normal(size)).astype(np.float32)

    def bias(self, size: int, mean: float = 0.0, scale: float = 0.4) -> npt.NDArray[np.float32]:
        """Values that matter beside outputs of variance 1."""
        return (mean + scale * self.rng.standard_normal(size)).astype(np.float32)

    def linear(self, name: str, rows: int, columns: int, *, biased: bool, scale: float = 1.0) -> Weights:
        """`name.weight` and perhaps `name.bias`."""
        weights = {f"{name}.weight": self.matrix(rows, columns, scale)}
        return weights | ({f"{name}.bias": self.bias(rows)} if biased else {})

    def attention(self, prefix: str) -> Weights:
        """Grouped-query attention."""
        config, hidden = self.config, self.hidden
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        everywhere = config.get("attention_bias", False)
        biased = everywhere or config["model_type"] == "qwen2_moe"
        weights = self.linear(f"{prefix}.q_proj", heads * head_dim, hidden, biased=biased)
        weights |= self.linear(f"{prefix}.k_proj", kv_heads * head_dim, hidden, biased=biased)
        weights |= self.linear(f"{prefix}.v_proj", kv_heads * head_dim, hidden, biased=biased)
        weights |= self.linear(f"{prefix}.o_proj", hidden, heads * head_dim, biased=everywhere)
        if config["model_type"] == "qwen3_moe":
            weights |= {f"{prefix}.q_norm.weight": self.norm(head_dim), f"{prefix}.k_norm.weight": self.norm(head_dim)}
        return weights

    def latent_attention(self, prefix: str) -> Weights:
        """DeepSeek's; latents are small, so that the epsilon of their norms shows."""
        config, hidden, biased = self.config, self.hidden, self.config["attention_bias"]
        heads, rank, q_rank = config["num_attention_heads"], config["kv_lora_rank"], config["q_lora_rank"]
        nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        if q_rank is None:
            weights = self.linear(f"{prefix}.q_proj", heads * (nope + rope), hidden, biased=False)
        else:
            weights = self.linear(f"{prefix}.q_a_proj", q_rank, hidden, biased=biased, scale=0.3)
            weights[f"{prefix}.q_a_layernorm.weight"] = self.norm(q_rank)
            weights |= self.linear(f"{prefix}.q_b_proj", heads * (nope + rope), q_rank, biased=False)
        weights |= self.linear(f"{prefix}.kv_a_proj_with_mqa", rank + rope, hidden, biased=biased, scale=0.3)
        weights[f"{prefix}.kv_a_proj_with_mqa.weight"][rank:] *= 3  # the rotary key has no norm
        weights[f"{prefix}.kv_a_layernorm.weight"] = self.norm(rank)
        weights |= self.linear(f"{prefix}.kv_b_proj", heads * (nope + v_dim), rank, biased=False)
        return weights | self.linear(f"{prefix}.o_proj", hidden, heads * v_dim, biased=biased)

    def gated(self, prefix: str, width: int, down_scale: float = 3.0) -> Weights:
        """A gated MLP; Mixtral's experts number its matrices."""
        mixtral = self.config["model_type"] == "mixtral"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        return {
            f"{prefix}.{gate}.weight": self.matrix(width, self.hidden),
            f"{prefix}.{up}.weight": self.matrix(width, self.hidden),
            f"{prefix}.{down}.weight": self.matrix(self.hidden, width, down_scale),
        }

    def sparse(self, prefix: str) -> Weights:
        """Router, experts and shared experts."""
        config = self.config
        experts = next(config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config)
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        weights = {f"{prefix}.gate.weight": self.matrix(experts, self.hidden)}
        if config.get("scoring_func") == "sigmoid":  # some scores negative: experts of other groups are not at 0
            weights[f"{prefix}.gate.e_score_correction_bias"] = self.bias(experts, -0.6, 0.15)
        for expert in range(experts):
            weights |= self.gated(f"{prefix}.experts.{expert}", width, self.down_scale)
        if "shared_expert_intermediate_size" in config:
            weights |= self.gated(f"{prefix}.shared_expert", config["shared_expert_intermediate_size"])
            weights[f"{prefix}.shared_expert_gate.weight"] = self.matrix(1, self.hidden)
        if "n_shared_experts" in config:
            weights |= self.gated(f"{prefix}.shared_experts", width * config["n_shared_experts"])
        return weights

    def layer(self, number: int) -> Weights:
        """A decoder layer."""
        prefix = f"model.layers.{number}"
        weights = {f"{prefix}.input_layernorm.weight": self.norm(self.hidden)}
        attention = self.latent_attention if "kv_lora_rank" in self.config else self.attention
        weights |= attention(f"{prefix}.self_attn")
        weights[f"{prefix}.post_attention_layernorm.weight"] = self.norm(self.hidden)
        if not is_sparse(self.config, number):
            return weights | self.gated(f"{prefix}.mlp", self.config["intermediate_size"])
        mixtral = self.config["model_type"] == "mixtral"
        return weights | self.sparse(f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp")


def make_weights(variant: Variant) -> Weights:
    """Every tensor under its key on the hub, matrices `[out, in]`, in float32 and without extra layers."""
    draw = Draw(variant.config, variant.seed, variant.down_scale)
    hidden = draw.hidden
    weights = {"model.embed_tokens.weight": draw.rng.standard_normal((VOCAB, hidden)).astype(np.float32)}
    for number in range(variant.config["num_hidden_layers"]):
        weights |= draw.layer(number)
    weights["model.norm.weight"] = draw.norm(hidden)
    if variant.config["tie_word_embeddings"]:
        weights["model.embed_tokens.weight"] *= np.float32(hidden**-0.5)
        return weights
    return weights | {"lm_head.weight": draw.matrix(VOCAB, hidden)}


def make_next_token_layer(variant: Variant, weights: Weights) -> Weights:
    """DeepSeek-V3's layer after the last, which predicts one token more and which only training needs."""
    number = variant.config["num_hidden_layers"]
    draw = Draw(variant.config, variant.seed + 1000, variant.down_scale)
    prefix, hidden = f"model.layers.{number}", draw.hidden
    return draw.layer(number) | {
        f"{prefix}.embed_tokens.weight": weights["model.embed_tokens.weight"],
        f"{prefix}.enorm.weight": draw.norm(hidden),
        f"{prefix}.hnorm.weight": draw.norm(hidden),
        f"{prefix}.eh_proj.weight": draw.matrix(hidden, 2 * hidden),
        f"{prefix}.shared_head.norm.weight": draw.norm(hidden),
        f"{prefix}.shared_head.head.weight": weights["lm_head.weight"],
    }
