"""The one device layout: packed rows of tokens with a table of segments. What others make a mode is data here.

A row holds several segments in a forest; token i sees token j iff j <= i and j's segment is i's or an ancestor of it.
Per-token fields describe the token they stand at; predicting it is the business of the column before. Padding is
segment 0. Leaves carry leading dimensions [M, R] in the update: M micro-batches of R rows.
"""

import flax.struct
import jax


@flax.struct.dataclass
class Segments:
    """Per segment, [..., S]; entry 0 is padding."""

    episode: jax.Array  # int: number of the trajectory in this batch; -1 = none
    call: jax.Array  # int: number of the stream within its trajectory
    group: jax.Array  # int: number of the question in this batch; -1 = none
    parent: jax.Array  # int: segment whose tokens precede this one's; 0 = none
    version: jax.Array  # int: policy version that sampled it
    adapters: jax.Array | None  # float [..., S, A]: coefficient of each adapter, all 0 = the base; None: there are none
    rewards: jax.Array  # float [..., S, R]: named rewards, in the recipe's order
    valid: jax.Array  # bool [..., S, R]: whether the reward speaks of this segment


@flax.struct.dataclass
class Batch:
    """Per token, [..., T]."""

    tokens: jax.Array  # int
    segment: jax.Array  # int; 0 = padding
    positions: jax.Array  # int; continues across a shared prefix
    turn: jax.Array  # int: how many calls of its stream came before
    role: jax.Array  # int: number of the role in the recipe
    tags: jax.Array  # int: region label (agents.tags); 0 = none
    act: jax.Array  # int: 0 observed, 1 sampled by the policy, 2 forced; trained where > 0
    kept: jax.Array  # int [..., T, K]: ids the sampler could choose from, -1 = unused; all -1 = whole vocabulary
    temperature: jax.Array  # float: of the distribution sampled from
    logp: jax.Array  # float, nats: as sampled; 0 where act != 1
    entropy: jax.Array  # float, nats: as sampled
    certainty: jax.Array  # float, nats: as sampled
    bonus: jax.Array  # float: additive per-token reward terms
    weight: jax.Array  # float: advantage or likelihood weight; written by credit
    old_logp: jax.Array  # float, nats: of the policy at the start of the update; this and below written by prepare ...
    ref_logp: jax.Array  # float, nats: of the reference
    value: jax.Array  # float, reward: what the critic expects before the token
    target: jax.Array  # float, reward: what it should have said; ... where the recipe needs them
    segments: Segments

    @property
    def trained(self) -> jax.Array:
        """float [..., T]: 1 where a loss may look."""
        return (self.act > 0).astype(self.weight.dtype)

    @property
    def sampled(self) -> jax.Array:
        """float [..., T]: 1 where the policy chose the token, so that logp, entropy and certainty are known."""
        return (self.act == 1).astype(self.weight.dtype)
