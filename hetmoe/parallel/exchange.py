"""Token copies travel to the devices of their experts, and their results back.

Every copy is sent as a row of its own, and comes back as a row of float32, so that a token's results are added up where
the token is, in the order and precision of a single device. Sending a token once per device and adding there would be
less traffic, but another sum.

No copy is dropped and memory stays bounded whatever the load: in one round a device sends at most `capacity` copies to
every other one, and there are as many rounds as the fullest pair of devices needs. Where the backend has
`ragged_all_to_all` (TPU, GPU), only rows that hold a copy are sent; elsewhere all `capacity` are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from hetmoe.parallel.shard import AXES, Shard

# (rows [R, hidden], expert of each row [R, 1], number of each copy [R, 1]) -> [R, 1, columns], float32
Network = Callable[[Array, Array, Array], Array]
SLACK = 2  # capacity over a balanced load: fuller pairs of devices take another round
ALIGNED = 8  # rows


def capacity(tokens: int, copies: int, experts: int, shard: Shard) -> tuple[int, int]:
    """(rows that one device sends to another in a round, most rows that it could have for it).

    Args:
        tokens: of one device.
        copies: of a token, each for another expert.
        experts: of one device.
        shard: how many devices there are.
    """
    most = tokens * min(copies, experts)
    wanted = -(-SLACK * tokens * copies // shard.expert)
    return min(most, -(-wanted // ALIGNED) * ALIGNED), most


def through_owners(
    network: Network,
    x: Float[Array, "tokens hidden"],
    chosen: Int[Array, "tokens copies"],
    numbers: UInt32[Array, "tokens copies"],
    *,
    experts: int,
    columns: int,
    shard: Shard,
    one_round: bool,
) -> Float[Array, "tokens copies columns"]:
    """What the experts' devices make of every token copy.

    Args:
        network: of one device's experts, which are numbered from 0; `experts` stands for a row without a copy, whose
            result means nothing.
        x: this device's tokens.
        chosen: their experts, numbered over all devices; a number past the last is of a copy that goes nowhere, whose
            result is 0.
        numbers: of the copies.
        experts: of one device.
        columns: of the results.
        shard: the mesh.
        one_round: send everything at once, in buffers for the worst load: the network is then called once.
    """
    tokens, copies = chosen.shape
    rows, most = capacity(tokens, copies, experts, shard)
    if one_round:
        rows = most
    flat, parts = chosen.reshape(-1), shard.expert
    owner, local = jnp.divmod(flat, experts)
    to_owner = owner[:, None] == jnp.arange(parts, dtype=owner.dtype)[None, :]
    running = jnp.cumsum(to_owner.astype(jnp.int32), axis=0)
    known = jnp.minimum(owner, parts - 1)
    rank = jnp.take_along_axis(running, known[:, None], axis=1)[:, 0] - 1  # among the copies for the same device
    labels = jnp.stack([local.astype(jnp.uint32), numbers.reshape(-1)], axis=1)
    empty = jnp.array([[experts, 0]], jnp.uint32)

    def one(number: Array | int, found: Array) -> Array:
        place = rank - number * rows
        inside = (owner < parts) & (place >= 0) & (place < rows)
        order = jnp.arange(flat.size, dtype=jnp.int32)
        slot = jnp.where(inside, owner * rows + place, parts * rows + order)  # all different; the latter are none
        copy = jnp.full((parts * rows,), flat.size, jnp.int32)
        copy = copy.at[slot].set(order, mode="drop", unique_indices=True)
        sent = jnp.clip(running[-1] - number * rows, 0, rows)
        received = _all_to_all(sent[:, None])[:, 0]
        held = jnp.minimum(copy, flat.size - 1) // copies
        inputs = _exchange(jnp.where((copy < flat.size)[:, None], x[held], 0), sent, received, rows)
        # A few bytes per row, and what is not sent has to be marked: always padded.
        marks = _all_to_all(jnp.concatenate([labels, empty])[copy])
        expert, numbered = marks[:, :1].astype(jnp.int32), marks[:, 1:]
        results = _exchange(network(inputs, expert, numbered)[:, 0], received, sent, rows)
        return jnp.where(inside[:, None], results[jnp.minimum(slot, parts * rows - 1)], found)

    nothing = jnp.zeros((flat.size, columns), jnp.float32)
    if rows >= most:
        return one(0, nothing).reshape(tokens, copies, columns)
    fullest = jax.lax.pmax(jnp.max(running[-1]), AXES)  # all devices take as many rounds
    rounds = -(-fullest // rows)
    _, found = jax.lax.while_loop(
        lambda state: state[0] < rounds, lambda state: (state[0] + 1, one(*state)), (jnp.zeros((), jnp.int32), nothing)
    )
    return found.reshape(tokens, copies, columns)


def _all_to_all(x: Array) -> Array:
    """Equal parts of the leading axis, one for and then one from every device along `expert`."""
    return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)


def _exchange(x: Array, sent: Array, received: Array, rows: int) -> Array:
    """As `_all_to_all`; of every part of `rows` rows, the first `sent` (by device) matter, and `received` come."""

    def padded(x: Array, sent: Array, received: Array) -> Array:
        del sent, received  # all rows are sent
        return _all_to_all(x)

    def ragged(x: Array, sent: Array, received: Array) -> Array:
        begin = jnp.arange(sent.shape[0], dtype=jnp.int32) * rows
        here = jnp.full(sent.shape, jax.lax.axis_index("expert") * rows, jnp.int32)  # where our rows go, everywhere
        return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), begin, sent, here, received, axis_name="expert")

    return jax.lax.platform_dependent(x, sent, received, tpu=ragged, cuda=ragged, default=padded)
