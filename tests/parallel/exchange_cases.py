"""Sends token copies to their experts' devices and back, under even and uneven loads; a process of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hetmoe.parallel import exchange
from hetmoe.parallel.exchange import capacity, through_owners
from hetmoe.parallel.mesh import make_mesh
from hetmoe.parallel.shard import TOKENS, Shard

TOKENS_HERE, COPIES, EXPERTS_HERE, HIDDEN, COLUMNS = 40, 3, 5, 6, 4


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation says, from all operands at once."""
    parts = jax.lax.axis_size(axis_name)
    me = jax.lax.axis_index(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, begins, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    row = jnp.arange(output.shape[0])
    for source in range(parts):
        assert recv_sizes.shape == (parts,)
        inside = row - places[source, me]
        size = jnp.minimum(sizes[source, me], recv_sizes[source])
        values = operands[source][jnp.clip(begins[source, me] + inside, 0, operand.shape[0] - 1)]
        output = jnp.where(((inside >= 0) & (inside < size))[:, None], values, output)
    return output


def network(rows, expert, numbers):
    """Something of everything; rows without a copy give NaN, which must not be seen."""
    out = rows[:, :COLUMNS] * (1.0 + expert) + 1000.0 * jax.lax.axis_index("expert") + numbers.astype(jnp.float32) / 8
    return jnp.where(expert < EXPERTS_HERE, out, jnp.nan)[:, None]


def run(shard: Shard, chosen: np.ndarray, *, one_round: bool) -> np.ndarray:
    mesh, count = make_mesh(shard), chosen.shape[0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((count, HIDDEN)), jnp.float32)
    numbers = jnp.arange(chosen.size, dtype=jnp.uint32).reshape(chosen.shape)

    def local(x, chosen, numbers):
        return through_owners(
            network, x, chosen, numbers, experts=EXPERTS_HERE, columns=COLUMNS, shard=shard, one_round=one_round
        )

    spec = P(TOKENS)
    go = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False))
    found = np.asarray(go(x, jnp.asarray(chosen), numbers))
    owner, local_expert = np.divmod(chosen, EXPERTS_HERE)
    wanted = np.asarray(x)[:, None, :COLUMNS] * (1.0 + local_expert[..., None]).astype(np.float32)
    wanted = (
        wanted
        + np.float32(1000) * owner[..., None].astype(np.float32)
        + np.asarray(numbers)[..., None].astype(np.float32) / 8
    )
    wanted = np.where((owner < shard.expert)[..., None], wanted, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    return found


def main() -> None:
    rng = np.random.default_rng(1)
    for shard in (Shard(expert=4), Shard(data=2, expert=2, tensor=2), Shard(expert=8)):
        count, experts = TOKENS_HERE * shard.data * shard.expert, EXPERTS_HERE * shard.expert
        even = np.stack([rng.permutation(experts)[:COPIES] for _ in range(count)]).astype(np.int32)
        skewed = np.broadcast_to(np.arange(COPIES, dtype=np.int32), even.shape)  # all copies to the first device
        half = np.where(rng.random((count, 1)) < 0.5, even, skewed).astype(np.int32)
        nowhere = np.where(rng.random((count, 1)) < 0.3, experts, even).astype(np.int32)
        rows, most = capacity(TOKENS_HERE, COPIES, EXPERTS_HERE, shard)
        print(shard, rows, most)
        for chosen in (even, skewed, half, nowhere):
            together = run(shard, chosen, one_round=True)
            np.testing.assert_array_equal(run(shard, chosen, one_round=False), together)
    # On CPU the padded exchange is what runs; the ragged one is given to it under the names of its arguments.
    jax.lax.ragged_all_to_all = emulated
    exchange.jax.lax.platform_dependent = lambda *arguments, **ways: ways["tpu"](*arguments)
    shard = Shard(expert=4)
    for chosen in (half[: 4 * TOKENS_HERE] % (4 * EXPERTS_HERE), nowhere[: 4 * TOKENS_HERE] % (4 * EXPERTS_HERE)):
        run(shard, chosen, one_round=False)
    print("ragged")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
