"""A small model, a talkative workflow and a naive engine: what the fast engine is held against.

The naive engine plays one episode after the other, runs the training trunk over the whole stream for every token, and
draws from its logits with NumPy in float64. It shares the model's parameters with the fast engine and nothing else: no
cache, no pages, no slots, no automata, no filters in JAX.
"""

import dataclasses
import hashlib
import random
import time
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from rlrag.agents.workflow import Allowed, Force, Generate, Role, Sampling, Search, Together, drive
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.decoding import build_pack
from rlrag.model.parameters import initialize
from rlrag.model.transformer import trunk
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play, stream_uid
from rlrag.trajectory import SAMPLED, Example, Group, Outcome, Passage

# Short pieces, so that stop strings span tokens and begin and end inside them.
PIECES = [*"abcdefgh<>/. ", "<a", "a>", "</", "/a", "</a>x", "ab", ">.", "b<", "<b>", "e>f"]
VOCABULARY = [piece.encode() for piece in PIECES] + [b""] * (64 - len(PIECES))
END = 63
ARCHITECTURE = Architecture(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    qk_norm=True, qkv_bias=True, tied=False,
)  # fmt: skip
ROLES = {"talker": Role("m"), "chooser": Role("m")}
STOPS = ("</a>", "<b>", "a>f")
SPEC = Spec(
    num_slots=8, num_pages=512, page_size=4, max_tokens=192, burst=5, prefill_rows=8, prefill_chunk=6,
    prefill_chunks=4, num_kept=8,
)  # fmt: skip
FILTERS = {
    "plain": Sampling(),
    "hot": Sampling(temperature=1.7),
    "top_k": Sampling(temperature=0.8, top_k=5),
    "top_p": Sampling(temperature=1.3, top_p=0.3),
    "both": Sampling(temperature=0.9, top_k=7, top_p=0.6),
    "greedy": Sampling(temperature=0.0),
}


def decode(ids) -> str:
    return b"".join(VOCABULARY[i] for i in ids).decode()


def parameters(key: int = 0):
    """Random weights, biases too, sharpened so that sampling has preferences."""
    params = initialize(ARCHITECTURE, jax.random.key(key))
    return jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim > 1 else leaf, params)


def document(query: str) -> list[int]:
    """What a search finds: any length up to 24 tokens, a function of the query."""
    dice = random.Random(query)
    return [dice.randrange(len(PIECES)) for _ in range(dice.randrange(25))]


class SlowSearcher:
    """Documents that arrive at random times."""

    def __init__(self, most_s: float):
        self.most_s = most_s

    def search(self, queries, k, scopes=None):
        time.sleep(random.random() * self.most_s)
        return [[Passage("d", "", query) for query in queries[i : i + 1]] for i in range(len(queries))]


def talk(example: Example, mode: str):
    """Several turns with documents, a second stream, forced tokens, filters, and two streams at once."""
    dice = random.Random(example.id)
    prompt = [dice.randrange(len(PIECES)) for _ in range(dice.randrange(3, 40))]
    append = prompt
    for turn in range(dice.randrange(1, 5)):
        sampling = FILTERS[dice.choice(list(FILTERS))]
        reply = yield Generate("main", "talker", append, STOPS, dice.randrange(1, 14), sampling=sampling)
        found = yield Search((reply.text + str(turn),), 1)
        append = document(found.passages[0][0].text) or [0]
    allowed = Allowed(tuple(dice.sample(range(len(PIECES)), 5)), once=True)
    yield Force("main", "talker", append, [1, 2, 3])
    replies = yield Together(
        (
            Generate("choice", "chooser", prompt[:9], (), 4, allowed=allowed),
            Generate("main", "talker", [4], ("b",), 6, allowed=Allowed((0, 1, 2, 13))),
        )
    )
    return Outcome(replies[0].text)


def roll_out(
    num_examples: int, group_size: int, most_s: float = 0.0, params=None, max_episodes: int = 24,
    a: Architecture = ARCHITECTURE, roles=MappingProxyType(ROLES), mesh=None, **changes,
) -> list[Group]:  # fmt: skip
    """The fast engine's groups."""
    spec = dataclasses.replace(SPEC, **changes)
    mesh = mesh or make_mesh()
    decoder = Decoder(a, spec, VOCABULARY, END, mesh)
    engine = Engine({"m": decoder}, decode, SlowSearcher(most_s), max_episodes=max_episodes, search_batch=3)
    play = Play(talk, roles, group_size=group_size)
    weights = build_pack(a, mesh)(parameters() if params is None else params)
    examples = [Example(f"q{i}", "", ("",)) for i in range(num_examples)]
    groups = list(engine.run({"m": weights}, examples, play, jax.random.key(7)))
    assert all(pages.num_held == 0 for pages in decoder.pages), "pages leaked"
    assert decoder.advance._cache_size() == 1, "advance was compiled more than once"
    engine.close()
    return groups


class Naive:
    """One token at a time, with the whole sequence through the trunk each time."""

    def __init__(self, params):
        self.root = jax.random.key(7)

        def logits(tokens, length):
            positions = jnp.arange(tokens.shape[1])[None]
            segment = (positions < length).astype(jnp.int32)
            hidden = trunk(params, ARCHITECTURE, tokens, positions, segment, jnp.zeros((1, 2), jnp.int32))
            return (hidden[0, length - 1] @ params.output_head.T).astype(jnp.float32)

        self._logits = jax.jit(logits)
        self._uniform = jax.jit(
            lambda uid, at: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(self.root, uid), at))
        )

    def episode(self, example: Example, sample: int):
        def script(episode, request):
            stream = episode.streams[request.stream]
            tokens, out = stream.tokens.tolist(), []
            uid = np.uint32(stream_uid(example.id, sample, request.stream))
            sampling = request.sampling or Sampling()
            left = list(request.allowed.ids) if request.allowed else None
            limit = min(request.limit, len(left)) if left and request.allowed.once else request.limit
            while len(out) < limit:
                token = self.draw(tokens + out, uid, sampling, left)
                out.append(token)
                if left and request.allowed.once:
                    left.remove(token)
                if token == END or any(stop in decode(out) for stop in request.stop):
                    break
            return out, decode(out)

        search = SlowSearcher(0.0).search
        return drive(talk, example, script, lambda queries, k, scope: search(queries, k), act=SAMPLED)

    def draw(self, tokens: list[int], uid: np.uint32, sampling: Sampling, allowed: list[int] | None) -> int:
        padded = np.zeros((1, SPEC.max_tokens), np.int32)
        padded[0, : len(tokens)] = tokens
        z = np.asarray(self._logits(padded, len(tokens)), np.float64)
        order = np.argsort(-z, kind="stable")
        if allowed is not None:
            order = np.array([i for i in order if i in allowed])
        if sampling.temperature == 0:
            return int(order[0])
        p = np.exp((z - z.max()) / sampling.temperature)
        if sampling.top_k:
            order = order[: sampling.top_k]
        if sampling.top_p < 1:
            mass = p[order] / (p[order].sum() if sampling.top_k or allowed is not None else p.sum())
            order = order[np.cumsum(mass) - mass < sampling.top_p][: SPEC.num_kept]
        elif not sampling.top_k and allowed is None:
            order = np.arange(len(z))  # unfiltered: the inverse CDF runs in vocabulary order
        weights = p[order]
        target = float(self._uniform(uid, len(tokens))) * weights.sum()
        return int(order[min(np.searchsorted(np.cumsum(weights), target, side="right"), len(order) - 1)])


def fingerprint(groups: list[Group]) -> str:
    """A hash of every token and its origin."""
    digest = hashlib.sha256()
    for group in groups:
        for trajectory in group.trajectories:
            for stream in trajectory.streams:
                digest.update(stream.tokens.tobytes() + stream.act.tobytes())
    return digest.hexdigest()


def print_fingerprint() -> None:
    print(fingerprint(roll_out(6, 2, most_s=0.005)))
