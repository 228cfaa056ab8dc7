"""Shapes of the cases of `bench_kernels.py`, and the least work that each of them needs."""

import dataclasses

from hetmoe.models.config import ModelConfig
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import packed_bytes
from memory_olmoe import OLMOE_7B

BYTES, RESULT_BYTES = 2, 4  # of operands, and of products, which are float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of all cases; `floor_bytes` is the array whose copying gives the bandwidth."""

    side: int
    tokens: int
    decode_tokens: int
    seeds: int
    sequences: int
    seq: int
    floor_bytes: int
    config: ModelConfig

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.config.hidden_size * self.config.expert_intermediate_size


FULL = Sizes(
    side=8192, tokens=16384, decode_tokens=32, seeds=8, sequences=8, seq=2048, floor_bytes=2**28, config=OLMOE_7B
)
SMALL = Sizes(
    side=256, tokens=128, decode_tokens=8, seeds=2, sequences=2, seq=16, floor_bytes=2**22,
    config=dataclasses.replace(
        OLMOE_7B, vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
        num_experts=8, experts_per_token=2, expert_intermediate_size=32,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that any program does: multiplications and additions of the matmuls, bytes of operands and results."""

    operations: int
    bytes: int

    def times(self, count: int) -> "Work":
        return Work(self.operations * count, self.bytes * count)


def crossbar_work(sizes: Sizes) -> Work:
    area = sizes.side**2
    return Work(2 * sizes.side**3, (2 * BYTES + RESULT_BYTES) * area)


def grouped_work(sizes: Sizes, tokens: int, busy: int) -> Work:
    """Gate, up and down, each read once, of the `busy` experts that have tokens."""
    copies, hidden, inner = counts(sizes, tokens)
    rows = BYTES * (hidden + inner) + RESULT_BYTES * (2 * inner + hidden)
    return Work(2 * copies * sizes.expert_weights, BYTES * busy * sizes.expert_weights + copies * rows)


def quantized_work(sizes: Sizes, tokens: int, busy: int, grid: Grid) -> Work:
    """As `grouped_work`, of packed weights."""
    plain, (_, hidden, inner) = grouped_work(sizes, tokens, busy), counts(sizes, tokens)
    packed = 2 * packed_bytes(hidden, inner, grid) + packed_bytes(inner, hidden, grid)
    return Work(plain.operations, plain.bytes + busy * (packed - BYTES * sizes.expert_weights))


def backward_work(sizes: Sizes, tokens: int) -> Work:
    """Two matmuls for each of the forward pass; the gradient of idle experts is written as well."""
    copies, hidden, inner = counts(sizes, tokens)
    rows = 2 * BYTES * (hidden + inner) + RESULT_BYTES * (2 * inner + hidden)
    weights = 2 * BYTES * sizes.config.num_experts * sizes.expert_weights
    return Work(4 * copies * sizes.expert_weights, weights + copies * rows)


def seed_work(sizes: Sizes, tokens: int, busy: int) -> Work:
    """One seed: the clean weights and the tokens are read, and the tokens' results written; no draws."""
    copies, hidden, _ = counts(sizes, tokens)
    moved = BYTES * (busy * sizes.expert_weights + 2 * tokens * hidden)
    return Work(2 * copies * sizes.expert_weights, moved)


def model_work(sizes: Sizes) -> Work:
    """One seed: all weights but the embedding are read once; a position attends to itself and those before it."""
    c, tokens = sizes.config, sizes.sequences * sizes.seq
    attention = 4 * c.hidden_size * c.num_heads * c.head_dim
    router, head = c.hidden_size * c.num_experts, c.hidden_size * c.vocab_size
    used = c.num_layers * (attention + router + c.experts_per_token * sizes.expert_weights) + head
    stored = c.num_layers * (attention + router + c.num_experts * sizes.expert_weights) + head
    pairs = sizes.sequences * sizes.seq * (sizes.seq + 1) // 2
    scores = c.num_layers * 4 * pairs * c.num_heads * c.head_dim
    return Work(2 * tokens * used + scores, BYTES * stored)


def counts(sizes: Sizes, tokens: int) -> tuple[int, int, int]:
    """(copies of tokens, hidden width, inner width)."""
    c = sizes.config
    return tokens * c.experts_per_token, c.hidden_size, c.expert_intermediate_size
