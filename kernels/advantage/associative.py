"""Log-depth implementation by ``lax.associative_scan``: (c_1, b_1) then (c_2, b_2) is (c_1 c_2, b_1 + c_1 b_2)."""

import jax
from jax import lax

Array = jax.Array


def linear_recurrence(b: Array, c: Array) -> Array:
    """As ``reference.linear_recurrence``."""

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        (c_later, b_later), (c_earlier, b_earlier) = later, earlier
        return c_earlier * c_later, b_earlier + c_earlier * b_later

    _, y = lax.associative_scan(compose, (c, b), reverse=True, axis=1)
    return y
