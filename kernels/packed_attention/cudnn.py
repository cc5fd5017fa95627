"""cuDNN's flash attention (GPU, bfloat16 and float16), by ``jax.nn.dot_product_attention``. Not run on hardware yet.

It has no notion of a forest of segments: the mask goes in as a head-broadcast bias [B, 1, T, T] in the inputs' type,
2 T^2 bytes a row, and blocks that it hides are computed and not skipped. Its own rules shard rows and heads.
"""

import jax
import jax.numpy as jnp

from kernels.packed_attention.visibility import Visibility
from kernels.packed_attention.visibility import visible as written_out

Array = jax.Array


def refuses(tokens: int, head_dim: int, dtype: jnp.dtype, divided: bool) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its types are bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"heads have {head_dim} numbers: at most 128, a multiple of 8"
    if tokens % 2:
        return f"rows have {tokens} columns, an odd number"
    return None if divided else "the mesh does not divide the heads of keys as it does those of queries"


def attend(query: Array, key: Array, value: Array, visible: Visibility) -> Array:
    """query [B, T, N, H] (scaled), key and value [B, T, K, H] -> [B, T, N, H]."""
    mask = written_out(visible)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=1.0, implementation="cudnn")
