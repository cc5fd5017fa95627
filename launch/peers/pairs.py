"""Each trap that the product avoids, as a pair: the straightforward way and ours, of the same thing.

At the shape and sizes on which the peers are measured: 64 lanes decode with room for 192 tokens, an update learns from
64 x 192. Ours is the product's own function; what it returns must be what the straightforward way returns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.log_prob import naive
from kernels.log_prob.api import token_stats
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.attention import rotations
from rlrag.model.decoding import pack
from rlrag.model.transformer import extend, gated, layer, rms_norm
from rlrag.objectives.credit import group_relative
from rlrag.objectives.losses import surrogate
from rlrag.objectives.update import build_prepare
from rlrag.rollout import lanes
from rlrag.rollout.cache import TILE
from rlrag.rollout.pages import Pages
from rlrag.rollout.sampling import Controls, sample
from rlrag.speed import fixed_batch, update
from rlrag.speed.rollout import Player, Sizes, packed, start
from rlrag.speed.shapes import DEMO
from rlrag.speed.update import ALL, MODEL, Pupil, RowSizes
from rlrag.speed.workload import Workload

UNROLLED = replace(DEMO, scan_unroll=DEMO.num_layers)


@dataclass(frozen=True)
class Setting:
    architecture: Architecture = UNROLLED
    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 128
    long_prompt: int = 512  # and then half as many new ones
    steps: int = 32  # of decoding, where weights are packed inside the loop
    burst: int = 64

    @property
    def lanes(self) -> int:
        return self.prompts * self.group

    @property
    def room(self) -> int:
        """Tokens of an episode; those of a lane are a multiple of a tile."""
        return self.prompt_tokens + self.new_tokens


class Trap(NamedTuple):
    """straight and ours each do the thing once, wait, and return what must agree."""

    name: str
    straight: Callable[[], Any]
    ours: Callable[[], Any]
    times: float  # that it stands in a step of ours
    step: str  # decode step | rollout | update
    number: int = 1  # how often the thing is done at once
    check: Callable[[Any, Any], float] | None = None  # how far the results are apart; None: their relative difference


def random(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape)


def waiting(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*arguments))


# -- decoding ---------------------------------------------------------------------------------------------------------


def sampling(s: Setting) -> Trap:
    """V random numbers a row and a second pass for the log-prob, against one and an inverse CDF."""
    B, logits = s.lanes, 2 * random(0, s.lanes, s.architecture.vocab_size)
    plain = Controls(jnp.ones(B), jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.full((B, 0), -1, jnp.int32))

    @jax.jit
    def straight(logits, key):
        token = jax.random.categorical(key, logits)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]

    @jax.jit
    def ours(logits, key):
        drawn = sample(logits, jax.random.uniform(key, (B,)), plain)
        return drawn.token, drawn.log_prob, drawn.entropy, drawn.certainty, drawn.margin

    def check(*both) -> float:
        log_p = np.asarray(jax.nn.log_softmax(logits))
        return max(float(np.abs(log_p[np.arange(B), token] - logp).max()) for token, logp, *_ in both)

    key = jax.random.key(1)
    name = "random numbers for the whole vocabulary, log-prob apart (ours: entropy, certainty, margin as well)"
    return Trap(name, waiting(straight, logits, key), waiting(ours, logits, key), 1, "decode step", check=check)


def cache_layout(s: Setting) -> Trap:
    """Attention of one token a lane, in one layer."""
    a, B, S = s.architecture, s.lanes, -(-s.room // TILE) * TILE
    query = random(0, B, a.num_heads, a.head_dim)
    key, value = random(1, B, S, a.num_kv_heads, a.head_dim), random(2, B, S, a.num_kv_heads, a.head_dim)
    position, live = jnp.full(B, s.room - 1), jnp.ones(B, bool)

    @jax.jit
    def straight(query, key, value):
        q = query.reshape(B, a.num_kv_heads, -1, a.head_dim) * a.head_dim**-0.5
        scores = jnp.einsum("bkgh,bskh->bkgs", q, key)
        scores = jnp.where(jnp.arange(S) <= position[:, None, None, None], scores, -jnp.inf)
        return jnp.einsum("bkgs,bskh->bkgh", jax.nn.softmax(scores), value).reshape(query.shape)

    heads_first = fixed_batch.Cache(*((each.transpose(2, 0, 1, 3),) for each in (key, value)))
    (keys,), (values,) = fixed_batch.to_lanes(heads_first)
    # Where lanes are is no constant in a rollout: what the compiler knows it lays out otherwise, and slowly.
    ours = waiting(jax.jit(lanes.attend), query, keys, values, position, live)
    name = "attention over a cache of [rows, tokens, heads, width]"
    return Trap(name, waiting(straight, query, key, value), ours, a.num_layers, "decode step")


def packed_weights(s: Setting) -> Trap:
    """A loop of decoding steps: the hidden states that the last of them begins its head with."""
    a, B, params = s.architecture, s.lanes, start(s.architecture)
    tokens = jax.random.randint(jax.random.key(0), (s.steps, B), 0, a.vocab_size)
    room, live = -(-s.room // TILE) * TILE, jnp.ones(B, bool)
    empty = fixed_batch.to_lanes(fixed_batch.empty(a, B, room))

    def attention(cache, at, layer, q, k, v):
        """cache: keys and values by layer, renewed."""
        keys, values = cache[layer] = lanes.write(cache[layer][0], cache[layer][1], at, k[:, 0], v[:, 0])
        return lanes.attend(q[:, 0], keys, values, at, live)[:, None]

    def by_layer(weights, number, state):
        at, cache = jnp.full(B, number), list(state[0])
        hidden = extend(weights, a, tokens[number][:, None], at[:, None], partial(attention, cache, at))
        return tuple(cache), hidden[:, 0]

    def stacked(params, number, state):
        at = jnp.full(B, number)
        angles = rotations(a, at[:, None])[False]

        def one(x, xs):
            weights, *cache = xs
            cache = [tuple(cache)]
            x = layer(x, weights, angles, a, partial(attention, cache, at, 0), {}, None)
            return x, cache[0]

        x, cache = jax.lax.scan(one, params.table[tokens[number]], (params.layers, *state[0]))
        return cache, rms_norm(x, params.final_norm, a)

    def loop(step, weights, cache):
        initial = cache, jnp.zeros((B, a.embed_dim))
        return jax.lax.fori_loop(0, s.steps, partial(step, weights), initial)[1]

    together = jax.tree.map(lambda *layers: jnp.stack(layers), *zip(*empty))
    straight = waiting(jax.jit(partial(loop, stacked)), params, together)
    inside, once = jax.jit(partial(loop, by_layer)), jax.jit(lambda params: pack(params, a))
    ours = waiting(lambda: inside(once(params), tuple(zip(*empty))))
    name = f"weights and cache stacked and cut inside the loop (ours: by layer, joined once; {s.steps} steps)"
    return Trap(name, straight, ours, 1, "decode step", s.steps)


def donated_cache(s: Setting) -> Trap:
    """A token a lane written to every layer, as a program that is left after each step does."""
    a, B = s.architecture, s.lanes
    new, at = random(0, B, a.num_kv_heads, a.head_dim), jnp.full(B, s.room - 1)

    def write(cache):
        both = [lanes.write(keys, values, at, new, new) for keys, values in zip(*cache)]
        return fixed_batch.Tiled(*map(tuple, zip(*both)))  # type: ignore[arg-type]

    room = -(-s.room // TILE) * TILE
    cache = fixed_batch.to_lanes(fixed_batch.empty(a, B, room))
    straight, ours = (rebound(write, cache, donated) for donated in (False, True))
    return Trap("a fresh cache from every step (ours: donated)", straight, ours, 1, "decode step", check=unchecked)


def rebound(function: Callable, state: Any, donated: bool) -> Callable[[], Any]:
    """What a step leaves is what the next begins with."""
    program, held = jax.jit(function, donate_argnums=0 if donated else ()), [jax.tree.map(jnp.copy, state)]

    def once() -> None:
        held[0] = jax.block_until_ready(program(held[0]))

    return once


def unchecked(straight: Any, ours: Any) -> float:
    return 0.0  # the same program, but for what it may overwrite


def bursts(s: Setting, weights) -> tuple[Trap, Trap]:
    """Whole rollouts by the engine, whose samples depend on neither bursts nor shared pages."""
    a = s.architecture
    short = Workload(a.vocab_size, s.prompt_tokens, turn_tokens=(s.new_tokens, s.new_tokens))
    long = Workload(a.vocab_size, s.long_prompt, turn_tokens=(s.new_tokens // 2, s.new_tokens // 2))

    def player(workload: Workload, burst: int) -> Player:
        return Player(a, Sizes(s.lanes, s.lanes, burst, prefill_chunk=16, prefill_chunks=32), workload.capacity)

    def rollout(player: Player, workload: Workload, group: int = 1, shares: bool = True) -> list[np.ndarray]:
        """What was sampled."""
        for pages in player.decoder.pages:
            pages.share = partial(Pages.share, pages) if shares else lambda name: None  # nothing is ever found
        groups = player.play(weights, workload, s.lanes, group_size=group, keep=True).groups
        return [t.streams[0].spans[-1].tokens for group in groups for t in group.trajectories]

    each, many = (partial(rollout, player(short, burst), short) for burst in (1, s.burst))
    name = f"the host waits for every step (ours: bursts of {s.burst})"
    reading = player(long, s.burst)
    alone, shared = (partial(rollout, reading, long, s.group, shares) for shares in (False, True))
    other = f"prompts of {s.long_prompt} read by every one of {s.group} samples (ours: once)"
    return (
        Trap(name, each, many, 1, "decode step", s.new_tokens, differing),
        Trap(other, alone, shared, 1, "rollout", check=differing),
    )


def differing(straight: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> float:
    """Share of episodes that differ beyond what rounding can do to a random model: one in twenty, from a near tie."""
    others = sum(not np.array_equal(x, y) for x, y in zip(straight, ours, strict=True)) / len(ours)
    return 0.0 if others <= 0.05 else others


# -- update -----------------------------------------------------------------------------------------------------------


def gradients(function: Callable) -> Callable:
    """Outputs and gradients of all arguments but the last, which is what the output is weighed with."""
    return jax.jit(lambda *given: (lambda out, back: (out, *back(given[-1])))(*jax.vjp(function, *given[:-1])))


def plain(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def own(x, gate, up, down):
    return gated(x, gate, up, down, "silu")


def mlp(s: Setting, share: float) -> tuple[Trap, Trap]:
    """Forward and backward of the MLP of a layer with its norm, on all rows of an update. share: of these tokens that
    packed rows have."""
    a, B, T = s.architecture, s.lanes, s.room
    x, dy, D, F = random(0, B, T, a.embed_dim), random(1, B, T, a.embed_dim), a.embed_dim, a.mlp_dim
    weights = [random(2 + n, *shape) * shape[0] ** -0.5 for n, shape in enumerate(((D, F), (D, F), (F, D)))]

    def block(product: Callable, shape: tuple[int, ...]) -> Callable[[], Any]:
        function = gradients(lambda x, scale, *weights: x + product(rms_norm(x, scale, a), *weights))
        return waiting(function, x.reshape(shape), jnp.ones(D), *weights, dy.reshape(shape))

    rows, products, ours = block(plain, (B, T, D)), block(plain, (B * T, D)), block(own, (B * T, D))
    times = a.num_layers * share
    return (
        Trap("products on [rows, tokens, width] (ours: [rows * tokens, width])", rows, products, times, "update"),
        Trap(
            "SwiGLU differentiated by JAX (ours: its own gradient, behind a barrier)", products, ours, times, "update"
        ),
    )


def trained_columns(s: Setting) -> Trap:
    """Log-probs of what was sampled, and their gradients."""
    a, B, T = s.architecture, s.lanes, s.room
    hidden, head = random(0, B, T, a.embed_dim), random(1, a.vocab_size, a.embed_dim) * 0.05
    ids, weight = jax.random.randint(jax.random.key(2), (B, T), 0, a.vocab_size), random(3, B, T)
    weight = jnp.where(jnp.arange(T) < s.new_tokens, weight, 0)  # trained columns lead, as the learner puts them
    count = jnp.int32(s.new_tokens)

    def trained(hidden, head):
        stats = token_stats(hidden, head, ids[..., None], count=count)
        return jnp.where(weight != 0, stats.logits[..., 0] - stats.lse, 0)

    def every(hidden, head):
        return jnp.where(weight != 0, naive.log_prob(hidden, head, ids), 0)

    straight, ours = (waiting(gradients(each), hidden, head, weight) for each in (every, trained))
    return Trap("logits of all columns, stored (ours: of trained ones, by chunks)", straight, ours, 1, "update")


def donated_gradients(s: Setting) -> Trap:
    new = jax.tree.map(jnp.ones_like, start(s.architecture))
    add = partial(jax.tree.map, jnp.add, new)
    straight, ours = (rebound(add, new, donated) for donated in (False, True))
    return Trap("fresh sums of gradients (ours: donated)", straight, ours, 1, "update", check=unchecked)


def skipped_scoring(s: Setting, pupil: Pupil, made) -> Trap:
    """prepare of a batch whose log-probs, as sampled, are the learner's."""
    a, objective, params = s.architecture, surrogate(recompute_old=True), start(s.architecture)
    recomputed = build_prepare(
        {MODEL: a}, {MODEL: objective}, {MODEL: MODEL}, group_relative(), s.prompts, s.lanes, make_mesh()
    )

    def once(program: Callable, batch) -> Any:
        # The batch is donated: both ways lay it out anew.
        given = pupil.update.put(batch), np.int32(made.num_micro)
        prepared = program({MODEL: params}, {MODEL: None}, *({MODEL: each} for each in given), {})
        return jax.block_until_ready(prepared).batches[MODEL].old_logp

    sampled = replace(made.batch, logp=np.asarray(once(recomputed, made.batch)))
    straight, ours = (partial(once, program, sampled) for program in (recomputed, pupil.prepare))
    return Trap(
        "a second pass scores the old policy (ours: skipped, the sampler's is exact)", straight, ours, 1, "update"
    )


# -- all of them ------------------------------------------------------------------------------------------------------


def build(s: Setting) -> tuple[list[Trap], Mapping[str, tuple[Callable[[], Any], int]]]:
    """Traps, and whole steps of ours: what does one, and how many that is."""
    a, weights = s.architecture, packed(s.architecture, start(s.architecture))
    burst, prefill = bursts(s, weights)
    learn = Workload(a.vocab_size, s.prompt_tokens, turn_tokens=(s.new_tokens, s.new_tokens))
    # A row holds a prompt and half a group's answers; all of a prompt is shared but its last token.
    row = s.prompt_tokens - 1 + -(-s.group // 2) * (s.new_tokens + 1)
    made = update.packed(learn.groups(s.prompts, s.group), RowSizes(max(1, 2400 // row), row), ALL)
    pupil = Pupil(a, start(a), ALL, s.lanes, s.prompts)
    share = update.rows_of(made).tokens / (s.lanes * s.room)
    donated = donated_gradients(s)._replace(times=made.num_micro)
    traps = [sampling(s), cache_layout(s), packed_weights(s), donated_cache(s), burst, prefill]
    traps += [*mlp(s, share), trained_columns(s), donated, skipped_scoring(s, pupil, made)]
    whole = {"decode step": (burst.ours, s.new_tokens), "rollout": (prefill.ours, 1)}
    return traps, whole | {"update": (partial(pupil.learn, made), 1)}
