"""Matrices held as bytes: a frozen base takes half of what bfloat16 does, and adapters learn on top of it.

Each column (an output) has one scale, its largest magnitude over 127, so a number is off by half a step at most:
|W - values * scale| <= scale / 2 (symmetric absmax quantisation, Dettmers et al. 2022, arXiv 2208.07339, eq. 1).
Products read the bytes, turn them into the activations' dtype and multiply the result by the scales: no float copy of
the matrix is kept.
"""

import flax.struct
import jax
import jax.numpy as jnp

LARGEST = 127


@flax.struct.dataclass
class Quantized:
    values: jax.Array  # int8 [..., in, out]
    scale: jax.Array  # float32 [..., 1, out]


Matrix = jax.Array | Quantized


def quantize(matrix: jax.Array) -> Quantized:
    """A matrix [..., in, out] as bytes; a column of zeros stays zero."""
    wide = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Quantized(values, scale)


def numbers_of(matrix: Matrix) -> jax.Array:
    """The numbers that stand in a matrix: float32 where it holds bytes."""
    return matrix.values * matrix.scale if isinstance(matrix, Quantized) else matrix


def times(x: jax.Array, matrix: Matrix) -> jax.Array:
    """x [M, in] times a matrix [in, out], in the dtype of x."""
    if isinstance(matrix, Quantized):
        return (x @ matrix.values.astype(x.dtype)) * matrix.scale.astype(x.dtype)
    return x @ matrix.astype(x.dtype)
