"""How the tokens of a slot are sampled, as a round's inbox says it; the arithmetic is ``kernels.uncertainty``.

Samples depend on (root key, stream, position) alone, never on the slot, the batch-mates or the device count. The ids
the sampler could choose from are returned where anything was filtered, so that the learner can renormalise over
exactly the same set.
"""

from typing import Any, NamedTuple

import jax

from kernels import uncertainty
from kernels.uncertainty import Filters, Sampled

Array = Any  # of a round's inbox: jax.Array in the program, numpy on the host, PartitionSpec in its layout


class Controls(NamedTuple):
    """Per row: how to sample. temperature 0 is greedy; top_k 0 and top_p 1 keep all; allowed -1 = unused entry."""

    temperature: Array  # float [B]
    top_k: Array  # int [B]
    top_p: Array  # float [B]
    allowed: Array  # int [B, K]; any entry >= 0: only these ids may be emitted


def sample(logits: jax.Array, uniform: jax.Array, controls: Controls) -> Sampled:
    """One token a row and what is reported about it. logits [B, V], all finite; uniform [B] in [0, 1)."""
    filters = Filters(controls.top_k, controls.top_p, controls.allowed)
    return uncertainty.sample(logits, uniform, controls.temperature, filters, masked=False)
