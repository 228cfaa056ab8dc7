"""Blocks of real models come in numbers that a TPU kernel can share weights among."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hetmoe.ops.dispatch import dispatch
from hetmoe.ops.grouped_crossbar.block_sizes import BLOCKS_MULTIPLE, choose, rows_per_block
from hetmoe.ops.grouped_crossbar.pallas_tpu import SUM_BYTES, group_size


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("copies", [6, 8], ids=["deepseek", "olmoe"])
def test_blocks_share_tiles_of_weights(copies: int, tokens: int) -> None:
    """OLMoE at 16,384 tokens needs 1087 blocks, a prime: without padding every block would fetch its own weights."""
    rows = rows_per_block(tokens * copies, 64)
    sizes = choose("tpu", rows=rows, tile=512, columns=1024, matrices=2, item_bytes=2, is_drawn=False, has_chip=True)
    cut = functools.partial(dispatch, num_experts=64, block_size=rows, multiple=BLOCKS_MULTIPLE)
    plan = jax.eval_shape(cut, jax.ShapeDtypeStruct((tokens, copies), jnp.int32))
    of_a_block = 2 * rows * sizes.columns * 4  # running sums of gate and up
    assert group_size(plan.block_expert.shape[0], of_a_block) >= min(8, SUM_BYTES // of_a_block)
