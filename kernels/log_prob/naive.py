"""What one writes without a kernel: the logits of all tokens, ``log_softmax`` and automatic differentiation.

The peer that time and memory are measured against; not an implementation of the table, because nothing should run it.
"""

import jax
import jax.numpy as jnp

from kernels import token_stats as monoid
from kernels.token_stats import TokenStats

Array = jax.Array


def log_prob(hidden: Array, head: Array, token: Array, *, temperature: Array | float | None = None) -> Array:
    """Log-prob of each token, [...] nats; arguments as in ``api.log_prob``."""
    log_p = jax.nn.log_softmax(_logits(hidden, head, temperature), axis=-1)
    return jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]


def token_stats(hidden: Array, head: Array, ids: Array, *, temperature: Array | float | None = None) -> TokenStats:
    """As ``api.token_stats``, for ids inside the vocabulary."""
    logits = _logits(hidden, head, temperature)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    certainty = -log_p.mean(-1) - jnp.log(logits.shape[-1])
    wanted = jnp.take_along_axis(logits, ids, axis=-1)
    lse = wanted[..., 0] - jnp.take_along_axis(log_p, ids[..., :1], axis=-1)[..., 0]
    return TokenStats(lse, entropy, certainty, wanted)


def _logits(hidden: Array, head: Array, temperature: Array | float | None) -> Array:
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return logits if temperature is None else logits * monoid.inverse_temperature(temperature)[..., None]
