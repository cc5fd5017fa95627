"""The one device program of sampling: cache appended tokens (gathered chunked prefill), then decode a burst.

The host owns pages, tokens and decisions; the device owns arithmetic. Everything the device must know for a round
comes in an `Inbox` of fixed shapes, so the program is compiled once per base model. The whole program runs inside one
`shard_map`: streams, pages and slots of a data shard never look at another shard's, and loops end when a shard's own
work does. Where weights are cut over `model`, sums stand inside the loops, and all shards then run as many steps as the
one with most to do: devices that wait for each other must come to the same sums.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.dispatch import current_platform
from rlrag.mesh import DATA, MODEL
from rlrag.model.architecture import Architecture
from rlrag.model.attention import attend, views
from rlrag.model.decoding import WHOLE, DecodeWeights, Parts, abstract_weights, parts
from rlrag.model.transformer import extend, vocabulary_logits
from rlrag.rollout import cache as kv
from rlrag.rollout import lanes, paged
from rlrag.rollout.cache import Cache
from rlrag.rollout.sampling import Array, Controls, sample

RUNNING, STOPPED, ENDED, LIMITED = 0, 1, 2, 3  # why a slot's burst is over
LEAST_VIEW = 128  # tokens: to read fewer saves nothing
LANES, PAGES = "lanes", "pages"  # what a burst works on: copies of the pages in its lanes, or the pages themselves


@dataclass(frozen=True)
class Spec:
    """Static sizes of the program, over all data shards together where a shard dimension exists."""

    num_slots: int  # decode lanes
    num_pages: int
    page_size: int
    max_tokens: int  # of a stream: prompt, documents and answers together; a multiple of page_size
    burst: int  # decode steps a round at most
    prefill_rows: int
    prefill_chunk: int  # tokens a row and chunk
    prefill_chunks: int  # chunks a round at most
    num_kept: int  # capacity of filtered sets (top-k, top-p, allowed ids); 0: filters cannot be used
    decode: str = ""  # on LANES or PAGES; empty: as suits the platform

    @property
    def kept_width(self) -> int:
        """Of the arrays of filtered sets that enter and leave the program: at least 1, because XLA's CPU compiler (JAX
        0.11.2) crashes on an array of no elements that is cut over devices."""
        return max(self.num_kept, 1)

    @property
    def pages_per_stream(self) -> int:
        return self.max_tokens // self.page_size

    @property
    def views(self) -> tuple[int, ...]:
        """Pages of a stream that a chunk of prefill may read: it reads the fewest that hold all of its rows."""
        halves = {-(-self.pages_per_stream // 2**i) for i in range(4)}
        return tuple(sorted(n for n in halves if n * self.page_size >= LEAST_VIEW or n == self.pages_per_stream))

    @property
    def on_pages(self) -> bool:
        way = self.decode or (LANES if current_platform() == "cpu" else PAGES)
        assert way in (LANES, PAGES), way
        return way == PAGES


class Prefill(NamedTuple):
    """Tokens to cache. Pieces of one stream may lie in rows of one entry of J and in later ones, which run in order."""

    tokens: Array  # int [J, R, C]
    start: Array  # int [J, R] position of the first
    count: Array  # int [J, R] 0: empty row
    table: Array  # int [J, R, n]
    adapters: Array | None  # float [J, R, A] coefficients; None: the model has none
    num_chunks: Array  # int [shards] how many of J are in use


class Decode(NamedTuple):
    """One row per slot. `token` is the newest token of the stream, at `position`, and not cached yet."""

    token: Array  # int [B]
    position: Array  # int [B]
    limit: Array  # int [B] tokens this call may still emit; 0: idle slot
    table: Array  # int [B, n]
    stop_state: Array  # int [B]
    stream: Array  # uint32 [B] names the stream: part of the sampling key
    once: Array  # bool [B] emitted ids are struck from `allowed`
    fresh: Array  # int [B] first the slots whose stream was not there in the round before
    num_fresh: Array  # int [shards] how many those are
    patience: Array  # int [shards] steps that slots may stand still, in all, after they have stopped
    adapters: Array | None  # float [B, A]
    controls: Controls


class Inbox(NamedTuple):
    prefill: Prefill
    decode: Decode


class Outbox(NamedTuple):
    """Per slot what the burst emitted; entries from `count` on are meaningless."""

    tokens: Array  # int [B, N]
    logp: Array  # float [B, N]
    entropy: Array  # float [B, N]
    certainty: Array  # float [B, N]
    margin: Array  # float [B, N]
    kept: Array  # int [B, N, K]
    count: Array  # int [B]
    reason: Array  # int [B] RUNNING, STOPPED, ENDED or LIMITED
    stop_state: Array  # int [B]
    steps: Array  # int [shards] decode steps run


@flax.struct.dataclass
class Burst:
    """Loop state of a burst."""

    step: jax.Array
    most: jax.Array  # slots that the next step is for, on the shard that has most of them
    idle: jax.Array  # steps that slots of this shard have stood still
    cache: Cache
    token: jax.Array
    stop_state: jax.Array
    reason: jax.Array
    count: jax.Array
    allowed: jax.Array
    out: tuple[jax.Array, ...]


def empty_cache(a: Architecture, spec: Spec, mesh: Mesh) -> Cache:
    """mesh: of this process's devices."""
    heads = parts(a, mesh.shape[MODEL]).num_kv_heads(a)
    own = 0 if spec.on_pages else spec.num_slots
    return kv.empty(a, spec.num_pages, spec.page_size, own, spec.max_tokens, heads)


def cache_partitions(a: Architecture, spec: Spec, mesh: Mesh) -> Any:
    """A PartitionSpec for every array of the cache."""
    heads = MODEL if parts(a, mesh.shape[MODEL]).heads > 1 else None
    page = (PartitionSpec(heads, DATA),) * a.num_layers
    lane = (PartitionSpec(DATA, heads),) * kv.tiles(spec.max_tokens)[0]
    own = () if spec.on_pages else (lane,) * a.num_layers
    return Cache(page, page, own, own)  # type: ignore[arg-type]  # specs in the cache's tree


def agreed(number: jax.Array, cut: Parts) -> jax.Array:
    """The largest of all data shards, where they must run the same steps; else this shard's own."""
    return number if max(cut) == 1 else jax.lax.pmax(number, DATA)


def prefill(
    weights: DecodeWeights, cache: Cache, inbox: Prefill, spec: Spec, a: Architecture, cut: Parts = WHOLE
) -> Cache:
    """Cache appended tokens, chunk after chunk; the last layer's hidden states are not needed and not computed."""
    capacity = cache.keys[0].shape[1]

    def chunk(j: jax.Array, cache: Cache) -> Cache:
        tokens, start, count, table = inbox.tokens[j], inbox.start[j], inbox.count[j], inbox.table[j]
        offset = jnp.arange(tokens.shape[1])
        positions = start[:, None] + offset
        inside = offset < count[:, None]
        past = capacity + jnp.arange(tokens.size).reshape(tokens.shape)
        index = jnp.where(inside, kv.token_index(table, positions, spec.page_size), past)
        keys, values = list(cache.keys), list(cache.values)
        longest = jnp.max(jnp.where(count > 0, start + count, 0))
        enough = sum((longest > pages * spec.page_size).astype(jnp.int32) for pages in spec.views[:-1])

        def read(pages: int, local: bool, q: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            own = table[:, :pages]
            cached = jnp.arange(pages * spec.page_size)[None]
            seen = views(a, cached <= positions[..., None], positions, cached)[local]
            key, value = (kv.gather(store, own, spec.page_size) for store in (key, value))
            return attend(q, key, value, seen, a.attention_scale or None)

        def mix(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys[number] = kv.scatter(cache.keys[number], index, k)
            values[number] = kv.scatter(cache.values[number], index, v)
            ways = [partial(read, pages, a.local[number]) for pages in spec.views]
            return jax.lax.switch(enough, ways, q, keys[number], values[number])

        extend(weights, a, tokens, positions, mix, None if inbox.adapters is None else inbox.adapters[j], cut)
        return cache._replace(keys=tuple(keys), values=tuple(values))

    return jax.lax.fori_loop(0, agreed(inbox.num_chunks[0], cut), chunk, cache)


def burst(
    weights: DecodeWeights, cache: Cache, inbox: Decode, stops: jax.Array, accepting: jax.Array, root: jax.Array,
    end_id: int, spec: Spec, a: Architecture, cut: Parts = WHOLE,
) -> tuple[Cache, Outbox]:  # fmt: skip
    """Decode until every slot has stopped, those that have are out of patience, or `spec.burst` steps are done."""
    B, N = inbox.token.shape[0], spec.burst
    keys = jax.vmap(partial(jax.random.fold_in, root))(inbox.stream)
    # Of all steps at once: a generator that runs inside the loop costs more there than what it is for.
    after = inbox.position[:, None] + 1 + jnp.arange(N)
    uniforms = jax.vmap(jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)), (None, 0)))(
        keys, after
    )
    way = paged if spec.on_pages else lanes
    cache = way.enter(cache, inbox.fresh, inbox.num_fresh[0], inbox.table, spec.page_size)

    begun = jnp.sum(inbox.limit > 0, dtype=jnp.int32)

    def going_on(reason: jax.Array, idle: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`most` and `idle` before the next step."""
        running = jnp.sum(reason == RUNNING, dtype=jnp.int32)
        idle = idle + begun - running
        return agreed(jnp.where(idle <= inbox.patience[0], running, 0), cut), idle

    def cond(s: Burst) -> jax.Array:
        return (s.step < N) & (s.most > 0)

    def body(s: Burst) -> Burst:
        live = s.reason == RUNNING
        position = inbox.position + s.count  # of the token that goes in
        mix, written = way.mixer(s.cache, inbox.table, position, live, spec.page_size, a)
        hidden = extend(weights, a, s.token[:, None], position[:, None], mix, inbox.adapters, cut)[:, 0]
        logits = vocabulary_logits(weights, hidden, cut)
        controls = inbox.controls._replace(allowed=s.allowed)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, s.step, 1, keepdims=False)
        token, kept, *report = sample(logits, uniform, controls)
        new = (token, *report, kept)
        out = tuple(jax.lax.dynamic_update_slice_in_dim(old, x[:, None], s.step, 1) for old, x in zip(s.out, new))
        stop_state = jnp.where(live, stops[s.stop_state, token].astype(jnp.int32), s.stop_state)
        count = s.count + live
        reason = jnp.where(count >= inbox.limit, LIMITED, RUNNING)
        reason = jnp.where(token == end_id, ENDED, reason)
        reason = jnp.where(accepting[stop_state], STOPPED, reason)
        reason = jnp.where(live, reason, s.reason)
        most, idle = going_on(reason, s.idle)
        struck = inbox.once[:, None] & live[:, None] & (s.allowed == token[:, None])
        return Burst(
            step=s.step + 1,
            most=most,
            idle=idle,
            cache=written(),
            token=jnp.where(live, token, s.token),
            stop_state=stop_state,
            reason=reason,
            count=count,
            allowed=jnp.where(struck, -1, s.allowed),
            out=out,
        )

    numbers = [jnp.zeros((B, N), dtype) for dtype in (jnp.int32, *[jnp.float32] * 4)]
    reason = jnp.where(inbox.limit > 0, RUNNING, LIMITED)
    most, idle = going_on(reason, jnp.int32(0))
    start = Burst(
        step=jnp.int32(0),
        most=most,
        idle=idle,
        cache=cache,
        token=inbox.token,
        stop_state=inbox.stop_state,
        reason=reason,
        count=jnp.zeros(B, jnp.int32),
        allowed=inbox.controls.allowed[:, : spec.num_kept],
        out=(*numbers, jnp.full((B, N, spec.num_kept), -1, jnp.int32)),
    )
    s = jax.lax.while_loop(cond, body, start)

    emitted = Outbox(*s.out, count=s.count, reason=s.reason, stop_state=s.stop_state, steps=s.step[None])
    missing = spec.kept_width - spec.num_kept
    emitted = emitted._replace(kept=jnp.pad(emitted.kept, ((0, 0), (0, 0), (0, missing)), constant_values=-1))

    return s.cache, emitted


SHARD, EVERYWHERE, SECOND = PartitionSpec(DATA), PartitionSpec(), PartitionSpec(None, DATA)
INBOX = Inbox(
    prefill=Prefill(*[SECOND] * 5, num_chunks=SHARD),
    decode=Decode(*[SHARD] * 11, controls=Controls(*[SHARD] * 4)),
)


def inbox_shardings(mesh: Mesh) -> Inbox:
    """How an inbox lies on the devices of a process."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), INBOX, is_leaf=is_spec)


def build_advance(spec: Spec, a: Architecture, end_id: int, mesh: Mesh):
    """The jitted program: advance(weights, cache, inbox, stops, accepting, root) -> (cache, outbox); cache donated.

    mesh: `data` x `model`, of this process's devices."""
    cut = parts(a, mesh.shape[MODEL])

    def advance(weights, cache, inbox: Inbox, stops, accepting, root):
        cache = prefill(weights, cache, inbox.prefill, spec, a, cut)
        return burst(weights, cache, inbox.decode, stops, accepting, root, end_id, spec, a, cut)

    cached = cache_partitions(a, spec, mesh)
    weights = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(a, mesh))
    mapped = jax.shard_map(
        advance,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda sharding: sharding.spec, weights), cached, INBOX, *[EVERYWHERE] * 3),
        out_specs=(cached, SHARD),
        check_vma=False,  # never differentiated
    )
    # Every input's sharding is spelled out: numpy arrays then land in place, and one compilation serves all calls.
    replicated = NamedSharding(mesh, EVERYWHERE)
    places = weights, None, inbox_shardings(mesh), replicated, replicated, replicated
    return jax.jit(mapped, in_shardings=places, donate_argnums=1)
