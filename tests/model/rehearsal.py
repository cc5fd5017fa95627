"""Logits of a decoder, whole and from its cache, in the form of tests/golden_decoders.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlrag.model.attention import attend, views
from rlrag.model.decoding import pack
from rlrag.model.transformer import extend, trunk
from tests.decoders import CONTINUED, PROMPTS


def padded_logits(params, a, tokens: np.ndarray) -> np.ndarray:
    """Of prompts beside each other, padded on the right: [prompts, T, V], zeros in the padding."""
    column = np.arange(tokens.shape[1])
    segment = (column < np.array(PROMPTS)[:, None]).astype(np.int32)
    parent = np.zeros((len(tokens), 2), np.int32)
    hidden = jax.jit(trunk, static_argnums=1)(params, a, tokens * segment, segment * column, segment, parent)
    return np.asarray(hidden @ params.output_head.T) * segment[..., None]


def cached_logits(params, a, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation of each prompt, token by token from its cache, and the logits of every token:
    [prompts, CONTINUED], [prompts, CONTINUED, V]."""
    weights = pack(params, a)
    size = max(PROMPTS) + CONTINUED

    @partial(jax.jit, donate_argnums=0)
    def step(cache, fed, start):
        keys, values = (list(half) for half in cache)
        positions = start + jnp.arange(fed.shape[1])[None]
        cached = jnp.arange(size)[None]
        seen = views(a, cached <= positions[..., None], positions, cached)

        def mix(number, q, k, v):
            keys[number] = jax.lax.dynamic_update_slice_in_dim(keys[number], k.transpose(2, 0, 1, 3), start, 2)
            values[number] = jax.lax.dynamic_update_slice_in_dim(values[number], v.transpose(2, 0, 1, 3), start, 2)
            return attend(q, keys[number], values[number], seen[a.local[number]], a.attention_scale or None)

        hidden = extend(weights, a, fed, positions, mix)
        return (keys, values), (hidden[0, -1] @ weights.output_head.T).astype(jnp.float32)

    ids, logits = [], []
    for row, length in zip(tokens, PROMPTS, strict=True):
        empty = [jnp.zeros((a.num_kv_heads, 1, size, a.head_dim)) for _ in range(2 * a.num_layers)]
        cache, fed, start = (empty[: a.num_layers], empty[a.num_layers :]), row[None, :length], 0
        mine = []
        for _ in range(CONTINUED):
            cache, last = step(cache, fed, start)
            logits.append(np.asarray(last))
            mine.append(int(np.argmax(logits[-1])))
            start, fed = start + fed.shape[1], np.array([[mine[-1]]])
        ids.append(mine)
    return np.array(ids), np.array(logits).reshape(len(PROMPTS), CONTINUED, -1)
