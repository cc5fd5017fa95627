"""Playing episodes of forced lengths with random weights, and what that takes against its floor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from rlrag.agents.workflow import Role
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.decoding import DecodeWeights, build_pack
from rlrag.model.parameters import Transformer, initialize, shardings
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.speed.floor import Rates, Work, decoding, prefilling
from rlrag.speed.workload import ROLE, Turn, Volume, Workload, volume
from rlrag.trajectory import Group

MODEL = "m"
NO_END = -1  # lengths are forced: no token ends a turn


@dataclass(frozen=True)
class Sizes:
    """Of the rollout's program."""

    num_slots: int
    max_episodes: int  # in flight at once, waiting ones included; each has pages for the longest episode
    burst: int = 8
    page_size: int = 16
    prefill_rows: int = 32
    prefill_chunk: int = 32
    prefill_chunks: int = 8

    def spec(self, capacity: int) -> Spec:
        tokens = -(-capacity // self.page_size) * self.page_size
        return Spec(
            num_slots=self.num_slots, num_pages=self.max_episodes * tokens // self.page_size, page_size=self.page_size,
            max_tokens=tokens, burst=self.burst, prefill_rows=self.prefill_rows, prefill_chunk=self.prefill_chunk,
            prefill_chunks=self.prefill_chunks, num_kept=0,
        )  # fmt: skip


@dataclass
class Played:
    """One run: what the engine counted, and what it had to do."""

    seconds: float
    usage: dict[str, float]
    decoding: Work
    prefilling: Work  # of the tokens that were read, not those found in the cache
    groups: list[Group] = field(default_factory=list)

    def floor_s(self, rates: Rates) -> float:
        return self.decoding.seconds(rates) + self.prefilling.seconds(rates)

    def report(self, rates: Rates) -> dict[str, Any]:
        u = self.usage
        return {
            "tokens_per_s": u["tokens"] / self.seconds,
            "seconds": self.seconds,
            "floor_s": self.floor_s(rates),
            "share_of_floor": self.floor_s(rates) / self.seconds,
            "decode_floor_s": self.decoding.seconds(rates),
            "decode_bound": self.decoding.bound(rates),
            "decode_flops": self.decoding.flops,
            "decode_bytes": self.decoding.moved_bytes,
            "prefill_floor_s": self.prefilling.seconds(rates),
            "prefill_flops": self.prefilling.flops,
            "prefill_bytes": self.prefilling.moved_bytes,
            "sampled_tokens": u["tokens"],
            "prefill_tokens": u["prefill_tokens"],
            "shared_tokens": u["shared_tokens"],
            "slot_occupancy": u["lane_occupancy"],
            "burst_waste": u["burst_waste"],
            "rounds": u["rounds"],
            "device_s": u["device_s"],
            "scheduling_s": u["scheduling_s"],
            "workflow_s": u["workflow_s"],
            "search_wait_s": u["search_wait_s"],
            "starved_s": u["starved_s"],
            "evictions": u["evictions"],
        }


def start(a: Architecture, seed: int = 0) -> Transformer:
    """Random parameters on this process's devices."""
    where = shardings(a, make_mesh())
    return jax.jit(lambda: initialize(a, jax.random.key(seed)), out_shardings=where)()


def packed(a: Architecture, params: Transformer) -> DecodeWeights:
    return build_pack(a, make_mesh())(params)


class Player:
    """One program of sampling, whose episodes may be of any workload that fits it."""

    def __init__(self, a: Architecture, sizes: Sizes, capacity: int):
        """capacity: tokens of the longest episode."""
        self.architecture, self.sizes = a, sizes
        self.decoder = Decoder(a, sizes.spec(capacity), [b"."] * a.vocab_size, NO_END, make_mesh())

    @property
    def programs(self) -> int:
        """Compilations of the program so far: 1, or something recompiled."""
        return self.decoder.advance._cache_size()  # type: ignore[attr-defined]

    def play(
        self, weights: DecodeWeights, workload: Workload, episodes: int, *, group_size: int = 1, searcher: Any = None,
        seed: int = 0, keep: bool = False,
    ) -> Played:  # fmt: skip
        """keep: hold the groups, for an update."""
        examples = workload.examples(episodes // group_size, seed)
        engine = Engine(
            {MODEL: self.decoder}, lambda ids: "", searcher, max_episodes=self.sizes.max_episodes, search_threads=256
        )
        play = Play(workload.play, {ROLE: Role(MODEL)}, group_size=group_size)
        groups = []
        for group in engine.run({MODEL: weights}, examples, play, jax.random.key(seed)):
            if keep:
                groups.append(group)
        engine.close()
        usage = engine.usage.metrics()
        turns = [workload.episode(example.id) for example in examples for _ in range(group_size)]
        return Played(engine.usage.seconds, usage, *self.work(turns, group_size, usage["shared_tokens"]), groups)

    def work(self, episodes: Sequence[Sequence[Turn]], group_size: int, shared: float) -> tuple[Work, Work]:
        """Of decoding and of prefill. Of a group all but one share what they begin with."""
        a, needed, sizes = self.architecture, volume(episodes), self.sizes
        sharers = len(episodes) * (1 - 1 / group_size) or len(episodes)
        reading = prefilling(a, *read(needed, shared, sharers), sizes.prefill_rows * sizes.prefill_chunk)
        return decoding(a, needed, sizes.num_slots), reading


def read(needed: Volume, shared: float, sharers: float) -> tuple[float, float]:
    """Tokens that are read less those shared, which are the first of `sharers` episodes alike; and what they see."""
    each = shared / max(sharers, 1)
    return needed.read - shared, max(needed.read_context - sharers * each * (each + 1) / 2, 0.0)
