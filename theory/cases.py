"""One measurement of one bound, and what measuring it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hetmoe.analog.programming import program_matrix
from hetmoe.analog.spec import AnalogSpec

TOKENS = 8
DELTA = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of one bound.

    Attributes:
        bound: its name.
        device: what makes the error.
        ratios: measured over bound, of every token that has either.
        error: standard errors of the ratios, 0 where nothing is random.
        share: of chips and tokens whose error exceeds the bound, where it is one of probability DELTA.
        exact: whether the bound is the value itself.
    """

    bound: str
    device: str
    ratios: np.ndarray
    error: np.ndarray
    share: float | None = None
    exact: bool = False

    @property
    def violated(self) -> bool:
        """Whether a ratio is above 1 (of what is exact: also below) by more than five standard errors."""
        if self.share is not None:
            return self.share > DELTA
        # Of what is exact, a ratio of 0 is a token that only the rarest noise reaches: no chip that was drawn.
        above = np.where(self.ratios > 0, np.abs(self.ratios - 1), 0) if self.exact else self.ratios - 1
        return bool((above > 5 * self.error + 1e-6).any())


def case_of(
    bound: str,
    device: str,
    measured: np.ndarray,
    limit: np.ndarray,
    error: np.ndarray | None = None,
    *,
    share: float | None = None,
    exact: bool = False,
) -> Case:
    """Of tokens' measurements, their standard errors, and their bounds; a token that has none of both is left out."""
    some = (measured > 0) | (limit > 0)
    errors = np.zeros_like(measured) if error is None else error
    return Case(
        bound=bound, device=device, ratios=over(measured[some], limit[some]), share=share, exact=exact,
        error=np.divide(errors[some], limit[some], out=np.zeros(int(some.sum())), where=limit[some] > 0),
    )  # fmt: skip


def over(measured: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The ratio; infinite where only the bound is 0."""
    return np.divide(measured, bound, out=np.full_like(measured, np.inf), where=bound > 0)


def programmed(key: jax.Array, w: np.ndarray, spec: AnalogSpec, chips: int) -> np.ndarray:
    """A matrix on many chips, float64 `[chips, K, N]`."""
    return np.asarray(_programmed(jax.random.split(key, chips), jnp.asarray(w, jnp.float32), spec), np.float64)


@jax.jit
def _programmed(keys: jax.Array, w: Array, spec: AnalogSpec) -> Array:
    return jax.lax.map(lambda key: program_matrix(key, w, spec, expert=0), keys)


def random_weights(rng: np.random.Generator, rows: int, columns: int, spread: float) -> np.ndarray:
    """Of columns whose norms differ by factors of about exp(spread), representable in float32."""
    sizes = np.exp(spread * rng.normal(size=columns))
    return (rng.normal(size=(rows, columns)) * sizes / np.sqrt(rows)).astype(np.float32).astype(np.float64)


def root_mean_square(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(root over chips of the mean squared norm, its standard error) of `[chips, tokens, outputs]`."""
    squares = np.sum(np.square(errors), axis=2)
    root = np.sqrt(squares.mean(axis=0))
    return root, squares.std(axis=0, ddof=1) / np.sqrt(len(squares)) / (2 * np.maximum(root, 1e-300))
