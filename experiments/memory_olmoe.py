"""Device memory of OLMoE-1B-7B for log-likelihoods of 4 x 2048 tokens, from the compiled programs' own analysis.

    python experiments/memory_olmoe.py

Nothing is loaded or run: the programs are compiled for shapes. Printed are the sizes of the arguments (parameters and
tokens), of the results, and of the temporary memory that XLA plans, for log-likelihoods by chunks
(`choice_log_probs`), for all logits (`forward`), and for an analog pass with all experts programmed. Figures depend on
the backend: XLA on CPU widens bfloat16 operands to float32, slice by slice (`hetmoe/ops/narrow.py`). Cost: half a
minute on two CPU cores.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from hetmoe.analog.programming import program
from hetmoe.analog.spec import analog_spec
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.transformer import forward, head_logits, hidden_states
from hetmoe.placement.plan import experts_analog

OLMOE_7B = ModelConfig(
    family="olmoe", vocab_size=50304, hidden_size=2048, num_layers=16, max_position_embeddings=4096,
    tie_embeddings=False, rms_norm_eps=1e-5, rope=Rope(theta=1e4), num_heads=16, num_kv_heads=16, head_dim=128,
    qk_norm="width", num_experts=64, experts_per_token=8, expert_intermediate_size=1024, norm_topk_prob=False,
)  # fmt: skip


def log_probs(params: Any, tokens: jax.Array, **analog: Any) -> jax.Array:
    """Log-probability of every next token."""
    nothing = dict.fromkeys(("plan", "spec", "programmed", "calibration", "read_key"))
    arguments: dict[str, Any] = nothing | analog
    hidden, _, _ = hidden_states(params, tokens[:, :-1], OLMOE_7B, **arguments)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return choice_log_probs(
        lambda part, first: head_logits(part, params, first_row=first, **arguments), flat, tokens[:, 1:].reshape(-1, 1)
    )


def main(
    batch: Annotated[int, typer.Option(help="Sequences.")] = 4,
    seq: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    dtype: Annotated[str, typer.Option(help="dtype of the weights.")] = "bfloat16",
) -> None:
    """Compile and print."""
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), abstract_params(OLMOE_7B), is_leaf=is_leaf
    )
    tokens = jax.ShapeDtypeStruct((batch, seq + 1), jnp.int32)
    spec = analog_spec("pcm")
    programmed = jax.eval_shape(lambda p: program(jax.random.key(0), p, spec, dense=False), params)
    plan = experts_analog(OLMOE_7B)

    def analog(p: Any, t: jax.Array, w: Any) -> jax.Array:
        return log_probs(p, t, plan=plan, spec=spec, programmed=w)

    cases = {
        "log-likelihoods, by chunks": (jax.jit(log_probs), (params, tokens)),
        "all logits": (jax.jit(lambda p, t: forward(p, t[:, :-1], OLMOE_7B)), (params, tokens)),
        "programming all experts": (jax.jit(lambda p: program(jax.random.key(0), p, spec, dense=False)), (params,)),
        "analog log-likelihoods": (jax.jit(analog), (params, tokens, programmed)),
    }
    device = jax.devices()[0]
    print(f"OLMoE-1B-7B, {dtype}, {batch} x {seq} tokens, compiled for {device.platform} ({device.device_kind})\n")
    print("| program | arguments GB | result GB | temporary GB | sum GB |")
    print("|---|---|---|---|---|")
    for name, (function, arguments) in cases.items():
        analysis = function.lower(*arguments).compile().memory_analysis()
        if analysis is None:
            raise SystemExit(f"the {device.platform} backend gives no memory analysis")
        sizes = [analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes]
        print(f"| {name} | " + " | ".join(f"{size / 1e9:.3f}" for size in [*sizes, sum(sizes)]) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
