"""What the program of one device knows of the mesh that it runs on.

Inside `jax.shard_map` every array is the part that one device holds. A `Shard` says into how many parts each mesh axis
cuts, and holds the few collectives that model code needs. `WHOLE` stands for a model on one device: all of its methods
then return their argument, and no program changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

AXES = ("data", "seed", "expert", "tensor")
TOKENS = ("data", "expert")  # token batches are cut along both: between experts' exchanges all devices do the same work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Numbers of parts by mesh axis.

    * `data`: windows of a token batch;
    * `seed`: noise seeds, each with programmed weights of its own;
    * `expert`: routed experts, and windows too, whose token copies travel to the experts' devices and back;
    * `tensor`: columns of every matrix. A matrix is never cut along its rows, so a row-block, and the sum that an ADC
      converts, lie on one device, and every number is computed as on a single device.
    """

    data: int = 1
    seed: int = 1
    expert: int = 1
    tensor: int = 1

    def first(self, axis: str, count: int) -> Array:
        """Number of the first of this device's `count` elements along what mesh axis `axis` cuts; int32."""
        if getattr(self, axis) == 1:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(axis).astype(jnp.int32) * count

    def first_token(self, count: int) -> Array:
        """Number, in the whole batch, of the first of this device's `count` tokens; int32."""
        return (self.first("data", 1) * self.expert + self.first("expert", 1)) * count

    def gather_columns(self, x: Array) -> Array:
        """All columns (last axis) of what the devices along `tensor` hold a part of."""
        return x if self.tensor == 1 else jax.lax.all_gather(x, "tensor", axis=x.ndim - 1, tiled=True)

    def own_columns(self, x: Array) -> Array:
        """This device's part of the columns of `x`."""
        if self.tensor == 1:
            return x
        count = x.shape[-1] // self.tensor
        return jax.lax.dynamic_slice_in_dim(x, self.first("tensor", count), count, axis=x.ndim - 1)

    def largest_column(self, x: Array) -> Array:
        """Elementwise maximum over the devices along `tensor`: what was a maximum over columns is one over all."""
        return x if self.tensor == 1 else jax.lax.pmax(x, "tensor")

    def smallest_column(self, x: Array) -> Array:
        """As `largest_column`, the minimum."""
        return x if self.tensor == 1 else jax.lax.pmin(x, "tensor")

    def sum_columns(self, x: Array) -> Array:
        """Sum over the devices along `tensor`."""
        return x if self.tensor == 1 else jax.lax.psum(x, "tensor")

    def gather_seeds(self, x: Array) -> Array:
        """Of all seeds (first axis), on every device, what the devices along `seed` hold a part of."""
        return x if self.seed == 1 else jax.lax.all_gather(x, "seed", axis=0, tiled=True)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes of more than one part that cut token batches."""
        return tuple(axis for axis in TOKENS if getattr(self, axis) > 1)


WHOLE = Shard()
